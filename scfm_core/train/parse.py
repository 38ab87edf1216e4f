"""Configurations from YAML and overrides, and back to YAML. All mistakes are reported at once."""

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
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
from scfm_core.train.draft import COMMAND_LINE, Draft, Keys
from scfm_core.train.from_cache import fill_from_caches
from scfm_core.train.keys import all_keys, dataclass_in, hints_of, nearest_keys
from scfm_core.train.rules import broken_rules

_REMOVED_KEYS = (("model", "family"),)
"""Keys of earlier versions; stored configurations may still have them."""
_LISTS = {"buckets": "[[512,512],[448,576]]", "adapters": "[{path: style.safetensors, weight: 0.8}]"}
"""Examples of lists in messages, by key."""


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, stored: bool = False, place: str = COMMAND_LINE
) -> RunConfig:
    """Read a recipe and apply overrides.

    Args:
        path: a YAML file; a bare name is also looked up among the shipped recipes.
        overrides: `section.key=value`, with the value in YAML; `section=FILE.yaml` replaces a whole section.
        stored: the file is the stored configuration of a run, maybe of an earlier version.
        place: where the overrides are, for messages.

    Raises:
        UserError: it lists every mistake, with the file and line, or that it is on the command line, and the nearest existing key.
    """
    return check_run(read_draft(path, overrides, stored=stored, place=place))


def read_draft(
    path: str | Path, overrides: Sequence[str] = (), *, stored: bool = False, place: str = COMMAND_LINE
) -> Draft:
    """The plain values of a recipe with overrides, and where each came from; arguments and errors as `load_config`."""
    draft = Draft.read(find_recipe(path))
    draft.override_place = place
    if stored:
        draft.tree = without_removed_keys(draft.tree)
    for override in overrides:
        draft.override(override)
    fill_from_caches(draft)
    return draft


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
        draft = Draft({"data": source}, COMMAND_LINE)
        draft.read_section_file("data")
        draft.place = f"in {source}"
    else:
        name = Path(source.rstrip("/")).name.partition(".")[0]
        known = {"name": re.sub(r"[^\w.-]", "_", name) or "data", "uri": source, "format": guess_format(source)}
        draft = Draft({"data": {"sources": [known], "num_workers": 0}}, COMMAND_LINE)
    draft.tree.get("data", {}).update(changes)
    for override in overrides:
        key = override.partition("=")[0]
        if key.startswith("data."):
            draft.override(override)
        else:
            meant = f"; did you mean data.{override}?" if f"data.{key}" in all_keys() else ""
            draft.mistakes.append(f"{COMMAND_LINE}: override {override!r} is not of the form data.key=value{meant}")
    found = _build(_DataOnly, draft)
    raise_mistakes(draft.mistakes)
    assert found is not None
    return found.data


@dataclass(frozen=True, kw_only=True)
class _DataOnly:
    data: DataConfig


def parse_config(tree: Mapping[str, Any], source: str) -> RunConfig:
    """Build the typed configuration from plain values; UserError as in `load_config`."""
    return check_run(Draft(tree, f"in {source}"))


def check_run(draft: Draft) -> RunConfig:
    """The typed configuration of a draft, checked with all rules; UserError as in `load_config`."""
    config = _build(RunConfig, draft)
    if config is not None:
        for rule in broken_rules(config):
            keys = _keys_in(rule)
            if not any(_related(each, draft.refused) for each in keys):
                draft.mistakes.append(f"{_place_of(keys, draft)}: {rule}")
    raise_mistakes(draft.mistakes)
    assert config is not None
    return config


def _build(cls: Any, draft: Draft) -> Any:
    """The typed values of a draft; None if that is impossible. Adds every mistake to the draft.

    The check of a section ends at its first mistake. So a wrong value is removed from the draft, and the rest is checked
    again. What the removal itself causes is not reported.
    """
    draft.tree = _known_keys_of(cls, draft.tree, (), draft)
    while True:
        try:
            return _adapter(cls).validate_python(_translate(cls, draft.tree))
        except ValidationError as error:
            # Not the error itself: it prints the input, where an address may contain a password.
            found = _merge([_explain_error(item) for item in error.errors()])
        found = [(keys, message) for keys, message in found if not any(_related(key, draft.refused) for key in keys)]
        for keys, message in found:
            draft.mistakes.append(f"{_place_of(keys, draft)}: {message}")
        for keys, _ in found:
            for key in keys:
                draft.drop(key)
        if not found and not _fill_required(cls, draft):
            return None


