"""The resolved configuration as YAML, with the place that set each value."""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from scfm_core.train.draft import Draft, Keys
from scfm_core.train.keys import dataclass_in, hints_of
from scfm_core.train.parse import check_run, read_draft, to_plain


def show_config(path: str, overrides: Sequence[str]) -> str:
    """A recipe with overrides and defaults, which `load_config` reads back to the same configuration.

    Each line ends with a comment: the file and line, `on the command line`, or `default`.

    Raises:
        UserError: as `load_config`.
    """
    draft = read_draft(path, overrides)
    config = check_run(draft)
    lines = list(_lines(type(config), to_plain(config), (), draft))
    width = min(max(len(text) for text, place in lines if place), 60)
    return "\n".join(f"{text:<{width}}  # {place}" if place else text for text, place in lines)


def _lines(cls: Any, values: dict[str, Any], keys: Keys, draft: Draft) -> Iterator[tuple[str, str | None]]:
    """Each line and its comment; a section's own line has none."""
    indent = "  " * len(keys)
    for name, value in values.items():
        nested, here = dataclass_in(hints_of(cls)[name]), (*keys, name)
        if nested is not None and isinstance(value, dict):
            yield f"{indent}{name}:", None
            yield from _lines(nested, value, here, draft)
        elif nested is not None and value:
            yield f"{indent}{name}:", None
            for number, item in enumerate(value):
                for line, (text, place) in enumerate(_lines(nested, item, (*here, str(number)), draft)):
                    marked = text if line else f"{text[: len(indent) + 2]}- {text[len(indent) + 4 :]}"
                    yield marked, place
        else:
            yield f"{indent}{name}: {_flow(value)}", (draft.where(here) or "default").removeprefix("in ")


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    in_brackets = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True)
    return str(in_brackets).strip()[1:-1]
