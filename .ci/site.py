"""Hooks of mkdocs: pages of the site that lie outside docs/, and the links between them and docs/.

The sources are written for GitHub, with paths from their own folders. A link from a page to a file of the repository that is no page
becomes plain text, because the site has no address of the repository.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
    "tests/benchmarks/RESULTS.md": "benchmarks.md",
    "tests/benchmarks/README.md": "benchmarks_readme.md",
}
"""Path in the repository -> page of the site."""
API = {
    "From Python": ["scfm_core.api", "scfm_core.train.pipelines.with_steps"],
    "The method": [
        "scfm_core.scfm.method", "scfm_core.scfm.slices", "scfm_core.scfm.plan", "scfm_core.scfm.target", "scfm_core.scfm.flow_map", "scfm_core.scfm.matching", "scfm_core.scfm.trajectory",
        "scfm_core.scfm.ema", "scfm_core.scfm.restart", "scfm_core.scfm.loss",
    ],
    "Models": ["scfm_core.models.protocol", "scfm_core.models.adapters", "scfm_core.models.student"],
    "Engines": ["scfm_core.distributed.engine"],
    "Data": ["scfm_core.data.corpus", "scfm_core.data.order", "scfm_core.data.loader"],
}  # fmt: skip
"""Heading -> the modules and functions whose docstrings are below it."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(```.*?```)", re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and the reference of the Python code."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    parts = ["# Python\n"]
    for heading, modules in API.items():
        parts.append(f"## {heading}\n")
        parts += [f"::: {module}\n    options: {{show_root_heading: true}}\n" for module in modules]
    files.append(File.generated(config, "api.md", content="\n".join(parts)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the site's pages."""
    outside = {name: source for source, name in OUTSIDE.items()}
    source = outside.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match.group(0)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        name = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if name is None:
            return text if (ROOT / path).exists() else match.group(0)  # the latter fails the strict build
        return f"{image}[{text}]({name}{anchor or ''})"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)
