"""`scfm data index`: writes `manifest.json` for shards of other tools.

For example of img2dataset, webdataset's ShardWriter or mosaicml-streaming. Every shard is read once, in place or from a temporary download. It is hashed and its samples are counted. The size of
each sample comes from the header of its image, or from the `json` of a cached sample.
"""

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from scfm_core.data.decode import image_content
from scfm_core.data.image import image_size
from scfm_core.data.manifest import read_optional
from scfm_core.data.mds import INDEX, MdsIndex, MdsShard
from scfm_core.data.members import pack_table, write_members
from scfm_core.data.recipe import SourceConfig
from scfm_core.data.remote import fetch, names_below
from scfm_core.data.schema import MANIFEST, BadData, Manifest, ShardEntry, Size, refuse_outside, runs_of
from scfm_core.data.source import Shard
from scfm_core.data.uri import expand, is_remote, join, parent
from scfm_core.data.webdataset import TarShard
from scfm_core.errors import UserError
from scfm_core.files import mismatch, sha256_of

Progress = Callable[[Iterable[Any], int], Iterable[Any]]

_MAX_LISTED = 20
"""Number of problems that the message lists."""
_MIN_END, _MAX_END = 1024, 1 << 20
"""Bytes of zeros at the end of a tar: at least and at most."""
_GIVE_UP_AFTER = 8
"""Give up if this many shards are unavailable and no other was read. Then the storage has failed; each further shard
would take `timeout`."""


def index(
    source: SourceConfig,
    output: Path,
    *,
    timeout: float,
    threads: int = 4,
    max_bad_fraction: float = 0.0,
    progress: Progress = lambda items, total: items,
) -> Manifest:
    """Make the manifest of a source's shards.

    Args:
        source: of the shards: those that `uri` names with braces, one `.tar`, all `.tar` of a folder or prefix (not of
            http(s), which cannot be listed), or all of `index.json`. Of MDS, braces select the shards that are read;
            the entries of the others come from `index.json`.
        output: path of the manifest, or the folder for it; overwritten. `default_output` is a good choice.
        timeout: seconds for one download, with all retries and the pauses between them.
        threads: number of shards that are read at a time. Each download takes space in the temporary folder (TMPDIR).
        max_bad_fraction: tolerated share of samples without a valid size. They get the size of the sample before.
            Training will find them again, and tolerate them up to its `data.max_bad_fraction`.
        progress: shows a progress bar; called with (shards, their number), it returns the shards.

    Returns:
        the manifest. Its names are relative to the same folder as in `open_source`, which accepts it beside the shards
        or as `manifest` of the recipe.

    Raises:
        UserError: if a shard or a sample cannot be read (all are tried first, and nothing is written), if the samples
            are cached and no manifest has their encoder, or if `output` cannot be written.
    """
    output = output / MANIFEST if output.is_dir() else output
    if not output.parent.is_dir():
        raise UserError(
            f"data: there is no folder {str(output.parent)!r} for {output.name}. Make it, or choose another"
        )
    reader = _Reader(source, timeout)
    readings, cache_facts = _read_all(reader, threads, progress)
    bad = sum(len(reading.bad) for reading in readings)
    samples = sum(reading.entry.samples for reading in readings if reading.entry is not None)
    tolerated = bad <= max_bad_fraction * samples
    _refuse_problems(source, [line for each in readings for line in (*each.problems, *(() if tolerated else each.bad))])
    if {True, False} <= set().union(*(reading.cached for reading in readings)):
        raise UserError(f"data: the shards of {source.uri} mix cached samples and images. Separate them")
    entries = tuple(reading.entry for reading in readings if reading.entry is not None)
    manifest = replace(cache_facts or Manifest(), format=reader.format, shards=reader.complete(entries))
    tables = {str(each.entry.sha256): each.table for each in readings if each.entry is not None and each.table}
    try:
        if tables:
            write_members(output, tables)
        manifest.write(output)
    except OSError as error:
        raise UserError(f"data: {output} cannot be written ({error.strerror}). Choose another place") from error
    return manifest


