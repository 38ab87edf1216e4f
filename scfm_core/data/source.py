"""One data set of a recipe: its manifest, and its shards, opened from a local folder or from the cache."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from scfm_core.data.cache import ShardCache
from scfm_core.data.mds import INDEX, MdsIndex, MdsShard
from scfm_core.data.recipe import SourceConfig
from scfm_core.data.remote import read
from scfm_core.data.schema import MANIFEST, BadData, Manifest, ShardEntry
from scfm_core.data.uri import expand, is_remote, join, parent
from scfm_core.data.webdataset import TarShard
from scfm_core.errors import UserError
from scfm_core.files import mismatch

PADDING = "padding.safetensors"
"""Of a cache with trimmed texts: `text` [text_length, D], the T5 output of an empty caption."""


class Shard(Protocol):
    """An open shard: any field of any sample, as bytes."""

    name: str

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Name of sample `index`."""
        ...

    def fields(self, index: int) -> list[str]:
        """What sample `index` has."""
        ...

    def read(self, index: int, field: str) -> bytes | None:
        """One field, or None if the sample has none of this name; BadData if it is damaged."""
        ...

    def close(self) -> None:
        """Free the file."""
        ...


@dataclass
class Source:
    """A data set of shards.

    `open_source` makes one; `check` and `open` are safe in threads.
    """

    config: SourceConfig
    base: str
    """Folder or address that the shards' names are relative to."""
    manifest: Manifest
    index: MdsIndex | None = None
    padding: Tensor | None = field(default=None, repr=False)
    cache: ShardCache | None = None

    def address(self, number: int) -> str:
        """Path or URI of a shard, for messages too."""
        return join(self.base, self.manifest.shards[number].name)

    def open(self, number: int, *, check: bool) -> Shard:
        """Open a shard, after fetching it if need be.

        Args:
            number: of the shard in the manifest.
            check: hash it, if it was not downloaded (and hashed) just now.

        Raises:
            BadData: if it is not what the manifest says, after one more download if it is a copy; or not readable.
            UserError: if it cannot be had.
        """
        entry, name = self.manifest.shards[number], self.address(number)
        packed = None if self.index is None else self.index.compressed(number)
        again = True
        while True:
            path, fresh = self._path(number, entry, packed)
            try:
                file = path.open("rb")
            except FileNotFoundError as error:
                if self._is_copy(packed):
                    continue  # deleted between the two lines, to make room for another shard
                raise BadData(f"data: shard {name} is listed in the manifest but missing; copy it again") from error
            except OSError as error:
                raise BadData(f"data: shard {name} cannot be opened ({error.strerror})") from error
            wrong = None if fresh else mismatch(file, entry.bytes, entry.sha256 if check else None)
            if wrong is None:
                return self._parse(file, number, entry, name)
            file.close()
            if not self._is_copy(packed) or not again:
                raise BadData(f"data: shard {name} is corrupt: {wrong}. Copy it again")
            assert self.cache is not None
            stored = packed or entry
            self.cache.discard(join(self.base, stored.name), stored.sha256)
            again = False

    def _is_copy(self, packed: ShardEntry | None) -> bool:
        return packed is not None or is_remote(self.base)

    def _path(self, number: int, entry: ShardEntry, packed: ShardEntry | None) -> tuple[Path, bool]:
        name = self.address(number)
        if not self._is_copy(packed):
            return Path(name), False
        assert self.cache is not None
        if packed is None:
            return self.cache.get(name, entry.bytes, entry.sha256)
        assert self.index is not None
        return self.cache.get(
            join(self.base, packed.name),
            packed.bytes,
            packed.sha256,
            self.index.unpack(number, packed.name),
            entry.bytes,
        )

    def _parse(self, file: Any, number: int, entry: ShardEntry, name: str) -> Shard:
        try:
            index = self.index
            shard: Shard = TarShard(file, name) if index is None else MdsShard(file, index.shards[number], name)
            if len(shard) != entry.samples:
                raise BadData(
                    f"data: shard {name} holds {len(shard)} samples, the manifest says {entry.samples}: it is cut or was "
                    f"overwritten. Copy it again"
                )
            return shard
        except BadData:
            file.close()
            raise

    def check_present(self) -> None:
        """Hold the sizes of local shards against the manifest; remote ones are checked when they are downloaded.

        Raises:
            UserError: naming the shard that is missing or of another size.
        """
        if is_remote(self.base):
            return
        for number, entry in enumerate(self.manifest.shards):
            packed = None if self.index is None else self.index.compressed(number)
            path = Path(join(self.base, (packed or entry).name))
            if not path.is_file():
                raise UserError(f"data: shard {path} is listed in the manifest but missing; copy it again")
            if path.stat().st_size != (packed or entry).bytes:
                raise UserError(
                    f"data: shard {path} has {path.stat().st_size} bytes, the manifest says {(packed or entry).bytes}: it "
                    f"is cut or was overwritten. Copy it again, or encode again"
                )


