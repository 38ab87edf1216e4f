"""What the pages say can be done: links lead somewhere, commands parse, files and settings exist. No network, no model.

It is also the link checker of `.pre-commit-config.yaml`. The checkers on PyPI need other versions of our dependencies, or check
only HTML or the web; none checks commands.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mkdocs.commands.build
import mkdocs.config
import pytest
import yaml

from recipes import cli, config_docs, models_docs
from scfm_core import __version__
from scfm_core.errors import UserError
from scfm_core.train.parse import find_recipe, load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page for folder in (".", "docs", "tests/benchmarks") for page in (ROOT / folder).glob("*.md"))
GUIDES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # a changelog names what is gone
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

# Programs that a page may call and that are not ours. A misspelled `scfm` is not among them.
OTHER_PROGRAMS = {
    "apptainer", "apt-get", "cd", "cp", "curl", "docker", "echo", "export", "git", "hf", "ls", "pgrep", "pip", "py-spy", "source", "ssh", "tail", "torchfrtrace",
}  # fmt: skip
OWN_FOLDERS = ("scfm_core", "recipes", "data_tools", "slurm", "tests", "docs")
# A reader's own recipe; a shipped one replaces it.
STAND_INS = {"data=my_data.yaml": "data=self_generated.yaml", "mine.yaml": "digits", "a.yaml": "flux_dev_lora.yaml"}


class Page(NamedTuple):
    prose: str
    """Without fenced blocks."""
    blocks: list[tuple[str, str]]
    """(language, text) of each fenced block."""


@functools.cache
def read(path: Path) -> Page:
    blocks: list[tuple[str, str]] = []

    def cut(match: re.Match[str]) -> str:
        blocks.append((match["language"], match["text"]))
        return "\n"

    fence = r"^```(?P<language>\w*)\n(?P<text>.*?)^```$"
    return Page(re.sub(fence, cut, path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL), blocks)


def inline_code(prose: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def anchors(prose: str) -> set[str]:
    """What GitHub makes of headings."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.+)$", prose, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        numbered = (slug if number == 0 else f"{slug}-{number}" for number in itertools.count())
        found.add(next(name for name in numbered if name not in found))
    return found


def broken_links(page: Path, prose: str) -> list[str]:
    """Links and pictures that lead nowhere; of an address on the web only the form is looked at."""
    broken = []
    without_code = re.sub(r"`[^`]*`", "", prose)
    if other := re.findall(r"^\[[^\]]+\]: .*|<(?:a|img)\b[^>]*>", without_code, re.MULTILINE):
        broken.append(f"{other[0]}: write [text](target), which is checked")
    links = re.findall(r"(!?)\[([^\[\]]*)\]\(([^)]*)\)", without_code)
    if without_code.count("](") != len(links):
        broken.append("a link within a link, or with brackets in its text: it is not checked")
    for picture, text, target in links:
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if picture and not text.strip():
            broken.append(f"{target}: the picture has no text for those who cannot see it")
        if not target:
            broken.append(f"[{text}] leads nowhere")
        elif re.match(r"[a-z]+:", target):
            if not re.fullmatch(r"https?://[\w-]+(\.[\w-]+)+(/[^\s<>\"]*)?", target):
                broken.append(f"{target}: no address of the web")
        elif not (file.is_relative_to(ROOT) and file.exists()):
            broken.append(f"{target}: there is no {path}")
        elif anchor and anchor not in anchors(read(file).prose if path else prose):
            broken.append(f"{target}: no heading makes this anchor")
    return broken


