"""Tar shards in webdataset's layout. The library writes them; a table of offsets gives random access to samples."""

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from scfm_core.data.reading import read_at
from scfm_core.data.schema import BadData, ShardEntry, Size, runs_of
from scfm_core.data.tar_table import TarTable, parse_tar


class TarShard:
    """An open tar: random access to the fields of its samples. Members are read by offset, never extracted by name.

    Args:
        file: opened for reading; this object closes it.
        name: of the shard, for messages.
        table: of the same tar, from an earlier opening. None: it is parsed.

    Raises:
        BadData, OSError: as `parse_tar`.
    """

    def __init__(self, file: BinaryIO, name: str, table: TarTable | None = None) -> None:
        self._file, self.name = file, name
        self.table = parse_tar(file, name) if table is None else table

    def __len__(self) -> int:
        return len(self.table)

    def key(self, index: int) -> str:
        """Name of sample `index`: the common part of its members' names."""
        return self.table.key(index)

    def fields(self, index: int) -> list[str]:
        """Names of the fields of sample `index`."""
        return self.table.fields_of(index)

    def read(self, index: int, field: str) -> bytes | None:
        """One field of one sample, or None if the sample does not have it.

        Raises:
            BadData: if the tar was truncated since it was opened.
        """
        place = self.table.place(index, field)
        if place is None:
            return None
        content = read_at(self._file.fileno(), *place)
        if len(content) < place[1]:
            raise BadData(
                f"data: shard {self.name} is truncated: {self.key(index)}.{field} ends after the end of the file"
            )
        return content

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