def _read_all(reader: "_Reader", threads: int, progress: Progress) -> tuple[list["_Reading"], Manifest | None]:
    """Read every shard.

    Returns:
        the readings, in the order of the shards; for cached samples, the existing manifest.
    """
    readings: dict[str, _Reading] = {}
    cache_facts: Manifest | None = None
    with tempfile.TemporaryDirectory(prefix="scfm-index-") as folder:
        pool = ThreadPoolExecutor(threads)
        try:
            futures = [pool.submit(reader.read, name, Path(folder)) for name in reader.names]
            for future in progress(as_completed(futures), len(futures)):
                reading = future.result()
                readings[reading.name] = reading
                if True in reading.cached and cache_facts is None:  # fail now, not after hours of reading
                    cache_facts = _read_cache_facts(reader.source, reader.base, reader.timeout)
                if len(readings) == _GIVE_UP_AFTER and all(each.unavailable for each in readings.values()):
                    raise UserError(f"{reading.problems[0]}. The first {_GIVE_UP_AFTER} shards were all unavailable")
        finally:
            pool.shutdown(cancel_futures=True)
    return [readings[name] for name in reader.names], cache_facts


def default_output(source: SourceConfig) -> Path:
    """Path of `manifest.json` beside local shards.

    Raises:
        UserError: if the shards are remote: then there is no default.
    """
    base, _ = _base(source)
    if is_remote(base):
        raise UserError(
            f"data: {source.uri} is not on this machine, so give a path for the manifest (--output). Then set it as `manifest:` "
            f"of the source, or upload it as {join(base, MANIFEST)}"
        )
    return Path(base) / MANIFEST


@dataclass
class _Reading:
    """The result of reading one shard."""

    name: str
    entry: ShardEntry | None = None
    table: bytes | None = None
    """Of a tar: where its members are, for `write_members`."""
    cached: set[bool] = field(default_factory=set)
    """Whether its samples are cached; both values if they are mixed."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with the shard."""
    bad: list[str] = field(default_factory=list)
    """Samples without a valid size, and what is wrong with them."""
    unavailable: bool = False
    """It could not be downloaded."""


