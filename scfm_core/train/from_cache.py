"""Settings that a run takes from its cache of latents, because they are facts of the cache: size and text length."""

import json
from pathlib import Path
from typing import Any

from scfm_core.data.recipe import SourceConfig
from scfm_core.data.schema import MANIFEST
from scfm_core.data.uri import is_remote
from scfm_core.train.draft import Draft

KEYS = ("data.resolution", "data.buckets", "data.bucket_step", "model.text_length")


def fill_from_caches(draft: Draft) -> None:
    """Set those of `KEYS` that nothing else has set, if all sources that are caches on this machine agree on the value.

    A manifest in object storage is not read here: a dry run works without a network.
    """
    found = [(path, settings) for path in _manifests(draft.tree.get("data")) if (settings := _settings(path))]
    for key in KEYS:
        values = [settings.get(key) for _, settings in found]
        if values and values[0] is not None and all(value == values[0] for value in values):
            draft.fill(tuple(key.split(".")), values[0], f"in {found[0][0]}")


def _manifests(data: Any) -> list[Path]:
    """The manifests of the local sources of a data section, which may hold any values."""
    if not isinstance(data, dict):
        return []
    sources = data.get("sources") or []
    members = sources if isinstance(sources, list) else []
    places = [
        (data.get("path"), None),
        *((member.get("uri"), member.get("split")) for member in members if isinstance(member, dict)),
    ]
    local = [
        Path(place).expanduser() / (split if isinstance(split, str) else "")
        for place, split in places
        if isinstance(place, str) and not is_remote(place)
    ]
    return [path for folder in local if (path := folder / MANIFEST).is_file()]


def is_without_text(source: SourceConfig) -> bool:
    """Whether a source on this machine is a cache of latents alone: then the run encodes its captions."""
    manifests = _manifests({"sources": [{"uri": source.uri, "split": source.split}]})
    return any(head.get("encoder") is not None and head.get("fields") == {} for head in map(_read, manifests))


def _settings(path: Path) -> dict[str, Any]:
    """The settings with which a cache was made; none of other data."""
    settings = _read(path).get("settings")
    return settings if isinstance(settings, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    """The content of a manifest; empty if it is damaged, which is reported later."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