def _fill_required(cls: Any, draft: Draft) -> bool:
    """Give required keys that are missing or were wrong any value, so that the rest can be checked; whether there were some."""
    filled = False
    for section, key in (("run", "dir"), ("model", "path"), ("data", "path")):
        keys = draft.tree.setdefault(section, {}) if section in hints_of(cls) else None
        if isinstance(keys, dict) and key not in keys and "sources" not in keys:
            keys[key] = "."
            filled = True
    return filled


def _merge(errors: Sequence[tuple[tuple[Keys, ...], str]]) -> list[tuple[tuple[Keys, ...], str]]:
    """Make one error of those for the members of a union: `must be a valid number or 'dynamic' (got 'x')`."""
    merged: dict[tuple[Keys, ...], str] = {}
    for keys, message in dict.fromkeys(errors):
        earlier, _, got = merged.get(keys, "").partition(" (got")
        if ": must be " in earlier and ": must be " in message:
            merged[keys] = f"{earlier} or {message.partition(': must be ')[2].partition(' (got')[0]} (got{got}"
        else:
            merged[keys] = message
    containers = {keys[0][:length] for keys in merged for length in range(2, len(keys[0]))}
    return [(keys, message) for keys, message in merged.items() if keys[0] not in containers]


def raise_mistakes(mistakes: Sequence[str]) -> None:
    """Raise all mistakes as one UserError, if there are any."""
    lines = list(dict.fromkeys(mistakes))
    if len(lines) == 1:
        raise UserError(lines[0])
    if lines:
        raise UserError(f"{len(lines)} mistakes in the configuration:\n  " + "\n  ".join(lines))


def _related(keys: Keys, others: Collection[Keys]) -> bool:
    """Whether a value is one of the others, contains one, or is in one."""
    return any(keys[: len(other)] == other[: len(keys)] for other in others)


def _place_of(keys: Sequence[Keys], draft: Draft) -> str:
    """Where to mend a mistake that these values make together: an override, else a file."""
    places = [place for each in keys if (place := draft.where(each))]
    return next((place for place in places if place == draft.override_place), places[0] if places else draft.place)


def _explain_error(item: Any) -> tuple[tuple[Keys, ...], str]:
    """One of pydantic's errors: the values that it is about, and a message with key, expected value and given value."""
    # Some parts of pydantic's location, such as members of a union, are not keys.
    parts = [
        str(part) for part in item["loc"] if not str(part).endswith("]") and str(part) not in ("float", "int", "str")
    ]
    message, given = item["msg"].removeprefix("Value error, "), item["input"]
    got = (
        "" if any(sign in str(given) for sign in ("://", "@")) else f" (got {given!r})"
    )  # an address may contain a password
    if item["type"] == "missing" and parts[-1] in ("0", "1"):
        parts.pop()
        message = "needs two values, such as " + ",".join([str(given[0] if given else 512)] * 2)
    elif item["type"] == "tuple_type":
        message = "needs a list, such as " + _LISTS.get(parts[-1], "[1,2]")
    elif item["type"] == "dataclass_type":
        section = ".".join(parts)
        first, *others = _keys_of(section)
        value = given if got and (not others or section in ("run", "model", "data")) else "..."
        message = f"is a section: set its keys, such as {section}.{first}={value}"
    elif item["type"] == "missing":
        message, got = "is required", ""
    elif item["type"] == "value_error":
        got = ""
    message = message.partition(", unable to parse")[0].replace("Input should be", "must be")
    where, keys = ".".join(parts), _keys_in(message)
    if not keys or any(part.isdigit() for part in parts):
        keys = (tuple(parts), *keys)
    if not where or message.startswith(
        (f"{parts[0]}.", f"{parts[0]} ")
    ):  # messages of our own checks begin with the key
        return keys, f"{message}{got}"
    return keys, f"{where}: {message}{got}"


def _keys_in(message: str) -> tuple[Keys, ...]:
    """The keys that a message names."""
    found = re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+", message)
    return tuple(dict.fromkeys(tuple(name.split(".")) for name in found if name in all_keys()))