class _Reader:
    """Reads the shards of a source. Their names are relative to `base`."""

    def __init__(self, source: SourceConfig, timeout: float) -> None:
        if source.format == "folder":
            raise UserError(
                f"data: {source.uri} is a folder of images, which does not need a manifest; only shards have one"
            )
        self.source, self.timeout = source, timeout
        self.format: Literal["webdataset", "mds"] = "mds" if source.format == "mds" else "webdataset"
        self.base, wanted = _base(source)
        self.mds: MdsIndex | None = None
        if source.format == "mds":
            where = join(self.base, INDEX)
            text = read_optional(where, timeout)
            if text is None:
                raise UserError(f"data: there is no {where}: {source.uri} is not an MDS data set. Correct the address")
            self.mds = MdsIndex(text, where)
            listed = [entry.name for entry in self.mds.entries]
            unknown = sorted(set(wanted or ()) - set(listed))
            if unknown:
                raise UserError(f"data: {source.uri} names the shard {unknown[0]!r}, which {where} does not list")
            self.names = wanted or listed
        else:
            listed = self.names = wanted or _list_tars(self.base, source, timeout)
        for name in self.names:
            refuse_outside(name, source.uri)
        self._numbers = {name: number for number, name in enumerate(listed)}

    def complete(self, entries: tuple[ShardEntry, ...]) -> tuple[ShardEntry, ...]:
        """For MDS, all entries of `index.json`, because a manifest beside it must list the same shards."""
        if self.mds is None:
            return entries
        read = {entry.name: entry for entry in entries}
        return tuple(read.get(entry.name, entry) for entry in self.mds.entries)

    def read(self, name: str, folder: Path) -> _Reading:
        """Read one shard; safe in threads.

        Args:
            name: of the shard.
            folder: for temporary files.

        Raises:
            UserError: if the disk of the temporary folder is full.
        """
        reading, where = _Reading(name), join(self.base, name)
        temporary: list[Path] = []
        try:
            path = self._fetch(name, folder, temporary)
            with path.open("rb") as file:
                self._measure(file, where, reading)
        except UserError as error:  # also BadData
            reading.problems.append(_message(error))
            reading.unavailable = not isinstance(error, BadData)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"data: the disk of {folder.parent}, to which shards are downloaded, is full. Set TMPDIR to a folder with "
                    f"more space, or use fewer threads"
                ) from error
            reading.problems.append(f"shard {where} cannot be read ({error.strerror or error})")
        finally:
            for path in temporary:
                path.unlink(missing_ok=True)
        return reading

    def _fetch(self, name: str, folder: Path, temporary: list[Path]) -> Path:
        """Path of the shard as an uncompressed local file; adds the files that it makes to `temporary`."""
        number = self._numbers[name]
        compressed = None if self.mds is None else self.mds.compressed(number)
        where = join(self.base, name if compressed is None else compressed.name)
        path = Path(where)
        if is_remote(self.base):
            path = folder / f"{number}.fetched"
            temporary.append(path)
            fetch(where, path, self.timeout)
        if self.mds is not None and compressed is not None:
            with path.open("rb") as file:
                difference = mismatch(file, compressed.bytes, compressed.sha256)
            if difference is not None:
                raise BadData(f"data: shard {where} is corrupt: {difference}")
            unpack = self.mds.unpack(number, where)
            assert unpack is not None
            plain = folder / f"{number}.plain"
            temporary.append(plain)
            plain.write_bytes(unpack(path.read_bytes()))
            return plain
        return path

    def _measure(self, file: Any, where: str, reading: _Reading) -> None:
        """Hash a shard, count its samples and get their sizes; the result goes into `reading`."""
        digest, shard = self._open_verified(file, where, reading.name)
        if not len(shard):
            raise BadData(f"data: shard {where} has no samples")
        if isinstance(shard, TarShard):
            _check_end(file, shard)
            reading.table = pack_table(shard.table)
        sizes: list[Size | None] = []
        for at in range(len(shard)):
            try:
                size, cached = _size_of(shard, at, self.source)
            except BadData as error:
                reading.bad.append(_message(error))
                sizes.append(None)
            else:
                sizes.append(size)
                reading.cached.add(cached)
        known_sizes = [size for size in sizes if size is not None]
        if known_sizes:
            filled = accumulate(sizes, lambda last, size: size or last, initial=known_sizes[0])
            reading.entry = ShardEntry(
                name=reading.name,
                samples=len(sizes),
                bytes=file.seek(0, os.SEEK_END),
                sha256=digest,
                sizes=runs_of([size for size in filled if size is not None][1:]),
            )
        else:
            reading.problems, reading.bad = [*reading.problems, *reading.bad], []

    def _open_verified(self, file: Any, where: str, name: str) -> tuple[str, Shard]:
        """sha256 of a shard, and the open shard; BadData if an MDS shard differs from `index.json`."""
        if self.mds is None:
            return sha256_of(file), _open(file, where)
        number = self._numbers[name]
        entry = self.mds.entries[number]
        difference = mismatch(file, entry.bytes, entry.sha256)
        if difference is not None:
            raise BadData(f"data: shard {where} is corrupt: {difference.replace('manifest', INDEX)}")
        return entry.sha256 or sha256_of(file), _open(file, where, self.mds.shards[number])


def _open(file: Any, where: str, description: dict[str, Any] | None = None) -> Shard:
    try:
        return TarShard(file, where) if description is None else MdsShard(file, description, where)
    except BadData:
        raise
    except (ValueError, KeyError, TypeError) as error:  # of an index with invalid columns
        raise BadData(f"data: shard {where} differs from {INDEX} ({error!r})") from error


def _check_end(file: Any, shard: TarShard) -> None:
    """BadData if a tar is truncated.

    `TarShard` takes zeros for the end of a tar, and relies on the number of samples in the manifest. Here there is no
    manifest yet.
    """
    descriptor, size = file.fileno(), file.seek(0, os.SEEK_END)
    if os.pread(descriptor, _MIN_END, max(0, size - _MIN_END)).strip(b"\0"):
        raise BadData(f"data: shard {shard.name} has no end mark: it is truncated, or its writer was killed")
    end = shard.table.end
    is_mark = not os.pread(descriptor, 512, end).strip(b"\0")
    if is_mark and (size - end > _MAX_END or os.pread(descriptor, size - end, end).strip(b"\0")):
        raise BadData(
            f"data: shard {shard.name} ends at byte {end} of {size}: members were overwritten with zeros, or another "
            f"archive was appended"
        )


