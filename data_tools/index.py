"""`scfm data index`: `manifest.json` for shards that were written elsewhere.

For what img2dataset, webdataset's ShardWriter or mosaicml-streaming made. Every shard is read once, from its place or into
a temporary file: hashed, its samples counted, and the size of each taken from its image's header (of a cached sample, from
its `json`).
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
from typing import Any

from scfm_core.data.folder import image_size
from scfm_core.data.mds import INDEX, MdsIndex, MdsShard
from scfm_core.data.recipe import SourceConfig
from scfm_core.data.remote import fetch, names_below
from scfm_core.data.schema import MANIFEST, BadData, Manifest, ShardEntry, Size, refuse_outside, runs_of
from scfm_core.data.source import Shard, read_if_there
from scfm_core.data.uri import expand, is_remote, join, parent
from scfm_core.data.webdataset import TarShard
from scfm_core.errors import UserError
from scfm_core.files import mismatch, sha256_of

Progress = Callable[[Iterable[Any], int], Iterable[Any]]

_SHOWN = 20
"""Problems that the message spells out."""
_END, _PADDING = 1024, 1 << 20
"""Bytes of zeros that a tar must end with, and may."""
_HOPELESS = 8
"""Shards none of which could be had: the storage is at fault, not they, and each further one would take `timeout`."""


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
        source: which shards: those that `uri` names by braces, one `.tar`, all `.tar` of a folder or prefix (of http(s),
            which cannot be listed, by braces alone), or of `index.json`. Of MDS, braces choose what is read; the other
            shards are listed as `index.json` has them.
        output: the manifest's path, or the folder for it; written over. `default_output` has a good one.
        timeout: seconds for one download, attempts and pauses included.
        threads: shards that are read at a time; each downloaded one takes its size of the temporary folder (TMPDIR).
        max_bad_fraction: share of samples whose size may be unreadable; they count as of the size of the one before, and
            are met again in training, whose `data.max_bad_fraction` bears them.
        progress: wraps the shards to show a bar; called with (shards, their number).

    Returns:
        the manifest. Its names are relative to the same folder as those of `open_source`, which accepts it, beside the
        shards or as `manifest` of the recipe.

    Raises:
        UserError: if a shard or a sample cannot be read (after all were tried; nothing is written then), if these are
            cached samples and no manifest says of which encoder, or if `output` cannot be written.
    """
    output = output / MANIFEST if output.is_dir() else output
    if not output.parent.is_dir():
        raise UserError(
            f"data: there is no folder {str(output.parent)!r} for {output.name}. Make it, or choose another"
        )
    reader = _Reader(source, timeout)
    readings: dict[str, _Reading] = {}
    facts: Manifest | None = None
    with tempfile.TemporaryDirectory(prefix="scfm-index-") as scratch:
        pool = ThreadPoolExecutor(threads)
        try:
            futures = [pool.submit(reader.read, name, Path(scratch)) for name in reader.names]
            for future in progress(as_completed(futures), len(futures)):
                reading = future.result()
                readings[reading.name] = reading
                if True in reading.cached and facts is None:  # now, not after hours
                    facts = _facts_of_cache(source, reader.base, timeout)
                if len(readings) == _HOPELESS and all(each.absent for each in readings.values()):
                    raise UserError(f"{reading.problems[0]}. None of the first {_HOPELESS} shards could be had")
        finally:
            pool.shutdown(cancel_futures=True)
    in_order = [readings[name] for name in reader.names]
    bad = sum(len(reading.bad) for reading in in_order)
    borne = bad <= max_bad_fraction * sum(reading.entry.samples for reading in in_order if reading.entry is not None)
    _refuse_problems(source, [line for each in in_order for line in (*each.problems, *(() if borne else each.bad))])
    if {True, False} <= set().union(*(reading.cached for reading in in_order)):
        raise UserError(f"data: the shards of {source.uri} mix cached samples and images. Keep them apart")
    entries = tuple(reading.entry for reading in in_order if reading.entry is not None)
    manifest = replace(facts or Manifest(), format=reader.format, shards=reader.complete(entries))
    try:
        manifest.write(output)
    except OSError as error:
        raise UserError(f"data: {output} cannot be written ({error.strerror}). Choose another place") from error
    return manifest


def default_output(source: SourceConfig) -> Path:
    """`manifest.json` beside local shards.

    Raises:
        UserError: if the shards are remote: only the caller knows a place then.
    """
    base, _ = _base(source)
    if is_remote(base):
        raise UserError(
            f"data: {source.uri} is not on this machine, so the manifest needs a path (--output). Name it as `manifest:` of "
            f"the source, or upload it as {join(base, MANIFEST)}"
        )
    return Path(base) / MANIFEST


