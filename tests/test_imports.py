"""The structure of the project: who may import whom, no circles, no file or function too long.

`python tests/test_imports.py` prints the import graph of scfm_core.
"""

import ast
import graphlib
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Modules that import only the standard library, and the exceptions.
LEAVES = tuple(
    f"scfm_core.{name}"
    for name in (
        "errors",
        "file_systems",
        "files",
        "filling",
        "launched",
        "output",
        "progress",
        "readback",
        "secrets",
        "user",
        "wording",
    )
)

# The modules of this repository that each package may import, including its own. A new package needs a line here.
ALLOWED = {
    "scfm_core": (),  # its __init__ runs before any package below
    "scfm_core.api": ("scfm_core",),  # what the __init__ offers, imported when it is used
    **dict.fromkeys(LEAVES, ()),
    **dict.fromkeys(("scfm_core.launched", "scfm_core.user"), ("scfm_core.errors",)),
    "scfm_core.files": ("scfm_core.errors", "scfm_core.progress"),
    "scfm_core.flow": ("scfm_core.flow",),
    "scfm_core.scfm": ("scfm_core.scfm", "scfm_core.flow", "scfm_core.readback"),
    "scfm_core.kernels": ("scfm_core.kernels", "scfm_core.flow"),
    "scfm_core.models": ("scfm_core.models", "scfm_core.flow", "scfm_core.kernels", *LEAVES),
    "scfm_core.data": ("scfm_core.data", *LEAVES),
    "scfm_core.distributed": ("scfm_core.distributed", *LEAVES),
    "scfm_core.train": ("scfm_core",),
    "data_tools": ("data_tools", "scfm_core.data", "scfm_core.models", "scfm_core.flow", *LEAVES),
    "recipes": ("recipes", "data_tools", "scfm_core"),
}
OURS = ("scfm_core", "recipes", "data_tools")

# Third-party packages that these packages may import; the others may import any.
THIRD_PARTIES = {
    "scfm_core.flow": {"torch"},
    **{leaf: set() for leaf in LEAVES},
    "scfm_core.filling": {"torch"},
    "scfm_core.readback": {"torch"},
}

# Heavy or optional packages: each is imported in one module, inside the function that needs it.
LAZY = {"deepspeed", "streaming", "webdataset", "wandb", "xformers"}


@dataclass(frozen=True)
class Import:
    name: str
    """Dotted name; for `from a import b` it is `a.b`, which need not be a module."""
    line: int
    inside_function: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


def imports_of(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, inside_function: bool) -> None:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = [node.module] if node.module else []
            if node.level:
                parents = module.split(".") + (["__init__"] if is_package else [])
                origin = parents[: -node.level] + origin
            names = [".".join([*origin, alias.name]) for alias in node.names]
        else:
            names = []
        found.extend(Import(name, node.lineno, inside_function) for name in names)
        inside_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inside_function)

    visit(ast.parse(source), False)
    return found


def package_of(module: str) -> str:
    return ".".join(module.split(".")[: 2 if module.startswith("scfm_core.") else 1])


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def violations(modules: dict[str, list[Import]]) -> list[str]:
    broken = []
    homes = defaultdict(set)
    for module, imports in modules.items():
        package = package_of(module)
        if package not in ALLOWED:
            broken.append(f"{module}: no rule for {package}")
            continue
        for imported in imports:
            where = f"{module}:{imported.line}: {imported.name}"
            if imported.top in OURS:
                if not within(imported.name, ALLOWED[package]):
                    broken.append(f"{where}: {package} may not import this")
            elif package in THIRD_PARTIES and imported.top not in THIRD_PARTIES[package] | sys.stdlib_module_names:
                broken.append(f"{where}: {package} may not import this third party")
            if imported.top in LAZY:
                homes[imported.top].add(module)
                if not imported.inside_function:
                    broken.append(f"{where}: only inside a function")
    broken += [f"{name} is imported in {sorted(users)}" for name, users in homes.items() if len(users) > 1]
    return broken


