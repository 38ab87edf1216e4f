"""Reading of a manifest: from a folder or an address, from the index that the machine shares, or from that of MDS."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scfm_core.data.index import VERSION, ShardIndex
from scfm_core.data.machine import Arrays, MachineFiles
from scfm_core.data.mds import INDEX, MdsIndex
from scfm_core.data.recipe import SourceConfig
from scfm_core.data.remote import MissingObject, fetch, read
from scfm_core.data.schema import MANIFEST, Manifest
from scfm_core.data.uri import is_remote, join, parent
from scfm_core.errors import UserError
from scfm_core.files import file_sha256

_LARGE = 1 << 20
"""Bytes of a manifest whose index is worth a file that the machine shares: a smaller one is parsed in some 20 ms."""


def read_manifest(
    config: SourceConfig, base: str, index: MdsIndex | None, timeout: float, files: MachineFiles | None
) -> Manifest:
    """The manifest of a source.

    Args:
        config: of the source.
        base: its folder or address.
        index: of MDS, which needs no manifest.
        timeout: seconds for each file.
        files: of the machine. None: it is parsed by this process.

    Raises:
        UserError: if it is missing or damaged, or lists other shards than `index`.
    """
    where = config.manifest or join(base, MANIFEST)
    where = where if is_remote(where) else str(Path(where).expanduser())
    text = read_optional(where, timeout) if index is not None and config.manifest is None else None
    if index is not None and text is None and config.manifest is None:
        return Manifest(format="mds", shards=ShardIndex.of(index.entries))
    manifest = _parse_manifest(text, where, config, timeout, files)
    if manifest.format != config.format:
        raise UserError(
            f"data.sources ({config.name}): {where} has the format {manifest.format!r}, the recipe says {config.format!r}"
        )
    if index is not None:
        listed = [(entry.name, entry.samples, entry.bytes) for entry in manifest.index.files()]
        if listed != [(entry.name, entry.samples, entry.bytes) for entry in index.entries]:
            raise UserError(
                f"data.sources ({config.name}): {where} lists other shards than {join(base, INDEX)}. Make it again "
                f"with `scfm data index`"
            )
    return manifest


def _parse_manifest(
    text: bytes | None, where: str, config: SourceConfig, timeout: float, files: MachineFiles | None
) -> Manifest:
    """The manifest at `where`, which is read if its text is not known. Of a large one the machine shares an index."""
    found: Path | bytes | None = text
    if found is None and files is not None:
        found = _large_or_remote(where, timeout, files)
    if found is None:
        found = read_required(where, config, timeout)
    if files is None or (isinstance(found, bytes) and len(found) < _LARGE):
        assert isinstance(found, bytes)
        return Manifest.parse(found, where)
    try:
        if isinstance(found, bytes):
            content = found
            return _parse_once(lambda: content, hashlib.sha256(content).hexdigest(), where, files)
        return _parse_once(found.read_bytes, file_sha256(found), where, files)
    except OSError as error:
        raise UserError(f"data: {where} cannot be read ({error.strerror})") from error


def _parse_once(read: Callable[[], bytes], sha256: str, where: str, files: MachineFiles) -> Manifest:
    """As `Manifest.parse`, but only one process of a machine parses the text, and only once.

    Args:
        read: gives the text.
        sha256: of the text, in hex.
        where: as for `Manifest.parse`.
        files: of the machine.

    Raises:
        UserError: as `Manifest.parse`, or if the text has changed since it was hashed.
    """

    def make(step: Callable[[], None]) -> Arrays:
        text = read()
        if hashlib.sha256(text).hexdigest() != sha256:
            raise UserError(f"data: {where} was changed while it was read. Start again")
        manifest = Manifest.parse(text, where, step)
        return Arrays(manifest.index.arrays.values, {"head": json.dumps(manifest.head)})

    arrays = files.get("index", f"{VERSION}-{sha256[:32]}", make, kept=16)
    return Manifest(**json.loads(arrays.texts["head"]), shards=ShardIndex(arrays))


def _large_or_remote(where: str, timeout: float, files: MachineFiles) -> Path | bytes | None:
    """The file of a large manifest, or the text of a small remote one; None: a small local one, or a missing one."""
    if not is_remote(where):
        path = Path(where)
        return path if path.is_file() and path.stat().st_size >= _LARGE else None
    try:
        return files.fetch(where, lambda partial, left: fetch(where, partial, left), timeout, _LARGE)
    except MissingObject:
        return None


def select(manifest: Manifest, wanted: list[str], config: SourceConfig) -> Manifest:
    """The manifest of the named shards only, in the order of the names; UserError if it does not list one of them."""
    listed = {entry.name: number for number, entry in enumerate(manifest.index.files())}
    missing = [name for name in wanted if name not in listed]
    if missing:
        raise UserError(
            f"data.sources ({config.name}): {config.uri} names {len(missing)} shards that the manifest does not list, the "
            f"first is {missing[0]!r}. Correct the braces, or run `scfm data index` again"
        )
    return replace(manifest, shards=manifest.index.select([listed[name] for name in wanted]))


def read_required(where: str, config: SourceConfig, timeout: float) -> bytes:
    """Content of a file; UserError with advice if it is missing."""
    folder = parent(where)
    if not is_remote(where) and not Path(folder).is_dir():
        raise UserError(
            f"data: there is no folder {folder!r}. Correct the path. If it is to be a cache, `scfm data encode IMAGES -o {folder} "
            f"--model MODEL` makes it from a folder of images"
        )
    text = read_optional(where, timeout)
    if text is None:
        name = where.rpartition("/")[2]
        advice = (
            f"If `scfm data encode` made the shards, it did not finish: run it again. For tars of other tools run `scfm data "
            f"index {config.uri!r}`. A folder of plain images must contain no tars"
        )
        raise UserError(
            f"data: there is no {name} in {folder}. "
            + (advice if config.format == "webdataset" else "It is not an MDS data set")
        )
    return text


def read_optional(where: str, timeout: float) -> bytes | None:
    """Content of a small local or remote file; None if it does not exist. UserError if it cannot be read."""
    if is_remote(where):
        try:
            return read(where, timeout)
        except MissingObject:
            return None
    try:
        return Path(where).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"data: {where} cannot be read ({error.strerror})") from error
