"""One data set of a recipe: its manifest and its shards, which are read from a local folder or from the cache."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, Protocol

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from scfm_core.data.cache import ShardCache
from scfm_core.data.machine import MachineFiles
from scfm_core.data.manifest import read_manifest, read_optional, read_required, select
from scfm_core.data.mds import INDEX, MdsIndex, MdsShard
from scfm_core.data.members import Members
from scfm_core.data.recipe import Format, SourceConfig, format_of
from scfm_core.data.schema import MANIFEST, BadData, Manifest, ShardEntry
from scfm_core.data.tar_table import TarTable
from scfm_core.data.uri import expand, is_remote, join, parent
from scfm_core.data.verified import Verified
from scfm_core.data.webdataset import TarShard
from scfm_core.errors import UserError
from scfm_core.files import mismatch
from scfm_core.progress import beat

PADDING = "padding.safetensors"
"""File of a data set with trimmed tokens: for each field of tokens, by its name, the encoder's output for an empty caption,
[L, ...]."""

_THREADS = 16
_LARGE = 1 << 30
"""Bytes of a data set for which it is recorded what was hashed. A smaller one is hashed within some seconds."""


class Shard(Protocol):
    """An open shard: random access to the fields of its samples, as bytes."""

    @property
    def name(self) -> str:
        """Its path or address, for messages."""
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Name of sample `index`."""
        ...

    def fields(self, index: int) -> list[str]:
        """Names of the fields of sample `index`."""
        ...

    def read(self, index: int, field: str) -> bytes | None:
        """One field, or None if the sample does not have it; raises BadData if it is corrupt."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


@dataclass
class Source:
    """A data set of shards; `open_source` makes it. `open` is safe in threads."""

    config: SourceConfig
    base: str
    """Folder or address. The names of the shards are relative to it."""
    manifest: Manifest
    index: MdsIndex | None = None
    """Of MDS: its `index.json`."""
    padding: dict[str, Tensor] | None = field(default=None, repr=False)
    """Of each field of tokens [L, ...], if they are trimmed."""
    cache: ShardCache | None = None
    members: Members | None = None
    """Tables of the tars, if they are recorded beside the manifest."""
    verified: Verified | None = None
    """The shards that were hashed on this machine. None: the data set is small."""

    def __post_init__(self) -> None:
        self.shards = self.manifest.index

    def address(self, number: int) -> str:
        """Path or URI of a shard."""
        return join(self.base, self.shards.file(number).name)

    def open(self, number: int, *, check: bool, again: bool = False, table: TarTable | None = None) -> Shard:
        """Open a shard, after a download if it is remote and not in the cache.

        Args:
            number: of the shard in the manifest.
            check: hash it, unless it was hashed on this machine (at the latest by this call, when downloading it) and has not
                changed since.
            again: with `check`, hash it unless this call has downloaded it.
            table: of a tar, from an earlier opening; None: it is parsed.

        Raises:
            BadData: if it is missing, a folder, or differs from the manifest. A corrupt copy is downloaded again once.
            UserError: if it is unavailable.
            OSError: if it cannot be read now: an error that may pass, or no descriptors are left.
        """
        entry, name = self.shards.file(number), self.address(number)
        compressed = None if self.index is None else self.index.compressed(number)
        may_retry = self._uses_cache(compressed)
        while True:
            path, verified = self._path(number, entry, compressed)
            try:
                file = path.open("rb")
            except FileNotFoundError as error:
                if self._uses_cache(compressed):
                    continue  # evicted since `_path`
                raise BadData(f"data: shard {name} is listed in the manifest but missing; copy it again") from error
            except IsADirectoryError as error:
                raise BadData(f"data: shard {name} cannot be opened ({error.strerror})") from error
            except PermissionError as error:
                raise UserError(f"data: shard {name} cannot be opened ({error.strerror}). Make it readable") from error
            try:
                difference = self._difference(number, file, entry, compressed, verified, check, again)
                if difference is None:
                    return self._parse(file, number, entry, name, table)
            except BaseException:
                file.close()
                raise
            file.close()
            if not may_retry:
                raise BadData(f"data: shard {name} is corrupt: {difference}. Copy it again")
            assert self.cache is not None
            stored = compressed or entry
            self.cache.discard(join(self.base, stored.name), stored.sha256)
            may_retry = False

    def _difference(
        self,
        number: int,
        file: BinaryIO,
        entry: ShardEntry,
        compressed: ShardEntry | None,
        is_downloaded: bool,
        check: bool,
        again: bool,
    ) -> str | None:
        """How an open shard differs from the manifest. `is_downloaded`: this call of `open` has downloaded and hashed it."""
        if self.verified is None or entry.sha256 is None or not check or os.fstat(file.fileno()).st_size != entry.bytes:
            return None if is_downloaded else mismatch(file, entry.bytes, entry.sha256 if check else None)
        if is_downloaded:
            self.verified.add(number, file, entry)
            return None
        is_copy = self._uses_cache(compressed)
        return self.verified.difference(number, file, entry, is_copy=is_copy, again=again)

    def bytes_of_copy(self, number: int) -> int:
        """Bytes of a shard's copy in the cache; 0 if it is read in place."""
        compressed = None if self.index is None else self.index.compressed(number)
        return int(self.shards.bytes[number]) if self._uses_cache(compressed) else 0

    def mark_used(self, number: int) -> None:
        """Mark a shard's copy in the cache, if there is one, as the most recently used one."""
        stored = (None if self.index is None else self.index.compressed(number)) or self.shards.file(number)
        if self.cache is not None and self.bytes_of_copy(number):
            self.cache.mark_used(join(self.base, stored.name), stored.sha256)

    def _uses_cache(self, compressed: ShardEntry | None) -> bool:
        return compressed is not None or is_remote(self.base)

    def _path(self, number: int, entry: ShardEntry, compressed: ShardEntry | None) -> tuple[Path, bool]:
        """Path of a shard as a plain local file, and whether it was verified just now."""
        name = self.address(number)
        if not self._uses_cache(compressed):
            return Path(name), False
        assert self.cache is not None
        if compressed is None:
            return self.cache.get(name, entry.bytes, entry.sha256)
        assert self.index is not None
        return self.cache.get(
            join(self.base, compressed.name),
            compressed.bytes,
            compressed.sha256,
            self.index.unpack(number, compressed.name),
            entry.bytes,
        )

    def _parse(self, file: Any, number: int, entry: ShardEntry, name: str, table: TarTable | None) -> Shard:
        index = self.index
        if table is None and self.members is not None:
            table = self.members.table(entry)
        shard: Shard = TarShard(file, name, table) if index is None else MdsShard(file, index.shards[number], name)
        if len(shard) != entry.samples:
            raise BadData(
                f"data: shard {name} holds {len(shard)} samples, the manifest says {entry.samples}: it was truncated or "
                f"overwritten. Copy it again"
            )
        return shard

    def check_present(self) -> None:
        """Compare the sizes of local shards with the manifest. Remote shards are checked when they are downloaded.

        Raises:
            UserError: if a shard is missing or has another size; the message names it.
        """
        if is_remote(self.base):
            return
        parts = [range(at, min(at + 256, len(self.shards))) for at in range(0, len(self.shards), 256)]
        with ThreadPoolExecutor(_THREADS) as pool:  # on a file system of a network each answer takes a millisecond
            for problem in pool.map(lambda part: next(filter(None, map(self._absence, part)), None), parts):
                beat(f"looking for the shards of {self.base}")
                if problem is not None:
                    pool.shutdown(cancel_futures=True)
                    raise UserError(problem)

    def _absence(self, number: int) -> str | None:
        """What is wrong with the stored file of a shard, without opening it."""
        stored = (None if self.index is None else self.index.compressed(number)) or self.shards.file(number)
        path = Path(join(self.base, stored.name))
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            status = None
        if status is None or not S_ISREG(status.st_mode):
            return f"data: shard {path} is listed in the manifest but missing; copy it again"
        if status.st_size != stored.bytes:
            return (
                f"data: shard {path} has {status.st_size} bytes, the manifest says {stored.bytes}: it was truncated or "
                f"overwritten. Copy it again, or encode again"
            )
        return None