def commands(block: str) -> Iterator[list[str]]:
    """The simple commands of a shell block, as words, without comments and environment variables."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.wordchars += "[]{}@,:#"  # no comment within a word
        lexer.commenters = ""
        words = list(itertools.takewhile(lambda word: not word.startswith("#"), lexer))
        for is_operator, group in itertools.groupby(words, lambda word: word in ("&&", "||", "|", ";", "&")):
            command = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), group))
            if command and not is_operator:
                yield command


@functools.cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def complaint(words: list[str]) -> str | None:
    """Why a command cannot work, or None."""
    program, *rest = words
    if program in ("torchrun", "deepspeed") and "scfm" in rest:
        return scfm_complaint(rest[rest.index("scfm") + 1 :])
    if program == "deepspeed" and rest[:2] == ["--module", "recipes.cli"]:
        return scfm_complaint(rest[2:])
    if program == "scfm":
        return scfm_complaint(rest)
    if program == "make":
        return next((f"make has no target {word}" for word in rest if word not in make_targets()), None)
    if program in ("sbatch", "bash"):
        return job_complaint(rest)
    if program == "python":
        return python_complaint(rest)
    return None if program in OTHER_PROGRAMS else f"{program} is no program that the pages know"


def python_complaint(words: list[str]) -> str | None:
    if words[0] == "-m":
        if words[1] == "pytest":
            return next((f"{path} is missing" for path in words[2:] if path[0] != "-" and not exists(path)), None)
        return None if importlib.util.find_spec(words[1]) else f"there is no module {words[1]}"
    # A script of the reader's, or of DeepSpeed's in a run, lies in no folder of ours.
    return f"{words[0]} is missing" if words[0].startswith(OWN_FOLDERS) and not exists(words[0]) else None


def job_complaint(words: list[str]) -> str | None:
    """`sbatch [OPTION...] SCRIPT [RECIPE...] [section.key=value...]`."""
    script = next((word for word in words if word.endswith(".sh")), "")
    if not (script.startswith("slurm/") and exists(script)):
        return f"there is no job script {script!r}"
    given = words[words.index(script) + 1 :]
    names = list(itertools.takewhile(lambda word: "=" not in word, given)) or ["flux_dev_lora.yaml"]
    found = (config_complaint(STAND_INS.get(name, name), given[len(names) :]) for name in names if name != "...")
    return next((why for why in found if why), None)


def scfm_complaint(words: list[str]) -> str | None:
    """As `scfm` itself would: unknown options, recipes, keys and values are named."""
    message = io.StringIO()
    with contextlib.redirect_stderr(message):
        try:
            arguments, rest = cli._parser().parse_known_args(words)
        except SystemExit:
            return message.getvalue().splitlines()[-1]
    given = [*getattr(arguments, "overrides", []), *rest]
    if wrong := [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]:
        return f"unrecognized arguments: {wrong}"
    if hasattr(arguments, "study"):
        arms = [word for word in arguments.arms if "=" not in word]
        return study_complaint(arguments.study, arms, [*given, *(word for word in arguments.arms if "=" in word)])
    # What works on a run or on data says nothing of its recipe; any has all sections.
    return config_complaint(getattr(arguments, "config", "flux_dev_lora.yaml"), given)


def study_complaint(name: str, arms: list[str], overrides: list[str]) -> str | None:
    try:
        study = yaml.safe_load(
            find_recipe(STAND_INS.get(name, name), "study").read_text()
        )  # tests/recipes checks its arms
    except UserError as error:
        return str(error)
    if unknown := [arm for arm in arms if arm not in study["arms"]]:
        return f"the study {name} has no arm {unknown}"
    return config_complaint(study["recipe"], [*study["set"], *overrides])


def config_complaint(recipe: str, overrides: list[str]) -> str | None:
    try:
        load_config(recipe, [STAND_INS.get(word, word) for word in overrides])
    except UserError as error:
        return str(error)
    return None


def exists(path: str) -> bool:
    return any(ROOT.glob(path.rstrip("/"))) if "*" in path else (ROOT / path).exists()


def code_complaint(code: str) -> str | None:
    """`scfm_core/flow/path.py`, `scfm/target.py`, `data/source.py: Shard`: the file exists and contains the name."""
    match = re.fullmatch(
        r"(?P<path>[\w*.-]+(/[\w*.-]+)+\.(py|yaml|sh|env|md|json)|[a-z_]+/)(: (?P<name>[\w.]+))?", code
    )
    is_ours = match and (match["path"].endswith((".py", ".sh")) or match["path"].startswith(OWN_FOLDERS))
    if match is None or not is_ours or "NAME" in match["path"]:
        return None
    places = [ROOT / folder / match["path"] for folder in ("", "scfm_core", "recipes")]
    file = next((place for place in places if exists(place.relative_to(ROOT).as_posix())), None)
    if file is None:
        return f"`{code}`: there is no such file"
    name = (match["name"] or "").rpartition(".")[2]
    return None if not name or name in file.read_text() else f"`{code}`: {name} is not in that file"


def tour_files(text: str) -> Iterator[tuple[str, list[str]]]:
    """(file, where it may lie) of each file that CONTRIBUTING's tour names; indents of 4 and 6 begin an entry."""
    [tour] = re.findall(r"^## A tour of the house\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    top = inner = ""
    for line in tour.splitlines():
        indent = len(line) - len(line.lstrip())
        head = line.split()[0] if line.strip() else ""
        if indent == 4:
            top, inner = head, ""
        elif indent == 6:
            inner = head if head.endswith("/") and "*" not in head else ""
        if indent >= 4:
            for name in re.findall(r"[\w*/-]+\.(?:py|sh|env|yaml)\b", line):
                yield name, [f"{top}{inner}{name}", f"{top}{name}"]
            yield from ((folder, [folder]) for folder in ({top, top + inner} if head.endswith("/") else ()))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    assert broken_links(page, read(page).prose) == []


@pytest.mark.parametrize("page", GUIDES, ids=[page.relative_to(ROOT).as_posix() for page in GUIDES])
def test_commands_parse(page):
    found = [words for language, text in read(page).blocks if language == "bash" for words in commands(text)]
    assert [f"{shlex.join(words)}: {why}" for words in found if (why := complaint(words))] == []


@pytest.mark.parametrize("page", GUIDES, ids=[page.relative_to(ROOT).as_posix() for page in GUIDES])
def test_code_in_the_text(page):
    """Files that are named exist; `scfm ...` is a command, `make ...` a target."""
    code = inline_code(read(page).prose)
    wrong = [why for each in code if (why := code_complaint(each))]
    with contextlib.redirect_stderr(io.StringIO()):
        usage = cli._parser().format_help()
    for each in code:
        program, _, rest = each.partition(" ")
        if program == "scfm" and rest and not re.search(rf"^ +{rest.split()[0]}\b", usage, re.MULTILINE):
            wrong.append(f"`{each}`: scfm has no such command")
        if program == "make" and rest and rest.split()[0] not in make_targets():
            wrong.append(f"`{each}`: make has no such target")
    assert wrong == []


def test_python_blocks_compile():
    blocks = [(page, text) for page in PAGES for language, text in read(page).blocks if language == "python"]
    assert len(blocks) >= 2
    for page, text in blocks:
        compile(text, str(page), "exec")


def test_every_picture_and_every_command_is_in_reproduce():
    page = ROOT / "docs" / "reproduce.md"
    prose = read(page).prose
    pictures = {name for other in PAGES for name in re.findall(r"!\[[^\]]*\]\((?:docs/)?([^)]+)\)", read(other).prose)}
    assert len(pictures) >= 2 and all(f"({name})" in prose for name in pictures)
    inline = [code for code in inline_code(prose) if code.split()[0] in ("scfm", "make", "python") and " " in code]
    assert len(inline) >= 3
    assert [why for code in inline for words in commands(code) if (why := complaint(words))] == []
    rows = [row for row in prose.splitlines() if row.startswith("| ") and "| what |" not in row]
    assert len(rows) >= 10 and all(re.search(r"\| 20\d\d-\d\d-\d\d(, (20\d\d-\d\d-)?\d\d)* \|$", row) for row in rows)


def test_each_hostile_input_names_its_tests():
    rows = re.findall(r"^\|.*\|$", read(ROOT / "SECURITY.md").prose, re.MULTILINE)
    header, cells = rows[0].split("|"), [row.split("|")[-2] for row in rows[2:]]
    assert header[-2].strip() == "tests" and len(cells) >= 10
    for cell in cells:
        file, found = "", 0
        for code in inline_code(cell):
            path, _, name = code.rpartition(": ")
            file = path or file
            found += bool(re.search(rf"^ *(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE))
        assert found == len(inline_code(cell)) > 0, cell


def test_every_shipped_recipe_is_on_the_page_of_recipes():
    code = set(inline_code(read(ROOT / "docs" / "recipes.md").prose))
    shipped = {path.stem for folder in ("configs", "data") for path in (ROOT / "recipes" / folder).rglob("*.yaml")}
    assert shipped <= code


def test_the_table_of_models_is_computed():
    text = models_docs.PAGE.read_text(encoding="utf-8")
    assert models_docs.page(text) == text, "run `python -m recipes.models_docs`"


def test_a_model_without_a_row_of_facts_has_another_licence():
    """A new family begins with `known`; its names and its licence are in models/published.py, or still missing there."""
    assert models_docs._licence("made-up/model") == "other"


def test_the_page_of_settings_is_made_from_their_docstrings():
    assert config_docs.PAGE.read_text(encoding="utf-8") == config_docs.page(), "run `python -m recipes.config_docs`"


def test_a_setting_without_a_docstring_is_an_error():
    with pytest.raises(ValueError, match=r"Documented\.undocumented has no docstring"):
        config_docs.key_texts(Documented)


@dataclasses.dataclass
class Documented:
    documented: int
    """A text."""
    undocumented: int


def test_the_tour_names_files_that_exist():
    named = list(tour_files((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert len(named) > 60
    assert [name for name, places in named if not any(exists(place) for place in places)] == []


def test_environment_variables_are_documented_and_exist():
    variables = re.compile(r"\bSCFM_[A-Z_]*[A-Z]\b")
    files = [path for folder in OWN_FOLDERS[:5] for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")]
    used = {path: set(variables.findall(path.read_text(encoding="utf-8"))) for path in files if path != Path(__file__)}
    for_users = set().union(*(names for path, names in used.items() if "tests" not in path.parts))
    documented = set().union(*(variables.findall(page.read_text(encoding="utf-8")) for page in GUIDES))
    # `SCFM_RENDEZVOUS_HOST`, `_PORT`; and what the job scripts tell each other.
    assert for_users - documented == {"SCFM_RENDEZVOUS_PORT", "SCFM_LOGS"}
    assert documented <= set().union(*used.values())


def test_one_version():
    [project] = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and __version__ == project == citation == newest[1]


def test_ci_calls_targets_that_exist():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    called = {word for step in steps for word in re.findall(r"\bmake ([\w-]+)", step)}
    assert {"lint", "test"} <= called <= make_targets()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("scmf train flux_dev_lora.yaml", "no program"),
        ("scfm trian flux_dev_lora.yaml", "invalid choice"),
        ("scfm train flux_dev_lora.yaml --dry-rum", "unrecognized arguments"),
        ("scfm train flux_lora.yaml", "no configuration file"),
        ("scfm train flux_dev_lora.yaml train.step=3", "did you mean train.steps"),
        ("scfm train flux_dev_lora.yaml train.steps=none", "train.steps"),
        ("scfm train flux_dev_lora.yaml data=gone.yaml", "no file"),
        ("torchrun --nproc-per-node 8 --no-python scfm train flux_dev_full.yaml engine.shards=8", "engine.shard"),
        ("scfm study digits --arms papers", "no arm"),
        ("scfm study gone", "no configuration file"),
        ("sbatch -N 4 slurm/distil_flux.sh", "no job script"),
        ("sbatch slurm/distill_flux.sh flux_dev_full.yaml train.nothing=1", "unknown key"),
        ("make dmeo", "no target"),
        ("python -m recipes.demos", "no module"),
        ("python tests/benchmarks/bench_gone.py", "missing"),
        ("cd scfm && make dmeo  # not make nothing", "make has no target dmeo"),
    ],
)
def test_a_wrong_command_is_caught(command, message):
    complaints = [why for words in commands(command) if (why := complaint(words))]
    assert len(complaints) == 1 and message in complaints[0]


def test_a_wrong_link_is_caught():
    text = (
        "# One `two`, three\n[a](../README.md) [b](gone.md) [c](#one-two-three) [d](#gone) [e](https://gone.example)\n"
        "[f](../../../etc/passwd) [g](data.md#gone) [a\nb](https:/gone.example) ![](demo.png) [h](my file.md) [i]()\n"
        "[j]: data.md\n"
    )
    assert broken_links(ROOT / "docs" / "data.md", text) == [
        "[j]: data.md: write [text](target), which is checked",
        "gone.md: there is no gone.md",
        "#gone: no heading makes this anchor",
        "../../../etc/passwd: there is no ../../../etc/passwd",
        "data.md#gone: no heading makes this anchor",
        "https:/gone.example: no address of the web",
        "demo.png: the picture has no text for those who cannot see it",
        "my file.md: there is no my file.md",
        "[i] leads nowhere",
    ]
    assert broken_links(ROOT / "README.md", "[[1]](LICENSE)") == [
        "a link within a link, or with brackets in its text: it is not checked"
    ]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("scfm_core/flow/path.py", None),
        ("scfm/target.py", None),
        ("recipes/configs/*.yaml", None),
        ("data/source.py: Shard", None),
        ("N ** -gamma", None),
        ("scfm/gone.py", "no such file"),
        ("recipes/configs/gone.yaml", "no such file"),
        ("data/source.py: Gone", "Gone is not in that file"),
    ],
)
def test_a_wrong_file_is_caught(code, message):
    found = code_complaint(code)
    assert found is None if message is None else message in found


def test_a_wrong_file_of_the_tour_is_caught():
    tour = "## A tour of the house\n\n    scfm_core/\n      flow/         path.py, gone.py\n                    ema.py\n\n## Next\n"
    named = {name: any(exists(place) for place in places) for name, places in tour_files(tour)}
    assert named == {"scfm_core/": True, "scfm_core/flow/": True, "path.py": True, "gone.py": False, "ema.py": False}


@pytest.mark.processes  # a plugin asks git for the root
def test_the_site_has_every_page(tmp_path, caplog):
    """Strict: a link to no page, to no heading, or a page without a place in the navigation is an error."""
    config = mkdocs.config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    mkdocs.commands.build.build(config)
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    pages = {path.parent.name for path in tmp_path.glob("*/index.html")}
    assert pages >= {path.stem for path in (ROOT / "docs").glob("*.md")} | {"api", "benchmarks"}
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert all(name in api for name in ("with_steps", "PlanConfig", "scfm_target", "DualEMA"))
