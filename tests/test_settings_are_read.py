"""Every key of a configuration and every option of a command is read by the code, and some test names it."""

import argparse
import ast
import dataclasses
import functools
import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes import cli
from scfm_core.train.config import RunConfig
from scfm_core.train.keys import dataclass_in, hints_of

ROOT = Path(__file__).resolve().parents[1]
THIS_FILE = Path(__file__).name
EVERY_FIELD = "test_every_field_is_restored"
"""It names each key by the rule that it must, so it does not show that a key is tested."""


@dataclasses.dataclass(frozen=True)
class Key:
    section: type
    name: str
    dotted: str
    """As in a recipe: `data.cache.dir`. A section of a list has no number: `data.sources.uri`."""


def keys(section: Any = RunConfig, prefix: str = "") -> Iterator[Key]:
    for field in dataclasses.fields(section):
        yield Key(section, field.name, f"{prefix}{field.name}")
        nested = dataclass_in(hints_of(section)[field.name])
        if nested is not None:
            yield from keys(nested, f"{prefix}{field.name}.")


class Reads:
    """Which attributes of which sections a code reads: `config.train.lr` reads `TrainConfig.lr`.

    The section of an expression comes from annotations, and from what names and attributes are assigned. Attributes of the same name are
    taken together, whatever object they belong to.
    """

    def __init__(self, sources: Iterable[str], sections: set[str]) -> None:
        self._sections = sections
        self._attributes: dict[str, set[str]] = defaultdict(set)
        self._returned: dict[str, set[str]] = defaultdict(set)
        self.found: set[tuple[str, str]] = set()
        trees = [ast.parse(source) for source in sources]
        for node in (node for tree in trees for node in ast.walk(tree)):
            if isinstance(node, ast.ClassDef):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        self._attributes[field.target.id] |= self._named(field.annotation)
            elif isinstance(node, ast.FunctionDef) and node.returns:
                self._returned[node.name] |= self._named(node.returns)
        for _ in range(2):  # the second time with the attributes that the first has found
            for tree in trees:
                self._read_body(tree, None)

    def _named(self, annotation: ast.AST) -> set[str]:
        """The sections in an annotation, which may be a text."""
        return set(re.findall(r"\w+", ast.unparse(annotation))) & self._sections

    def _read_body(self, body: ast.Module | ast.ClassDef, owner: str | None) -> None:
        for statement in body.body:
            if isinstance(statement, ast.ClassDef):
                self._read_body(statement, statement.name)
            elif not (isinstance(statement, ast.FunctionDef) and statement.name == "__post_init__"):
                self._read(statement, {"self": {owner} & self._sections if owner else set()})

    def _read(self, part: ast.stmt, names: dict[str, set[str]]) -> None:
        nodes = list(ast.walk(part))
        for node in nodes:
            if isinstance(node, ast.arg) and node.annotation:
                names[node.arg] = names.get(node.arg, set()) | self._named(node.annotation)
        for node in nodes * 2:  # the order of a walk is not that of the lines
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value, names)
            elif isinstance(node, ast.NamedExpr):
                self._assign(node.target, node.value, names)
            elif isinstance(node, ast.For | ast.comprehension):
                self._assign(node.target, node.iter, names)
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                self.found |= {(section, node.attr) for section in self._sections_of(node.value, names)}

    def _assign(self, target: ast.expr, value: ast.expr, names: dict[str, set[str]]) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=False):
                self._assign(one, other, names)
        elif isinstance(target, ast.Name):
            names[target.id] = names.get(target.id, set()) | self._sections_of(value, names)
        elif isinstance(target, ast.Attribute):
            self._attributes[target.attr] |= self._sections_of(value, names)

    def _sections_of(self, value: ast.expr, names: Mapping[str, set[str]]) -> set[str]:
        match value:
            case ast.Name(id=name):
                return names.get(name, set())
            case ast.Attribute(attr=name):
                return self._attributes[name] | self._returned[name]
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=arguments):
                copied = self._sections_of(arguments[0], names) if name == "replace" and arguments else set()
                return copied | self._returned[name] | ({name} & self._sections)
            case ast.Subscript(value=inner):
                return self._sections_of(inner, names)
            case ast.BoolOp(values=parts):
                return set[str]().union(*(self._sections_of(part, names) for part in parts))
            case ast.IfExp(body=one, orelse=other):
                return self._sections_of(one, names) | self._sections_of(other, names)
        return set()


def product() -> list[Path]:
    return [path for package in ("scfm_core", "recipes", "data_tools") for path in (ROOT / package).rglob("*.py")]