def project() -> dict[str, list[Import]]:
    modules = {}
    for path in sorted(path for package in OURS for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        modules[module] = imports_of(path.read_text(encoding="utf-8"), module, is_package=is_package)
    return modules


def test_the_project_keeps_its_import_direction():
    modules = project()
    # Without modules no rule could be broken.
    assert set(ALLOWED) - {"scfm_core.kernels"} <= {package_of(module) for module in modules}
    assert "scfm_core.flow.path.euler_step" in {imported.name for imported in modules["scfm_core.flow.sampler"]}
    assert violations(modules) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("scfm_core.flow.path", "import torch, math"),
        ("scfm_core.flow.sampler", "from .path import euler_step"),
        ("scfm_core.scfm.plan", "from scfm_core.flow import random"),
        ("scfm_core.files", "import hashlib"),
        ("scfm_core.data.cache", "from scfm_core.files import mismatch"),
        ("scfm_core.data.webdataset", "def write():\n    import webdataset"),
        ("scfm_core.train.trainer", "from scfm_core import models, scfm"),
        ("recipes.cli", "def main():\n    from data_tools.encode import encode_folder"),
    ],
)
def test_allowed_imports_pass(module, source):
    assert violations({module: imports_of(source, module)}) == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("scfm_core.flow.path", "import numpy", "scfm_core.flow.path:1: numpy: .* third party"),
        ("scfm_core.flow.path", "import scfm_core.errors", "scfm_core.flow may not"),
        ("scfm_core.flow.path", "from ..scfm import plan", "scfm_core.scfm.plan: scfm_core.flow may not"),
        ("scfm_core.flow.path", "from scfm_core import scfm", "scfm_core.flow may not"),
        ("scfm_core.scfm.plan", "\n\ndef f():\n    from scfm_core.models import flux", "plan:4: .* may not"),
        ("scfm_core.scfm.plan", "import scfm_core.flowers", "scfm_core.scfm may not"),
        ("scfm_core.scfm.plan", "import scfm_core", "scfm_core.scfm may not"),
        ("scfm_core.files", "from scfm_core.secrets import scrub", "scfm_core.files may not"),
        ("scfm_core.secrets", "import torch", "scfm_core.secrets:1: torch: .* third party"),
        ("scfm_core.models.flux", "from scfm_core.train.config import RunConfig", "scfm_core.models may not"),
        ("scfm_core.data.loader", "from scfm_core.distributed import engine", "scfm_core.data may not"),
        ("scfm_core.train.trainer", "from recipes import cli", "scfm_core.train may not"),
        ("data_tools.encode", "from scfm_core.train import config", "data_tools may not"),
        ("scfm_core", "from scfm_core.train import trainer", "scfm_core may not"),
        ("scfm_core.novel.thing", "", "no rule for scfm_core.novel"),
        ("scfm_core.train.metrics", "import wandb", "wandb: only inside a function"),
        ("scfm_core.train.metrics", "try:\n    import wandb\nexcept ImportError:\n    pass", "only inside"),
        ("scfm_core.train.metrics", "class A:\n    import wandb.sdk", "only inside"),
    ],
)
def test_the_walker_finds_violations(module, source, message):
    [broken] = violations({module: imports_of(source, module)})
    assert re.search(message, broken)


def test_the_walker_finds_a_second_module_with_a_lazy_import():
    source = "def f():\n    import deepspeed.comm"
    modules = {name: imports_of(source, name) for name in ("scfm_core.distributed.a", "scfm_core.train.b")}
    assert violations(modules) == ["deepspeed is imported in ['scfm_core.distributed.a', 'scfm_core.train.b']"]


def test_relative_imports_resolve_from_a_package_itself():
    [imported] = imports_of("from .plan import PlanConfig", "scfm_core.scfm", is_package=True)
    assert imported.name == "scfm_core.scfm.plan.PlanConfig"


