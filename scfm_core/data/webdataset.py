"""Tar shards in webdataset's layout: the library writes them; a table of offsets reads any sample of them."""

import contextlib
import os
import re
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from scfm_core.data.schema import BadData, ShardEntry, Size, runs_of
from scfm_core.files import sha256_of

_BLOCK = 512
# Members that other loaders would unpickle or import; nothing of ours would run them, but who ships them means harm.
_HOSTILE = frozenset({"pyd", "pickle", "pkl", "pth", "pt", "ckpt", "py", "sh", "so", "dill", "joblib"})


class TarShard:
    """Any field of any sample of one open tar. Members are read by offset, never extracted by name.

    Args:
        file: opened for reading; belongs to this object from now on.
        name: for messages.

    Raises:
        BadData: if it is no intact tar, or has a member that has no business in data: a link, a path that leads out, a
            pickle, or one name twice.
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
            if member.startswith("/") or ".." in member.split("/") or field.rpartition(".")[2] in _HOSTILE:
                raise BadData(f"data: shard {name} has a member {member!r}, which is refused. Do not use this data set")
            if not stem or not field:
                continue  # LICENSE, .DS_Store, ._x.jpg: no sample's, for webdataset either
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
        """Name of sample `index`: what its members' names share."""
        return self.keys[index]

    def fields(self, index: int) -> list[str]:
        """What sample `index` has."""
        return list(self._fields[index])

    def read(self, index: int, field: str) -> bytes | None:
        """One field of one sample, or None if it has no such field."""
        place = self._fields[index].get(field)
        return None if place is None else os.pread(self._file.fileno(), place[1], place[0])

    @property
    def end(self) -> int:
        """Where the last member ends, in whole blocks: there the end mark should begin."""
        last = max(place + count for fields in self._fields for place, count in fields.values())
        return -(-last // _BLOCK) * _BLOCK

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _members(file: BinaryIO, name: str) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of every file in a tar.

    Plain headers are read here, some twenty times as fast as by tarfile, which takes over where there are others (long
    names, extended headers).
    """
    descriptor = file.fileno()
    end, at, found = os.fstat(descriptor).st_size, 0, []
    while at + _BLOCK <= end:
        header = os.pread(descriptor, _BLOCK, at)
        if not header.strip(b"\0"):
            break  # the end mark; a zeroed header looks alike, and the manifest's count tells them apart
        kind, size = header[156:157], header[124:136]
        if kind not in (b"0", b"\0", b"5", b"x") or size[:1] >= b"\x80" or header[345:346] != b"\0":
            return _members_by_tarfile(file, name)
        try:
            if not re.fullmatch(rb"[ \0]*[0-7]*[ \0]*", size):  # int() would take a sign
                raise ValueError(f"a size is {size!r}")
            if int(header[148:156].strip(b"\0 "), 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
                raise ValueError("a header's checksum is wrong")
            count = int(size.strip(b"\0 ") or b"0", 8)
            member = header[:100].partition(b"\0")[0].decode()
        except ValueError as error:  # UnicodeDecodeError is one
            raise BadData(f"data: shard {name} is no intact tar: at byte {at}, {error}") from error
        if at + _BLOCK + count > end:
            raise BadData(f"data: shard {name} is cut: member {member!r} ends behind the file's end")
        if kind == b"x" and not _only_times(os.pread(descriptor, count, at + _BLOCK)):
            return _members_by_tarfile(file, name)
        if kind not in (b"5", b"x"):
            found.append((member, at + _BLOCK, count))
        at += _BLOCK + -(-count // _BLOCK) * _BLOCK
    if not found:
        raise BadData(f"data: shard {name} is no tar, or an empty one")
    return found


def _only_times(records: bytes) -> bool:
    """Whether an extended header (`LENGTH KEY=VALUE` lines) says nothing that matters: webdataset's writer stores each
    member's time in one."""
    keys = [line.partition(b" ")[2].partition(b"=")[0] for line in records.split(b"\n") if line]
    return all(key in (b"mtime", b"atime", b"ctime") for key in keys)


def _members_by_tarfile(file: BinaryIO, name: str) -> list[tuple[str, int, int]]:
    found, end = [], os.fstat(file.fileno()).st_size
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # uncompressed alone: offsets
            for member in tar:
                if member.issym() or member.islnk() or not (member.isfile() or member.isdir()) or member.issparse():
                    raise BadData(
                        f"data: shard {name} has a member {member.name!r} that is no plain file. Do not use this data set"
                    )
                if member.size < 0 or member.offset_data + member.size > end:
                    raise BadData(f"data: shard {name} is cut: member {member.name!r} ends behind the file's end")
                if member.isfile():
                    found.append((member.name, member.offset_data, member.size))
    except BadData:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, OSError, struct.error) as error:
        raise BadData(f"data: shard {name} is no intact tar ({error})") from error
    return found


class TarWriter:
    """One shard, written aside and renamed when it is complete.

    Args:
        path: `NAME.tar`; `NAME.tar.tmp` while it is written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._aside = path, path.with_name(f"{path.name}.tmp")
        self._sizes: list[Size | None] = []

    def __enter__(self) -> "TarWriter":
        from webdataset import TarWriter as Library

        self._stream = self._aside.open("w+b")
        self._tar = Library(self._stream, mtime=0, encoder=False)  # no clock: equal input, equal hash
        return self

    def write(self, key: str, fields: Mapping[str, bytes], size: Size | None) -> None:
        """Append a sample; `size` is its height and width in pixels, if known."""
        self._tar.write({"__key__": key, **fields})
        self._sizes.append(size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._tar.close()
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
                sha256 = sha256_of(self._stream)
                known = [size for size in self._sizes if size is not None]
                self.entry = ShardEntry(
                    name=self.path.name,
                    samples=len(self._sizes),
                    bytes=self._aside.stat().st_size,
                    sha256=sha256,
                    sizes=runs_of(known) if len(known) == len(self._sizes) else (),
                )
                self._aside.replace(self.path)
        except OSError:
            if kind is None:
                raise
        finally:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._aside.unlink(missing_ok=True)