def open_source(
    config: SourceConfig, cache: ShardCache | None, timeout: float, files: MachineFiles | None = None
) -> Source:
    """Open a source: read its manifest, and no shard.

    Args:
        config: of the source.
        cache: for remote and compressed shards.
        timeout: seconds for each file that is read here.
        files: of the machine, for a large data set. None: it is parsed and hashed by this process.

    Raises:
        UserError: if the manifest is missing or damaged, or does not list the shards that `uri` names.
    """
    config = config.with_format()
    uri = config.uri if is_remote(config.uri) else str(Path(config.uri).expanduser())
    names_shards = "{" in uri or uri.endswith(".tar")
    if names_shards and config.split is not None:
        raise UserError(f"data.sources ({config.name}): split is a subfolder of uri, but {config.uri!r} names shards")
    base = uri if config.split is None else join(uri, config.split)
    wanted = None
    if names_shards:
        # Names are relative to the part before the braces, which may be in a folder's name.
        base = parent(uri.partition("{")[0] + "x")
        if is_remote(uri) and not is_remote(join(base, "")):
            raise UserError(
                f"data.sources ({config.name}): {config.uri!r} has braces in the name of the bucket or host. Make one "
                f"source of each"
            )
        wanted = [name.removeprefix(join(base, "")) for name in expand(uri, f"data.sources ({config.name})")]
    index = None
    if config.format == "mds":
        index = MdsIndex(read_required(join(base, INDEX), config, timeout), join(base, INDEX))
    manifest = read_manifest(config, base, index, timeout, files)
    if wanted is not None:
        manifest = select(manifest, wanted, config)
    padding = None
    if manifest.padding is not None:
        names = [name for name, kind in manifest.fields.items() if kind == "tokens"]
        padding = _read_padding(join(base, PADDING), manifest.padding, names, timeout)
    verified = None
    if files is not None and int(manifest.index.bytes.sum()) >= _LARGE:
        place = base if is_remote(base) else str(Path(base).absolute())
        key = hashlib.sha256(f"{place}\n{manifest.index.key}".encode(errors="surrogatepass")).hexdigest()[:32]
        verified = Verified(files.folder / "verified" / key, timeout)
    where = config.manifest or join(base, MANIFEST)
    members = None if is_remote(where) or index is not None else Members.beside(Path(where).expanduser())
    return Source(config, base, manifest, index, padding, cache, members, verified)


def _read_padding(where: str, sha256: str, names: Sequence[str], timeout: float) -> dict[str, Tensor]:
    content = read_optional(where, timeout)
    if content is None or hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"data: {where} is missing or differs from the manifest; copy it again")
    try:
        tensors = load(content)
        return {name: tensors[name] for name in names}
    except (SafetensorError, KeyError) as error:
        raise UserError(
            f"data: {where} does not hold the padding of {', '.join(names)} ({error!r}). Do not use this data set"
        ) from error


def guess_format(uri: str) -> Format:
    """Format of a data set, for an address too, whose `index.json` is asked for."""
    if is_remote(uri) and not uri.endswith(".tar"):
        return "mds" if read_optional(join(uri, INDEX), 60.0) is not None else "webdataset"
    return "webdataset" if uri.endswith(".tar") else format_of(Path(uri).expanduser())


def json_value(content: str | bytes, path: list[str]) -> Any:
    """The value at the keys `path` of a JSON text; None if a key is missing. ValueError if it is not JSON."""
    value = json.loads(content)
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
