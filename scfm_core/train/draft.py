"""A configuration before it is checked: plain values from files and from the command line, and where each came from."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from scfm_core.errors import UserError

Keys = tuple[str, ...]
"""Path of a value: `("data", "sources", "0", "uri")`."""

COMMAND_LINE = "on the command line"
_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""PyYAML's own parser takes eight times as long as libyaml's, which its wheels have."""
_SHIPPED = Path(__file__).parents[2] / "recipes"


class Draft:
    """Plain values, and the mistakes that were found so far.

    Args:
        tree: sections of keys.
        place: where they come from, as part of a sentence: `in my_recipe.yaml`.
    """

    def __init__(self, tree: Mapping[str, Any], place: str) -> None:
        self.tree: dict[str, Any] = dict(tree)
        self.place = place
        self.mistakes: list[str] = []
        self.refused: set[Keys] = set()
        """Values that were wrong; they are removed from the tree, so that the others can be checked."""
        self.override_place = COMMAND_LINE
        """Where the overrides are."""
        self._places: dict[Keys, str] = {}

    @classmethod
    def read(cls, path: Path) -> "Draft":
        """Read a YAML file, and the files that it names as sections: `data: recipes/data/digits.yaml`.

        Raises:
            UserError: if a file is not YAML. A key that is given twice is one of `mistakes`.
        """
        draft = cls({}, f"in {_shown(path)}")
        draft._set_file((), path)
        for section in list(draft.tree):
            draft.read_section_file(section)
        return draft

    def where(self, keys: Keys) -> str | None:
        """The place that set a value; None if nothing set it, so that it has its default."""
        node: Any = self.tree
        for key in keys:
            if isinstance(node, list) and key.isdigit() and int(key) < len(node):
                node = node[int(key)]
            elif isinstance(node, Mapping) and key in node:
                node = node[key]
            elif isinstance(node, (list, Mapping)):
                return None
            else:
                break  # within a single value
        around = (self._places[keys[:length]] for length in range(len(keys), 0, -1) if keys[:length] in self._places)
        below = (place for known, place in self._places.items() if known[: len(keys)] == keys)
        return next(around, None) or next(below, self.place)

    def fill(self, keys: Keys, value: Any, place: str) -> None:
        """Set a value that nothing has set yet.

        Args:
            keys: section and key.
            value: a plain value.
            place: where it comes from, as part of a sentence.
        """
        section, key = keys
        node = self.tree.setdefault(section, {})
        if isinstance(node, dict) and key not in node:
            node[key] = value
            self._places[keys] = place

    def add_mistake(self, message: str, keys: Keys) -> None:
        """Remember a mistake in a value."""
        self.mistakes.append(f"{self.where(keys) or self.place}: {message}")

    def drop(self, keys: Keys) -> None:
        """Remove a wrong value. A member of a list takes its list with it."""
        self.refused.add(keys)
        node: Any = self.tree
        for depth, key in enumerate(keys[:-1]):
            child = node.get(key)
            if not isinstance(child, dict):
                keys = keys[: depth + 1]
                break
            node = child
        node.pop(keys[-1], None)

    def override(self, text: str) -> None:
        """Apply an override. One that cannot be applied is one of `mistakes`.

        Args:
            text: `section.key=value`, with the value in YAML; `section=FILE.yaml` replaces a whole section.
        """
        key, equals, value = text.partition("=")
        keys = tuple(key.strip().split("."))
        try:
            if not equals or not all(keys) or any(" " in part for part in keys):
                raise UserError(f"override {text!r} is not of the form section.key=value, without spaces around '='")
            self._put(keys, _parse_value(text, value), text)
            self._forget(keys)
            self._places[keys] = self.override_place
            if len(keys) == 1:
                self.read_section_file(key.strip())
        except UserError as error:
            self.mistakes.append(f"{self.override_place}: {error}")
            self.refused.add(keys)

    def _put(self, keys: Keys, value: Any, text: str) -> None:
        *parents, last = keys
        node: Any = self.tree
        for parent in parents:
            if isinstance(node, list):
                node = _list_member(node, parent, text)
                continue
            if parent.isdigit():
                raise UserError(
                    f"override {text!r}: there is no list with a member {parent} to change; give the whole list"
                )
            child = node.setdefault(parent, {})
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, (dict, list)):
                raise UserError(f"override {text!r}: {parent} is not a section")
            node = child
        if isinstance(node, list):
            _list_member(node, last, text)
            node[int(last)] = value
        else:
            node[last] = value

    def read_section_file(self, section: str) -> None:
        """Read a section that is given as the name of a file."""
        name = self.tree[section]
        if not (isinstance(name, str) and name.endswith((".yaml", ".yml"))):
            return
        path = next((path for path in (Path(name), _SHIPPED / "data" / name) if path.is_file()), None)
        if path is None:
            shipped = ", ".join(sorted(path.name for path in (_SHIPPED / "data").glob("*.yaml")))
            hint = f". Shipped data recipes: {shipped}" if section == "data" else ""
            self.add_mistake(f"{section}: there is no file {name!r}{hint}", (section,))
            self.drop((section,))
            return
        try:
            self._set_file((section,), path)
        except UserError as error:
            self.add_mistake(str(error), (section,))
            self.drop((section,))

    def _set_file(self, keys: Keys, path: Path) -> None:
        """Replace the values at `keys` with those of a file."""
        tree, lines, repeated = _read_yaml(path)
        name = _shown(path)
        self._forget(keys)
        if keys:
            self.tree[keys[0]] = tree
        else:
            self.tree = tree
        self._places |= {(*keys, *below): f"in {name}, line {line}" for below, line in lines.items()}
        self.mistakes += [
            f"in {name}, line {line}: {'.'.join((*keys, *below))} is given twice" for below, line in repeated
        ]

    def _forget(self, keys: Keys) -> None:
        """Forget the places of a value and of all below it."""
        self._places = {known: place for known, place in self._places.items() if known[: len(keys)] != keys}


