"""Tar shards in webdataset's layout. The library writes them; a table of offsets gives random access to samples."""

import contextlib
import hashlib
import os
import re
import struct
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from scfm_core.data.schema import BadData, ShardEntry, Size, runs_of
from scfm_core.data.text import shown_name

_BLOCK = 512
_COMPRESSIONS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zX": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""First bytes of a compressed tar, and the program that decompresses it."""
# Suffixes of members that other loaders would unpickle or import. They are never run here, but in a data set they are a
# sign of an attack.
_HOSTILE_SUFFIXES = frozenset({"pyd", "pickle", "pkl", "pth", "pt", "ckpt", "py", "sh", "so", "dill", "joblib"})


class TarShard:
    """An open tar: random access to the fields of its samples. Members are read by offset, never extracted by name.

    Args:
        file: opened for reading; this object closes it.
        name: of the shard, for messages.

    Raises:
        BadData: if it is not an intact tar, or has a member that data must not have: a link, a path that leaves the
            folder, a pickle, or a name that occurs twice.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self.name = file, name
        self.keys: list[str] = []
        self._fields: list[dict[str, tuple[int, int]]] = []
        places: dict[str, int] = {}
        for member, offset, size in _members(file, name):
            folder, _, base = member.rpartition("/")
            stem, _, field = base.partition(".")
            field = field.lower()
            if member.startswith("/") or ".." in member.split("/") or field.rpartition(".")[2] in _HOSTILE_SUFFIXES:
                raise BadData(f"data: shard {name} has a member {member!r}, which is refused. Do not use this data set")
            if not stem or not field:
                continue  # LICENSE, .DS_Store, ._x.jpg: not part of a sample, as in webdataset
            key = f"{folder}/{stem}" if folder else stem
            place = places.setdefault(key, len(self.keys))
            if place == len(self.keys):
                self.keys.append(key)
                self._fields.append({})
            if field in self._fields[place]:
                raise BadData(f"data: shard {name} has the member {member!r} twice")
            self._fields[place][field] = (offset, size)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        """Name of sample `index`: the common part of its members' names."""
        return self.keys[index]

    def fields(self, index: int) -> list[str]:
        """Names of the fields of sample `index`."""
        return list(self._fields[index])

    def read(self, index: int, field: str) -> bytes | None:
        """One field of one sample, or None if the sample does not have it."""
        place = self._fields[index].get(field)
        return None if place is None else os.pread(self._file.fileno(), place[1], place[0])

    @property
    def end(self) -> int:
        """Offset in bytes after the last member, rounded up to a block. The end mark should begin here."""
        last = max(place + count for fields in self._fields for place, count in fields.values())
        return -(-last // _BLOCK) * _BLOCK

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _members(file: BinaryIO, name: str) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of every file in a tar.

    This function parses plain headers, about twenty times as fast as tarfile. For a tar with other headers (long names,
    extended headers) it uses tarfile.
    """
    descriptor = file.fileno()
    end, at, found = os.fstat(descriptor).st_size, 0, []
    for magic, program in _COMPRESSIONS.items():
        if os.pread(descriptor, len(magic), 0) == magic:
            raise BadData(
                f"data: shard {name} is compressed. Unpack it with `{program}`, because samples are read by offset"
            )
    while at + _BLOCK <= end:
        header = os.pread(descriptor, _BLOCK, at)
        if not header.strip(b"\0"):
            break  # the end mark, or an overwritten header: the number of samples in the manifest tells which
        kind, size = header[156:157], header[124:136]
        if kind not in (b"0", b"\0", b"5", b"x") or size[:1] >= b"\x80" or header[345:346] != b"\0":
            return _members_by_tarfile(file, name)
        try:
            if not re.fullmatch(rb"[ \0]*[0-7]*[ \0]*", size):  # int() would take a sign
                raise ValueError(f"a size is {size!r}")
            if int(header[148:156].strip(b"\0 "), 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
                raise ValueError("a header's checksum is wrong")
            count = int(size.strip(b"\0 ") or b"0", 8)
            member = shown_name(header[:100].partition(b"\0")[0].decode(errors="surrogateescape"))
        except ValueError as error:
            raise BadData(f"data: shard {name} is not an intact tar: at byte {at}, {error}") from error
        if at + _BLOCK + count > end:
            raise BadData(f"data: shard {name} is truncated: member {member!r} ends after the end of the file")
        if kind == b"x" and not _only_times(os.pread(descriptor, count, at + _BLOCK)):
            return _members_by_tarfile(file, name)
        if kind not in (b"5", b"x"):
            found.append((member, at + _BLOCK, count))
        at += _BLOCK + -(-count // _BLOCK) * _BLOCK
    if not found:
        raise BadData(f"data: shard {name} is not a tar, or is empty")
    return found


def _only_times(records: bytes) -> bool:
    """Whether an extended header (`LENGTH KEY=VALUE` lines) has only times, which are not needed.

    webdataset's writer stores the time of each member in an extended header.
    """
    keys = [line.partition(b" ")[2].partition(b"=")[0] for line in records.split(b"\n") if line]
    return all(key in (b"mtime", b"atime", b"ctime") for key in keys)


def _members_by_tarfile(file: BinaryIO, name: str) -> list[tuple[str, int, int]]:
    found, end = [], os.fstat(file.fileno()).st_size
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # only uncompressed tars: members are read by offset
            for member in tar:
                if member.issym() or member.islnk() or not (member.isfile() or member.isdir()) or member.issparse():
                    raise BadData(
                        f"data: shard {name} has a member {member.name!r} that is not a plain file. Do not use this data set"
                    )
                if member.size < 0 or member.offset_data + member.size > end:
                    raise BadData(
                        f"data: shard {name} is truncated: member {member.name!r} ends after the end of the file"
                    )
                if member.isfile():
                    found.append((shown_name(member.name), member.offset_data, member.size))
    except BadData:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, OSError, struct.error) as error:
        raise BadData(f"data: shard {name} is not an intact tar ({error})") from error
    return found


@dataclass(frozen=True)
class TarProgress:
    """How far a shard is written: what a killed process needs to continue it."""

    bytes: int
    sha256: str
    """Of these bytes, in hex: after a power failure the file may have other ones."""
    sizes: tuple[tuple[int, int, int], ...]
    """Runs of (height, width, samples), in pixels."""


class TarWriter:
    """Writes one shard to a temporary file, which is renamed when it is complete.

    On leaving the context without an error, `entry` is the shard's entry for the manifest. After an error the temporary
    file is deleted, unless `progress` was called.

    Args:
        path: `NAME.tar`; the temporary file is `NAME.tar.tmp`.
        resume: from `progress`, to continue the temporary file of a process that has ended.
    """

    resumed = False
    """Whether the temporary file is continued. False: it is missing or damaged, and the shard begins anew."""

    def __init__(self, path: Path, resume: TarProgress | None = None) -> None:
        self.path, self._unfinished = path, path.with_name(f"{path.name}.tmp")
        self._resume, self._keep, self._hashed = resume, False, 0
        self._sizes: list[Size | None] = []
        self._digest = hashlib.sha256()

    def __enter__(self) -> "TarWriter":
        from webdataset import TarWriter as LibraryWriter

        self._stream = self._continued() or self._unfinished.open("w+b")
        # No time stamps: equal input gives an equal hash.
        self._tar = LibraryWriter(self._stream, mtime=0, encoder=False)
        # The library's own stream would hold back the last 10 kB.
        self._tar.tarstream = tarfile.open(fileobj=self._stream, mode="w")
        return self

    def _continued(self) -> BinaryIO | None:
        """The temporary file up to `resume`; None if it does not have these bytes."""
        if self._resume is None or not self._unfinished.is_file():
            return None
        stream = self._unfinished.open("r+b")
        self._hash(stream, self._resume.bytes)
        if self._digest.hexdigest() != self._resume.sha256:
            stream.close()
            self._digest, self._hashed = hashlib.sha256(), 0
            return None
        stream.truncate(self._resume.bytes)
        stream.seek(self._resume.bytes)
        self._sizes += [(height, width) for height, width, count in self._resume.sizes for _ in range(count)]
        self.resumed = self._keep = True
        return stream

    def _hash(self, stream: BinaryIO, end: int) -> None:
        """Hash the bytes up to `end` that are not hashed yet."""
        while self._hashed < end and (
            part := os.pread(stream.fileno(), min(1 << 20, end - self._hashed), self._hashed)
        ):
            self._digest.update(part)
            self._hashed += len(part)

    def write(self, key: str, fields: Mapping[str, bytes], size: Size | None) -> None:
        """Append a sample; `size` is its height and width in pixels, if known."""
        self._tar.write({"__key__": key, **fields})
        self._sizes.append(size)

    def progress(self) -> TarProgress:
        """Give the samples so far to the operating system, so that a kill does not lose them. Their sizes must be known."""
        self._stream.flush()
        self._hash(self._stream, self._stream.tell())
        self._keep = True
        return TarProgress(
            self._hashed, self._digest.hexdigest(), runs_of([size for size in self._sizes if size is not None])
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._tar.close()
                self._stream.flush()
                os.fsync(self._stream.fileno())
                size = self._stream.seek(0, os.SEEK_END)
                self._hash(self._stream, size)
                known = [size for size in self._sizes if size is not None]
                self.entry = ShardEntry(
                    name=self.path.name,
                    samples=len(self._sizes),
                    bytes=size,
                    sha256=self._digest.hexdigest(),
                    sizes=runs_of(known) if len(known) == len(self._sizes) else (),
                )
                self._unfinished.replace(self.path)
        finally:
            with contextlib.suppress(OSError):
                self._stream.close()
            if not self._keep:
                self._unfinished.unlink(missing_ok=True)
