"""Configurations from YAML and overrides, and back to YAML; unknown keys are errors."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from scfm_core.data.recipe import DataConfig
from scfm_core.data.source import guess_format
from scfm_core.data.uri import is_remote
from scfm_core.errors import UserError
from scfm_core.train.config import RunConfig
from scfm_core.train.rules import broken_rules

_REMOVED_KEYS = (("model", "family"),)
"""Keys of earlier versions; stored configurations may still have them."""


def load_config(path: str | Path, overrides: Sequence[str] = (), *, stored: bool = False) -> RunConfig:
    """Read a recipe and apply overrides.

    Args:
        path: a YAML file; a bare name is also looked up among the shipped recipes.
        overrides: `section.key=value`, with the value in YAML; `section=FILE.yaml` replaces a whole section.
        stored: the file is the stored configuration of a run, maybe of an earlier version.

    Raises:
        UserError: it names the key, what is wrong, and the nearest existing key.
    """
    tree = _read_section_files(_read_yaml(find_recipe(path)))
    if stored:
        tree = without_removed_keys(tree)
    for override in overrides:
        _apply_override(tree, override)
        _read_section_files(tree)
    return parse_config(tree, source=str(path))


def without_removed_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration without the keys that this version no longer has."""
    return {
        section: {key: value for key, value in keys.items() if (section, key) not in _REMOVED_KEYS}
        if isinstance(keys, Mapping)
        else keys
        for section, keys in tree.items()
    }


def load_data_config(source: str, overrides: Sequence[str], changes: Mapping[str, Any]) -> DataConfig:
    """A data recipe without a run: from a YAML file, or for a folder, an address or shards.

    Args:
        source: a `.yaml` file; or a path or address, whose content determines the format.
        overrides: `data.key=value`.
        changes: values of keys.

    Raises:
        UserError: as in `load_config`.
    """
    if source.endswith((".yaml", ".yml")):
        tree = _read_section_files({"data": source})
    else:
        name = Path(source.rstrip("/")).name.partition(".")[0]
        known = {"name": re.sub(r"[^\w.-]", "_", name) or "data", "uri": source, "format": guess_format(source)}
        tree = {"data": {"sources": [known], "num_workers": 0}}
    tree["data"] |= changes
    for override in overrides:
        if not override.startswith("data."):
            raise UserError(f"override {override!r} is not of the form data.key=value")
        _apply_override(tree, override)
    _check_keys(_DataOnly, tree, "", source)
    try:
        return TypeAdapter(_DataOnly).validate_python(_translate_none(_DataOnly, tree)).data
    except ValidationError as error:
        lines = dict.fromkeys(_explain_error(item) for item in error.errors())
        raise UserError(f"{source} is not a valid data recipe:\n" + "\n".join(lines)) from None


@dataclass(frozen=True, kw_only=True)
class _DataOnly:
    data: DataConfig


def _read_section_files(tree: dict[str, Any]) -> dict[str, Any]:
    """Read sections that are given as the name of a file: `data: recipes/data/digits.yaml`."""
    shipped = Path(__file__).parents[2] / "recipes" / "data"
    for section, value in tree.items():
        if isinstance(value, str) and value.endswith((".yaml", ".yml")):
            path = next((p for p in (Path(value), shipped / value) if p.is_file()), None)
            if path is None:
                known = f". Shipped data recipes: {', '.join(sorted(p.name for p in shipped.glob('*.yaml')))}"
                raise UserError(f"{section}: there is no file {value!r}{known if section == 'data' else ''}")
            tree[section] = _read_yaml(path)
    return tree


def parse_config(tree: Mapping[str, Any], source: str) -> RunConfig:
    """Build the typed configuration from plain values; UserError as in `load_config`."""
    _check_keys(RunConfig, tree, "", source)
    try:
        config = TypeAdapter(RunConfig).validate_python(_translate_none(RunConfig, tree))
        lines = [f"  {rule}" for rule in broken_rules(config)]
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain_error(item) for item in error.errors()))
    if lines:  # not raised in `except`: pydantic's error prints the input, where an address may contain a password
        raise UserError(f"{source} is not a valid configuration:\n" + "\n".join(lines))
    return config


def _explain_error(item: Any) -> str:
    """One of pydantic's errors as a line: the key, the expected value, the given value."""
    # Some parts of pydantic's location, such as members of a union, are not keys.
    parts = [
        str(part) for part in item["loc"] if not str(part).endswith("]") and str(part) not in ("float", "int", "str")
    ]
    message, got = item["msg"].removeprefix("Value error, "), f" (got {item['input']!r})"
    if item["type"] == "missing" and parts[-1] in ("0", "1"):
        parts.pop()
        message = "needs a list of two, such as [512, 512]"
    elif item["type"] == "tuple_type":
        message = "needs a list in brackets, such as [1, 2]"
    elif item["type"] == "dataclass_type":
        section = ".".join(parts)
        message = f"is a section: set its keys, such as {section}.{_keys_of(section)[0]}=..."
    elif item["type"] in ("missing", "value_error"):
        got = ""
    if "://" in got or "@" in got:
        got = ""  # an address, which may contain a password
    where = ".".join(parts)
    if not where or message.startswith(f"{parts[0]}."):  # messages of our own checks begin with the key
        return f"  {message}{got}"
    return f"  {where}: {message}{got}"