@dataclass
class _Reading:
    """What was found in one shard."""

    name: str
    entry: ShardEntry | None = None
    cached: set[bool] = field(default_factory=set)
    """Whether its samples are cached ones; of a mixture, both."""
    problems: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    """Its samples whose size cannot be told."""
    absent: bool = False
    """It could not be had, whatever it holds."""


class _Reader:
    """The shards of a source, by name below `base`."""

    def __init__(self, source: SourceConfig, timeout: float) -> None:
        if source.format == "folder":
            raise UserError(f"data: {source.uri} is a folder of images, which needs no manifest; an index is of shards")
        self.source, self.timeout, self.format = source, timeout, source.format
        self.base, wanted = _base(source)
        self.mds: MdsIndex | None = None
        if source.format == "mds":
            where = join(self.base, INDEX)
            text = read_if_there(where, timeout)
            if text is None:
                raise UserError(f"data: there is no {where}: {source.uri} is no data set of MDS. Correct the address")
            self.mds = MdsIndex(text, where)
            listed = [entry.name for entry in self.mds.entries]
            unknown = sorted(set(wanted or ()) - set(listed))
            if unknown:
                raise UserError(f"data: {source.uri} names the shard {unknown[0]!r}, which {where} does not list")
            self.names = wanted or listed
        else:
            listed = self.names = wanted or _tars(self.base, source, timeout)
        for name in self.names:
            refuse_outside(name, source.uri)
        self._numbers = {name: number for number, name in enumerate(listed)}

    def complete(self, entries: tuple[ShardEntry, ...]) -> tuple[ShardEntry, ...]:
        """Of MDS, all that `index.json` lists: a manifest beside it must agree with it."""
        if self.mds is None:
            return entries
        read = {entry.name: entry for entry in entries}
        return tuple(read.get(entry.name, entry) for entry in self.mds.entries)

    def read(self, name: str, scratch: Path) -> _Reading:
        """Read one shard; safe in threads.

        Raises:
            UserError: if the disk of the temporary folder is full.
        """
        reading, where = _Reading(name), join(self.base, name)
        copies: list[Path] = []
        try:
            path = self._fetch(name, scratch, copies)
            with path.open("rb") as file:
                self._measure(file, where, reading)
        except UserError as error:  # BadData is one
            reading.problems.append(_plain(error))
            reading.absent = not isinstance(error, BadData)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"data: the disk of {scratch.parent}, where shards are downloaded to, is full. Set TMPDIR to a folder "
                    f"with more room, or read fewer at a time"
                ) from error
            reading.problems.append(f"shard {where} cannot be read ({error.strerror or error})")
        finally:
            for copy in copies:
                copy.unlink(missing_ok=True)
        return reading

    def _fetch(self, name: str, scratch: Path, copies: list[Path]) -> Path:
        """The shard as a plain file; what was made for it goes into `copies`."""
        number = self._numbers[name]
        packed = None if self.mds is None else self.mds.compressed(number)
        where = join(self.base, name if packed is None else packed.name)
        path = Path(where)
        if is_remote(self.base):
            path = scratch / f"{number}.fetched"
            copies.append(path)
            fetch(where, path, self.timeout)
        if self.mds is not None and packed is not None:
            with path.open("rb") as file:
                wrong = mismatch(file, packed.bytes, packed.sha256)
            if wrong is not None:
                raise BadData(f"data: shard {where} is corrupt: {wrong}")
            unpack = self.mds.unpack(number, where)
            assert unpack is not None
            plain = scratch / f"{number}.plain"
            copies.append(plain)
            plain.write_bytes(unpack(path.read_bytes()))
            return plain
        return path

    def _measure(self, file: Any, where: str, reading: _Reading) -> None:
        known = None
        if self.mds is None:
            digest, shard = sha256_of(file), _opened(file, where)
        else:
            number = self._numbers[reading.name]
            known = self.mds.entries[number]
            wrong = mismatch(file, known.bytes, known.sha256)
            if wrong is not None:
                raise BadData(f"data: shard {where} is corrupt: {wrong.replace('manifest', INDEX)}")
            digest = known.sha256 or sha256_of(file)
            shard = _opened(file, where, self.mds.shards[number])
        if not len(shard):
            raise BadData(f"data: shard {where} holds no sample")
        if isinstance(shard, TarShard):
            _refuse_early_end(file, shard)
        sizes: list[Size | None] = []
        for at in range(len(shard)):
            try:
                size, cached = _size_of(shard, at, self.source)
            except BadData as error:
                reading.bad.append(_plain(error))
                sizes.append(None)
            else:
                sizes.append(size)
                reading.cached.add(cached)
        known_sizes = [size for size in sizes if size is not None]
        if known_sizes:
            before = accumulate(sizes, lambda last, size: size or last, initial=known_sizes[0])
            reading.entry = ShardEntry(
                name=reading.name,
                samples=len(sizes),
                bytes=file.seek(0, os.SEEK_END),
                sha256=digest,
                sizes=runs_of([size for size in before if size is not None][1:]),
            )
        else:
            reading.problems, reading.bad = [*reading.problems, *reading.bad], []