def _keys_of(section: str) -> list[str]:
    """The keys of a section, which may be nested, by its dotted name."""
    cls: Any = RunConfig
    for part in section.split("."):
        if not part.isdigit():
            cls = dataclass_in(hints_of(cls)[part])
    return list(hints_of(cls))


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

    paths = ("prompts", "features_path", "clip_path", "cmmd_path", "pick_score_path")
    evaluate = {name: absolute(getattr(config.evaluate, name)) for name in paths}
    evaluate["data"] = config.evaluate.data and _anchored(config.evaluate.data)
    if config.evaluate.keep is not None:
        evaluate["keep"] = str(Path(config.evaluate.keep).expanduser().absolute())
    adapters = tuple(dataclasses.replace(adapter, path=absolute(adapter.path)) for adapter in config.model.adapters)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=absolute(config.model.path), adapters=adapters),
        data=_with_absolute_data(config.data),
        engine=dataclasses.replace(config.engine, deepspeed_config=absolute(config.engine.deepspeed_config)),
        sample=dataclasses.replace(config.sample, prompts=absolute(config.sample.prompts)),
        evaluate=dataclasses.replace(config.evaluate, **evaluate),
    )


def _anchored(uri: str) -> str:
    """The absolute address of data, also if they do not exist: it may have braces, or they are made later."""
    return uri if is_remote(uri) else str(Path(uri).expanduser().absolute())


def _with_absolute_data(data: DataConfig) -> DataConfig:
    sources = tuple(
        dataclasses.replace(source, uri=_anchored(source.uri), manifest=source.manifest and _anchored(source.manifest))
        for source in data.sources
    )
    cache = dataclasses.replace(data.cache, dir=data.cache.dir and _anchored(data.cache.dir))
    return dataclasses.replace(data, path=data.path and _anchored(data.path), sources=sources, cache=cache)


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


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _known_keys_of(cls: Any, tree: Any, keys: Keys, draft: Draft) -> Any:
    """The tree without unknown keys and misplaced booleans, which are mistakes."""
    if not isinstance(tree, Mapping):
        return tree  # a wrong type is reported by the type check
    hints, known = hints_of(cls), {}
    for name, value in tree.items():
        here = (*keys, str(name))
        if name not in hints:
            draft.add_mistake(_explain_unknown(here, list(hints), draft), here)
        elif isinstance(value, bool) and bool not in (hints[name], *typing.get_args(hints[name])):
            draft.add_mistake(f"{'.'.join(here)} must not be true or false (got {value})", here)
            draft.refused.add(here)
        elif (nested := dataclass_in(hints[name])) is None:
            known[name] = value
        elif isinstance(value, list):
            known[name] = [_known_keys_of(nested, item, (*here, str(i)), draft) for i, item in enumerate(value)]
        else:
            known[name] = _known_keys_of(nested, value, here, draft)
    return known


def _explain_unknown(keys: Keys, siblings: list[str], draft: Draft) -> str:
    *section, name = keys
    meant = nearest_keys("".join(f"{part}." for part in section), name, siblings)
    # The value was meant for that key: its default may contradict the others, or be missing.
    draft.refused.update(key for each in meant if draft.where(key := tuple(each.split("."))) is None)
    hint = f"did you mean {' or '.join(meant)}?" if meant else f"known here: {', '.join(siblings)}"
    return f"unknown key {'.'.join(keys)}; {hint}"


def _translate(cls: Any, tree: Any) -> Any:
    """Values as pydantic needs them: `none` becomes None where the field may be None (YAML itself only knows `null`), and a
    single value, or values between commas, become a list where the field is a list."""
    if not isinstance(tree, Mapping):
        return tree
    translated: dict[str, Any] = {}
    for key, value in tree.items():
        hint = hints_of(cls)[key]
        nested = dataclass_in(hint)
        if value == "none" and types.NoneType in typing.get_args(hint):
            translated[key] = None
        elif nested is not None:
            items = isinstance(value, list)
            translated[key] = [_translate(nested, item) for item in value] if items else _translate(nested, value)
        elif typing.get_origin(hint) is tuple and isinstance(value, (str, int, float)):
            parts = [yaml.safe_load(part) for part in value.split(",")] if isinstance(value, str) else [value]
            translated[key] = parts
        else:
            translated[key] = value
    return translated