def test_every_key_is_read():
    sources = [path.read_text(encoding="utf-8") for path in product()]
    reads = Reads(sources, {key.section.__name__ for key in keys()})
    assert len(reads.found) > 150
    unread = [key.dotted for key in keys() if (key.section.__name__, key.name) not in reads.found]
    assert unread == []


def test_reads_are_found_and_unread_keys_too():
    source = """
class Corpus:
    def __init__(self, config: DataConfig) -> None:
        self.config, self.size = config, 1

def shape(corpus: Corpus, run: "RunConfig | None") -> None:
    settings = corpus.config
    for source in settings.sources:
        source.uri
    other.sources.name
    (run or RunConfig()).train.lr

class TrainConfig:
    def __post_init__(self) -> None:
        self.steps

class RunConfig:
    train: TrainConfig

class DataConfig:
    sources: tuple[SourceConfig, ...]
"""
    found = Reads([source], {"DataConfig", "RunConfig", "TrainConfig", "SourceConfig"}).found
    assert found == {
        ("DataConfig", "sources"),
        ("SourceConfig", "uri"),
        ("SourceConfig", "name"),
        ("RunConfig", "train"),
        ("TrainConfig", "lr"),
    }


@functools.cache
def named_in_tests() -> tuple[str, set[tuple[str, str]]]:
    """The texts of tests, and the names that calls give to arguments, each with the classes that their file imports."""
    texts: list[str] = []
    arguments: set[tuple[str, str]] = set()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.name == THIS_FILE:
            continue
        nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        for node in nodes:  # grows while it is read
            nodes += [child for child in ast.iter_child_nodes(node) if getattr(child, "name", "") != EVERY_FIELD]
        texts += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        imported = [node.name for node in nodes if isinstance(node, ast.alias)]
        given = {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}
        arguments |= {(name, argument) for name in imported for argument in given}
    return "\n".join(texts), arguments


def test_every_key_is_named_by_a_test():
    """As `section.key` in a text, as an argument where the section's class is imported, or by its name alone if no other key has it."""
    text, arguments = named_in_tests()
    words = set(re.findall(r"\w+", text)) | {argument for _, argument in arguments}
    names = [key.name for key in keys()]
    unnamed = [
        key.dotted
        for key in keys()
        if not re.search(rf"\b{re.escape('.'.join(key.dotted.split('.')[-2:]))}\b", text)
        and (key.section.__name__, key.name) not in arguments
        and not (names.count(key.name) == 1 and key.name in words)
    ]
    assert unnamed == []


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for command in (command for group in groups for command in group.choices.values()):
        yield from commands(command)
    if not groups:
        yield parser


@functools.cache
def read_by(function: Any) -> set[str]:
    """The parsed arguments that a command reads: in its function, or where that hands them on."""
    tree = ast.parse(inspect.getsource(function))
    names = {
        arg.arg
        for arg in ast.walk(tree)
        if isinstance(arg, ast.arg) and arg.annotation and "Namespace" in ast.unparse(arg.annotation)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=dest) if name in names:
                found.add(dest)
            case ast.Call(func=ast.Name(id=called), args=args) if called in function.__globals__:
                if any(isinstance(arg, ast.Name) and arg.id in names for arg in args):
                    found |= read_by(function.__globals__[called])
    return found


def options() -> Iterator[tuple[argparse.ArgumentParser, argparse.Action]]:
    for parser in commands(cli._parser()):
        yield from ((parser, action) for action in parser._actions if action.dest != "help")


def test_every_option_is_read():
    unread = [
        f"{parser.prog}: {action.dest}"
        for parser, action in options()
        if action.dest not in read_by(parser.get_default("run"))
    ]
    assert unread == []


def test_every_option_of_a_script_is_read():
    """Of `python -m recipes.NAME`."""
    scripts = {path.name: text for path in product() if "parse_args()" in (text := path.read_text(encoding="utf-8"))}
    assert {"demo.py", "style.py"} <= scripts.keys()
    for name, text in scripts.items():
        dests = [word.lstrip("-").replace("-", "_") for word in re.findall(r'add_argument\(\s*"([^"]+)"', text)]
        assert dests and [dest for dest in dests if not re.search(rf"\.{dest}\b", text)] == [], name


def test_every_option_is_named_by_a_test():
    """Or by a script of slurm/, all of which tests run."""
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "slurm").glob("*.sh")]
    words = set(re.findall(r"(?<![\w-])--?\w[\w-]*", "\n".join([named_in_tests()[0], *scripts])))
    unnamed = [
        f"{parser.prog}: {action.option_strings}"
        for parser, action in options()
        if action.option_strings and not words & set(action.option_strings)
    ]
    assert unnamed == []