def _opened(file: Any, where: str, description: dict[str, Any] | None = None) -> Shard:
    try:
        return TarShard(file, where) if description is None else MdsShard(file, description, where)
    except BadData:
        raise
    except (ValueError, KeyError, TypeError) as error:  # of an index whose columns make no sense
        raise BadData(f"data: shard {where} is not what {INDEX} says ({error!r})") from error


def _refuse_early_end(file: Any, shard: TarShard) -> None:
    """A reader takes zeros for a tar's end and asks the manifest's count; here is none yet, so a cut must not pass."""
    descriptor, size = file.fileno(), file.seek(0, os.SEEK_END)
    if os.pread(descriptor, _END, max(0, size - _END)).strip(b"\0"):
        raise BadData(f"data: shard {shard.name} has no end mark: it is cut, or its writer was killed")
    end = shard.end
    is_mark = not os.pread(descriptor, 512, end).strip(b"\0")
    if is_mark and (size - end > _PADDING or os.pread(descriptor, size - end, end).strip(b"\0")):
        raise BadData(
            f"data: shard {shard.name} ends at byte {end} of {size}: zeros were left where members should be, or another "
            f"archive was appended"
        )


def _size_of(shard: Shard, at: int, source: SourceConfig) -> tuple[Size, bool]:
    """Height and width of a sample, and whether it is a cached one; BadData says why they cannot be told."""
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
                f"data: {where} is cached, but its json does not hold height and width ({error!r})"
            ) from error
        return (height, width), True
    content = next((found for name in source.image if (found := shard.read(at, name)) is not None), None)
    if content is None:
        raise BadData(
            f"data: {where} has no {' or '.join(source.image)}, but {', '.join(fields)}. Name the right field with `image:` "
            f"of the source"
        )
    return image_size(content, where), False


def _base(source: SourceConfig) -> tuple[str, list[str] | None]:
    """What the shards' names are relative to, as `open_source` has it, and the names, if `uri` spells them out."""
    uri = source.uri if is_remote(source.uri) else str(Path(source.uri).expanduser())
    if "{" not in uri and not uri.endswith(".tar"):
        return (uri if source.split is None else join(uri, source.split)), None
    if source.split is not None:
        raise UserError(f"data: split is a subfolder of uri; {source.uri!r} names shards")
    base = parent(uri.partition("{")[0] + "x")
    if is_remote(uri) and not is_remote(join(base, "")):
        raise UserError(f"data: {source.uri!r} has braces in the name of the bucket or host. Index each by itself")
    prefix = join(base, "")
    return base, [name.removeprefix(prefix) for name in expand(uri, f"data: {source.uri}")]


def _tars(base: str, source: SourceConfig, timeout: float) -> list[str]:
    """The names of all `.tar` in a folder or below a prefix, not in their subfolders."""
    if base.startswith(("http://", "https://")):
        raise UserError(
            f"data: {source.uri} cannot be listed, as no http server's folder can. Name the shards by braces: "
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
            f"data: {base} holds no .tar. If they lie in subfolders, name one with `split`, or all by braces: "
            f"{join(base, '{00..15}/{00000..00127}.tar')}"
        )
    return tars


def _facts_of_cache(source: SourceConfig, base: str, timeout: float) -> Manifest:
    """The manifest that is there already: of a cache, encoder, text length and padding cannot be seen in the shards."""
    where = source.manifest or join(base, MANIFEST)
    text = read_if_there(where, timeout)
    facts = None if text is None else Manifest.parse(text, where)
    if facts is None or facts.encoder is None:
        raise UserError(
            f"data: {source.uri} holds cached samples, and which encoder made them cannot be seen in the shards; "
            f"{'there is no' if facts is None else 'nor is it in'} {where}. `scfm data encode` writes its own manifest: copy "
            f"that, or encode again"
        )
    return facts


def _refuse_problems(source: SourceConfig, problems: list[str]) -> None:
    if not problems:
        return
    more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise UserError(
        f"data: no manifest was written for {source.uri}, of which {len(problems)} shards or samples cannot be used:\n  "
        + "\n  ".join(problems[:_SHOWN])
        + more
        + "\nMend or copy them again; or leave damaged shards out by the braces of the address, such as "
        "{{00000..00041},{00043..00127}}.tar"
    )


def _plain(error: UserError) -> str:
    return str(error).removeprefix("data: ")