def graph(modules: dict[str, list[Import]]) -> dict[str, set[str]]:
    """For each module, the modules of this repository that it imports, also only for types and inside functions."""
    return {
        module: {other for imported in imports for other in modules if within(imported.name, (other,))}
        - {module, *parents(module)}
        for module, imports in modules.items()
    }


def parents(module: str) -> set[str]:
    """The packages that contain a module. Importing it runs their `__init__`, which import no module of this repository."""
    parts = module.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def without_packages(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Drop packages from the imports: `import a.b.c` also names `a` and `a.b`."""
    return {
        module: {other for other in others if not any(longer.startswith(f"{other}.") for longer in edges)}
        for module, others in edges.items()
    }


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle of imports; empty if there is none."""
    try:
        list(graphlib.TopologicalSorter(edges).static_order())
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_in_a_circle():
    edges = without_packages(graph(project()))
    assert "scfm_core.train.step" in edges["scfm_core.train.trainer"], "the graph has no edges"
    assert circle(edges) == []


def test_the_search_finds_a_circle():
    modules = {
        "scfm_core.train.a": imports_of("from scfm_core.train.b import f", "scfm_core.train.a"),
        "scfm_core.train.b": imports_of(
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from scfm_core.train.c import T",
            "scfm_core.train.b",
        ),
        "scfm_core.train.c": imports_of("def f():\n    from scfm_core.train import a", "scfm_core.train.c"),
    }
    assert set(circle(without_packages(graph(modules)))) == set(modules)


MOST_LINES = {"file": 400, "function": 60}


def too_long(source: str, name: str) -> list[str]:
    """The file and its functions, if they have more lines than `MOST_LINES`."""
    lines = source.count("\n")
    found = [f"{name}: {lines} lines"] if lines > MOST_LINES["file"] else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > MOST_LINES["function"]:
                found.append(f"{name}:{node.lineno}: {node.name} has {length} lines")
    return found


def test_no_file_and_no_function_is_too_long():
    paths = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
    assert [line for path in paths for line in too_long(path.read_text(), str(path.relative_to(ROOT)))] == []


def test_too_long_files_and_functions_are_found():
    function = "def f():\n" + "    pass\n" * 60
    assert too_long(function, "a.py") == ["a.py:1: f has 61 lines"]
    assert too_long("\n" * 401, "a.py") == ["a.py: 401 lines"]
    assert too_long("def f():\n" + "    pass\n" * 59, "a.py") == []


def without_encoding(source: str, name: str) -> list[str]:
    """Text files that are read or written in the encoding of the locale, which on a cluster may be ASCII."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        is_text = node.func.attr in ("read_text", "write_text")
        if node.func.attr == "open":
            mode = node.args[0] if node.args else ast.Constant("r")
            is_text = isinstance(mode, ast.Constant) and mode.value in ("r", "w", "a", "x", "r+", "w+", "a+")
        if is_text and not any(keyword.arg in ("encoding", "mode") for keyword in node.keywords):
            found.append(f"{name}:{node.lineno}")
    return found


def test_every_text_file_has_the_encoding_that_the_code_names():
    paths = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
    assert [line for path in paths for line in without_encoding(path.read_text(), str(path.relative_to(ROOT)))] == []
    assert without_encoding("p.open()\np.open('rb')\np.read_text(encoding='utf-8')\np.write_text('x')", "a") == [
        "a:1",
        "a:4",
    ]


def test_the_five_files_of_a_step_stay_short():
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## A step in five files")[2].partition("\n## ")[0]
    files = re.findall(r"^\d\. `(\S+\.py)`", text, flags=re.MULTILINE)
    assert len(files) == 5
    assert sum((ROOT / file).read_text().count("\n") for file in files) <= 600


if __name__ == "__main__":
    edges = without_packages(graph({name: found for name, found in project().items() if name.startswith("scfm_core")}))
    for module in graphlib.TopologicalSorter(edges).static_order():
        names = ", ".join(sorted(name.removeprefix("scfm_core.") for name in edges[module]))
        print(f"{module.removeprefix('scfm_core.'):32} {names}")