def _keys_of(section: str) -> list[str]:
    """The keys of a section, which may be nested, by its dotted name."""
    cls: Any = RunConfig
    for part in section.split("."):
        if not part.isdigit():
            cls = _dataclass_in(typing.get_type_hints(cls)[part])
    return list(typing.get_type_hints(cls))


def to_plain(config: Any) -> dict[str, Any]:
    """The configuration as plain values, as stored in `config.yaml`."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return dict(plain(dataclasses.asdict(config)))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, usable from any working directory: paths that exist, or will be created, become absolute."""

    def absolute(path: Any) -> Any:
        here = Path(path).expanduser() if isinstance(path, str) else None
        return str(here.resolve()) if here is not None and here.exists() else path

    evaluate = {name: absolute(getattr(config.evaluate, name)) for name in ("prompts", "features_path", "clip_path")}
    if config.evaluate.keep is not None:
        evaluate["keep"] = str(Path(config.evaluate.keep).expanduser().absolute())
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=absolute(config.model.path)),
        data=_with_absolute_data(config.data),
        engine=dataclasses.replace(config.engine, deepspeed_config=absolute(config.engine.deepspeed_config)),
        sample=dataclasses.replace(config.sample, prompts=absolute(config.sample.prompts)),
        evaluate=dataclasses.replace(config.evaluate, **evaluate),
    )


def _with_absolute_data(data: DataConfig) -> DataConfig:
    def anchored(uri: str) -> str:  # also if it does not exist: it may have braces, or be created later
        return uri if is_remote(uri) else str(Path(uri).expanduser().absolute())

    sources = tuple(
        dataclasses.replace(source, uri=anchored(source.uri), manifest=source.manifest and anchored(source.manifest))
        for source in data.sources
    )
    cache = dataclasses.replace(data.cache, dir=anchored(data.cache.dir))
    return dataclasses.replace(data, path=data.path and anchored(data.path), sources=sources, cache=cache)


def dump_config(config: RunConfig) -> str:
    """YAML text that `load_config` reads back to the same configuration."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)


def find_recipe(path: str | Path, folder: str = "") -> Path:
    """`path` itself, or the shipped recipe of that name.

    Args:
        path: a file, or the name of a shipped recipe, with or without `.yaml`.
        folder: subfolder of recipes/configs: `study` for studies.

    Raises:
        UserError: if neither exists; it names similar recipes.
    """
    shipped = Path(__file__).parents[2] / "recipes" / "configs" / folder
    for candidate in (Path(path), shipped / path, shipped / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(p.name for p in shipped.glob("*.yaml"))
    near = difflib.get_close_matches(Path(path).name, names, n=3) or names
    raise UserError(f"there is no configuration file {str(path)!r}. Shipped recipes: {', '.join(near)}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections of keys, but holds {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {override!r} is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, list):
            node = _list_member(node, parent, override)
            continue
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, (dict, list)):
            raise UserError(f"override {override!r}: {parent} is not a section")
        node = child
    if isinstance(node, list):
        _list_member(node, last, override)
        node[int(last)] = value
    else:
        node[last] = value


def _list_member(items: list[Any], place: str, override: str) -> Any:
    """The member of a list with the number `place`, as in `data.sources.0`."""
    if not place.isdigit() or int(place) >= len(items):
        raise UserError(f"override {override!r}: a list of {len(items)} has no member {place!r}; the first is 0")
    return items[int(place)]


def _translate_none(cls: Any, tree: Any) -> Any:
    """Translate `none` to None where the field may be None; YAML itself only knows `null`."""
    if not isinstance(tree, Mapping):
        return tree
    hints = typing.get_type_hints(cls)
    translated = {}
    for key, value in tree.items():
        if value == "none" and types.NoneType in typing.get_args(hints[key]):
            value = None
        nested = _dataclass_in(hints[key])
        if nested is None:
            translated[key] = value
        elif isinstance(value, list):
            translated[key] = [_translate_none(nested, item) for item in value]
        else:
            translated[key] = _translate_none(nested, value)
    return translated


def _dataclass_in(annotation: Any) -> Any:
    """The dataclass in `X`, `X | None` or `tuple[X, ...]`, or None."""
    several = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is tuple
    options = typing.get_args(annotation) if several else (annotation,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _check_keys(cls: Any, tree: Any, prefix: str, source: str) -> None:
    if not isinstance(tree, Mapping):
        return  # a wrong type is reported by the type check
    hints = typing.get_type_hints(cls)
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(hints)}"
            raise UserError(f"{source}: unknown key {prefix}{key}; {hint}")
        if isinstance(value, bool) and bool not in (hints[key], *typing.get_args(hints[key])):
            raise UserError(f"{source}: {prefix}{key} must not be true or false (got {value})")
        nested = _dataclass_in(hints[key])
        if nested is not None and isinstance(value, list):
            for number, item in enumerate(value):
                _check_keys(nested, item, f"{prefix}{key}.{number}.", source)
        elif nested is not None:
            _check_keys(nested, value, f"{prefix}{key}.", source)
