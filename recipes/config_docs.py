"""`python -m recipes.config_docs`: write docs/configuration.md from the docstrings of the configuration."""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scfm_core.train.config import RunConfig
from scfm_core.train.keys import dataclass_in, hints_of

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

_BAR = "\\|"  # in a cell of a table
_INTRODUCTION = """\
# Every setting

`python -m recipes.config_docs` makes this page from the docstrings of the settings; a test compares them. A recipe is a YAML file
with these sections; [recipes.md](recipes.md) lists the shipped ones. A key without a default is required.

```bash
scfm train flux_dev_lora.yaml train.steps=1500 sample.steps=1,2,4    # a list needs no brackets
scfm train flux_dev_lora.yaml data=my_data.yaml                      # a file for a whole section
scfm train flux_dev_lora.yaml --show-config                          # all values, and where each comes from
```

`none` (or YAML's `null`) is no value. All mistakes of a configuration are reported at once, each with its file and line.
"""


def page() -> str:
    """The page's text."""
    sections = [_INTRODUCTION]
    for name, cls in hints_of(RunConfig).items():
        sections += _section(name, cls, 2)
    return "\n".join(sections)


def _section(name: str, cls: Any, level: int) -> Iterator[str]:
    """A heading, a table of keys, and the nested sections."""
    summary = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
    yield f"{'#' * level} {name}\n"
    yield f"{summary}\n"
    yield "| key | type | default | |\n|---|---|---|---|"
    texts, nested = key_texts(cls), []
    for field in dataclasses.fields(cls):
        hint = hints_of(cls)[field.name]
        inner = dataclass_in(hint)
        kind = _type(hint)
        if inner is not None:
            several = typing.get_origin(hint) is tuple
            nested.append((f"{name}.{field.name}" + (".N" if several else ""), inner))
            kind = "list of sections" if several else "section"
        yield f"| `{field.name}` | {kind} | {_default(field)} | {texts[field.name].replace('|', _BAR)} |"
    yield ""
    for title, inner in nested:
        yield from _section(title, inner, level + 1)


def key_texts(cls: Any) -> dict[str, str]:
    """The docstring under each field of a section.

    Raises:
        ValueError: if a field has none.
    """
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)):
                raise ValueError(f"{cls.__name__}.{statement.target.id} has no docstring")
            found[statement.target.id] = " ".join(str(following.value.value).split())
    return found


def _type(hint: Any) -> str:
    """A type in words: `int`, `2 numbers`, `one of a, b`."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_type(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        first, *others = typing.get_args(hint)
        many = {int: "integers", float: "numbers", str: "texts"}.get(first, f"({_type(first)})")
        return f"list of {many}" if others == [...] else f"{1 + len(others)} {many}"
    if dataclasses.is_dataclass(hint):
        return "section"
    if hint is types.NoneType:
        return "`none`"
    words = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
    return words.get(hint) or "weights by name"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return ""
    if value is None:
        return "`none`"
    if isinstance(value, float):
        return f"`{value:g}`" if float(f"{value:g}") == value else f"`{value!r}`"
    shown = yaml.safe_dump([list(value) if isinstance(value, tuple) else value], default_flow_style=True, width=1000)
    return f"`{shown.strip()[1:-1]}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")