def _size_of(shard: Shard, at: int, source: SourceConfig) -> tuple[Size, bool]:
    """Height and width of a sample, and whether it is cached; BadData if there is no valid size."""
    where = f"sample {shard.key(at)!r} of shard {shard.name}"
    fields = shard.fields(at)
    if "safetensors" in fields:
        try:
            detail = json.loads(shard.read(at, "json") or b"")
            height, width = detail["height"], detail["width"]
            if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
                raise ValueError(f"height {height!r}, width {width!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise BadData(
                f"data: {where} is cached, but its json does not have height and width ({error!r})"
            ) from error
        return (height, width), True
    return image_size(image_content(shard, at, source), where), False


def _base(source: SourceConfig) -> tuple[str, list[str] | None]:
    """Base of the shards' names, as in `open_source`; and the names, if `uri` has them."""
    uri = source.uri if is_remote(source.uri) else str(Path(source.uri).expanduser())
    if "{" not in uri and not uri.endswith(".tar"):
        return (uri if source.split is None else join(uri, source.split)), None
    if source.split is not None:
        raise UserError(f"data: split is a subfolder of uri, but {source.uri!r} names shards")
    base = parent(uri.partition("{")[0] + "x")
    if is_remote(uri) and not is_remote(join(base, "")):
        raise UserError(f"data: {source.uri!r} has braces in the name of the bucket or host. Index each separately")
    prefix = join(base, "")
    return base, [name.removeprefix(prefix) for name in expand(uri, f"data: {source.uri}")]


def _list_tars(base: str, source: SourceConfig, timeout: float) -> list[str]:
    """The names of all `.tar` in a folder or prefix, without subfolders."""
    if base.startswith(("http://", "https://")):
        raise UserError(
            f"data: {source.uri} cannot be listed, because http has no listing. Name the shards with braces: "
            f"{join(base, '{00000..00127}.tar')}"
        )
    if is_remote(base):
        names = names_below(base, timeout)
    else:
        if not Path(base).is_dir():
            raise UserError(f"data: there is no folder {base!r}. Correct the path")
        names = [path.name for path in Path(base).iterdir() if path.is_file()]
    tars = sorted(name for name in names if name.endswith(".tar"))
    if not tars:
        raise UserError(
            f"data: {base} has no .tar. If they are in subfolders, name one with `split`, or all with braces: "
            f"{join(base, '{00..15}/{00000..00127}.tar')}"
        )
    return tars


def _read_cache_facts(source: SourceConfig, base: str, timeout: float) -> Manifest:
    """The existing manifest of a cache. It has the encoder, text length and padding, which the shards do not have."""
    where = source.manifest or join(base, MANIFEST)
    text = read_optional(where, timeout)
    facts = None if text is None else Manifest.parse(text, where)
    if facts is None or facts.encoder is None:
        raise UserError(
            f"data: {source.uri} has cached samples, but the shards do not say which encoder made them, and "
            f"{'there is no' if facts is None else 'it is not in'} {where}. `scfm data encode` writes its own manifest: copy "
            f"that one, or encode again"
        )
    return facts


def _refuse_problems(source: SourceConfig, problems: list[str]) -> None:
    if not problems:
        return
    more = f"\n  ... and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
    raise UserError(
        f"data: no manifest was written for {source.uri}: {len(problems)} shards or samples are invalid:\n  "
        + "\n  ".join(problems[:_MAX_LISTED])
        + more
        + "\nFix them or copy them again; or exclude corrupt shards with the braces of the address, for example "
        "{{00000..00041},{00043..00127}}.tar"
    )


def _message(error: UserError) -> str:
    return str(error).removeprefix("data: ")