def _shown(path: Path) -> str:
    """A file in messages: a shipped one by its name."""
    return path.name if path.is_absolute() and path.is_relative_to(_SHIPPED) else str(path)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Keys, int], list[tuple[Keys, int]]]:
    """Values of a file; the line of each, by its path; and path and line of keys that repeat an earlier one."""
    try:
        text = path.read_text(encoding="utf-8")
        tree, root = _parsed(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections of keys, but holds {type(tree).__name__}")
    lines: dict[Keys, int] = {}
    repeated = []
    for keys, line in _lines(root, ()):
        if keys in lines and "<<" not in keys:
            repeated.append((keys, line))
        lines[keys] = line
    return tree, lines, repeated


def _parsed(text: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML document, and its tree of nodes, which know their lines."""
    try:
        return _LOADER(text).get_single_data(), _LOADER(text).get_single_node()
    except yaml.YAMLError:
        return yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)  # raises, and shows the place in the text


def _lines(node: Any, keys: Keys) -> Iterator[tuple[Keys, int]]:
    """Path and line of each value below a node of YAML."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*keys, str(key.value))
            yield below, key.start_mark.line + 1
            yield from _lines(value, below)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            below = (*keys, str(number))
            yield below, item.start_mark.line + 1
            yield from _lines(item, below)


def _parse_value(text: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        if value.count("[") > value.count("]") or value.count("{") > value.count("}"):
            raise UserError(
                f"the value of override {text!r} has no closing bracket. Write it without spaces, or in quotes: "
                f"'{text.partition('=')[0]}=[1, 2]'"
            ) from error
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(
            f"the value of override {text!r} is not valid YAML ({problem}); put text into quotes"
        ) from error


def _list_member(items: list[Any], place: str, text: str) -> Any:
    """The member of a list with the number `place`, as in `data.sources.0`."""
    if not place.isdigit() or int(place) >= len(items):
        raise UserError(f"override {text!r}: a list of {len(items)} has no member {place!r}; the first is 0")
    return items[int(place)]