def open_source(config: SourceConfig, cache: ShardCache | None, timeout: float) -> Source:
    """Read a source's manifest; no shard is touched.

    Args:
        config: of the source.
        cache: for remote and compressed shards.
        timeout: seconds for each of the files read here.

    Raises:
        UserError: if there is no manifest, it is damaged, or it does not list the shards that `uri` names.
    """
    uri = config.uri if is_remote(config.uri) else str(Path(config.uri).expanduser())
    by_name = "{" in uri or uri.endswith(".tar")
    if by_name and config.split is not None:
        raise UserError(f"data.sources ({config.name}): split is a subfolder of uri; {config.uri!r} names shards")
    base = uri if config.split is None else join(uri, config.split)
    wanted = None
    if by_name:
        # Braces may stand in folders too: names are relative to what is fixed.
        base = parent(uri.partition("{")[0] + "x")
        if is_remote(uri) and not is_remote(join(base, "")):
            raise UserError(
                f"data.sources ({config.name}): {config.uri!r} has braces in the name of the bucket or host. Make each a "
                f"source of its own"
            )
        wanted = [name.removeprefix(join(base, "")) for name in expand(uri, f"data.sources ({config.name})")]
    index = None
    if config.format == "mds":
        index = MdsIndex(_required(join(base, INDEX), config, timeout), join(base, INDEX))
    manifest = _manifest(config, base, index, timeout)
    if wanted is not None:
        manifest = _only(manifest, wanted, config)
    padding = None
    if manifest.padding is not None:
        padding = _padding(join(base, PADDING), manifest.padding, timeout)
    return Source(config, base, manifest, index, padding, cache)


def _manifest(config: SourceConfig, base: str, index: MdsIndex | None, timeout: float) -> Manifest:
    where = config.manifest or join(base, MANIFEST)
    where = where if is_remote(where) else str(Path(where).expanduser())
    text = read_if_there(where, timeout) if index is not None and config.manifest is None else None
    if index is not None and text is None and config.manifest is None:
        return Manifest(format="mds", shards=tuple(index.entries))
    manifest = Manifest.parse(text if text is not None else _required(where, config, timeout), where)
    if manifest.format != config.format:
        raise UserError(
            f"data.sources ({config.name}): {where} is of format {manifest.format!r}, the recipe says {config.format!r}"
        )
    if index is not None:
        listed = [(entry.name, entry.samples, entry.bytes) for entry in manifest.shards]
        if listed != [(entry.name, entry.samples, entry.bytes) for entry in index.entries]:
            raise UserError(
                f"data.sources ({config.name}): {where} does not list the shards of {join(base, INDEX)}. Make it again "
                f"with `scfm data index`"
            )
    return manifest


def _only(manifest: Manifest, wanted: list[str], config: SourceConfig) -> Manifest:
    """The shards that the braces name, in their order."""
    listed = {shard.name: shard for shard in manifest.shards}
    missing = [name for name in wanted if name not in listed]
    if missing:
        raise UserError(
            f"data.sources ({config.name}): {config.uri} names {len(missing)} shards that the manifest does not list, the "
            f"first is {missing[0]!r}. Correct the braces, or run `scfm data index` again"
        )
    return Manifest(**{**manifest.__dict__, "shards": tuple(listed[name] for name in wanted)})


def _required(where: str, config: SourceConfig, timeout: float) -> bytes:
    """A file that must be there; the advice when it is not."""
    folder = parent(where)
    if not is_remote(where) and not Path(folder).is_dir():
        raise UserError(
            f"data: there is no folder {folder!r}. Make it with `scfm data encode IMAGES -o {folder} --model MODEL`, or correct the path"
        )
    text = read_if_there(where, timeout)
    if text is None:
        name = where.rpartition("/")[2]
        advice = (
            f"If `scfm data encode` made the shards, it did not finish: run it again. For tars made elsewhere run `scfm data "
            f"index {config.uri!r}`. For a folder of plain images set data.format=folder"
        )
        raise UserError(
            f"data: there is no {name} in {folder}. "
            + (advice if config.format == "webdataset" else "It is no data set of MDS")
        )
    return text


def read_if_there(where: str, timeout: float) -> bytes | None:
    """A small file of this machine or of a storage; None if there is none."""
    if is_remote(where):
        try:
            return read(where, timeout)
        except UserError as error:
            if "(404)" in str(error):
                return None
            raise
    try:
        return Path(where).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"data: {where} cannot be read ({error.strerror})") from error


def _padding(where: str, sha256: str, timeout: float) -> Tensor:
    content = read_if_there(where, timeout)
    if content is None or hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"data: {where} is missing or not the one that the manifest names; copy it again")
    try:
        tensor: Tensor = load(content)["text"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"data: {where} holds no padding of texts ({error!r}). Do not use this data set") from error
    return tensor


def guess_format(uri: str) -> Literal["webdataset", "mds", "folder"]:
    """What lies there, by its looks: an MDS index, tars or a manifest of them, else images."""
    if uri.endswith(".tar"):
        return "webdataset"
    if is_remote(uri):
        return "mds" if read_if_there(join(uri, INDEX), 60.0) is not None else "webdataset"
    folder = Path(uri).expanduser()
    if (folder / INDEX).is_file():
        return "mds"
    return "webdataset" if (folder / MANIFEST).is_file() or any(folder.glob("*.tar")) else "folder"


def json_value(content: bytes, path: list[str]) -> Any:
    """`json.a.b` of a JSON field; None if there is no such key."""
    value = json.loads(content)
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
