"""Which shards were hashed on this machine, and have not changed since."""

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import BinaryIO

from scfm_core.data.index import ShardEntry
from scfm_core.data.machine import alone, warn_once
from scfm_core.files import mismatch

_MARK = 32
"""Bytes of a mark."""
_SETTLED = 2_000_000_000
"""Nanoseconds. A file that was changed a moment ago may change again within the same tick of the file system's clock, so its
time does not show that."""


class Verified:
    """A mark for each shard of a data set: a hash of its name, sha256, size, inode and times. It is valid as long as the file
    has these.

    So a shard is hashed once on a machine, by one process while the others wait. It is hashed again if the file is written or
    replaced. What changes bytes without the file system is not noticed: a disk that returns other bytes without an error.

    Args:
        path: of the file with the marks; made when it is needed. If it cannot be written, which is said once, every process
            hashes.
        patience: seconds to wait for another process that is hashing a shard.
    """

    def __init__(self, path: Path, patience: float) -> None:
        self._path, self._patience = path, patience

    def difference(
        self, number: int, file: BinaryIO, entry: ShardEntry, *, is_copy: bool, again: bool = False
    ) -> str | None:
        """How a shard differs from the manifest, as `files.mismatch`; it is hashed if it has no valid mark.

        Args:
            number: of the shard.
            file: opened for reading.
            entry: of the shard, with a hash.
            is_copy: it is in the cache, where only this project writes.
            again: hash it in any case.

        Raises:
            OSError: if the shard cannot be read.
        """
        mark = _mark(file, entry, is_copy)
        if not again and self._read(number) == mark:
            return None
        with contextlib.ExitStack() as stack:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                lock = self._path.with_name(f"{self._path.name}-{number}.lock")
                stack.enter_context(alone(lock, self._patience, f"hashing {entry.name}"))
            except OSError as error:
                self._warn(error)
            if not again and self._read(number) == mark:
                return None
            difference = mismatch(file, entry.bytes, entry.sha256)
            if difference is not None:
                self._write(number, bytes(_MARK))
            elif is_copy or _age(file) > _SETTLED:
                self._write(number, mark)
            return difference

    def add(self, number: int, file: BinaryIO, entry: ShardEntry) -> None:
        """Mark a copy that was verified while it was downloaded."""
        self._write(number, _mark(file, entry, is_copy=True))

    def _read(self, number: int) -> bytes | None:
        try:
            with self._path.open("rb") as file:
                return os.pread(file.fileno(), _MARK, number * _MARK)
        except OSError:
            return None

    def _write(self, number: int, mark: bytes) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(descriptor, mark, number * _MARK)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        reason = f"data.cache.dir: {self._path.parent} cannot be used ({error.strerror})"
        warn_once(f"{reason}. Every process hashes the shards that it reads")


def _mark(file: BinaryIO, entry: ShardEntry, is_copy: bool) -> bytes:
    status = os.fstat(file.fileno())
    # The cache sets the time of the last use of its copies, and the system then sets that of the last change. Only the latter
    # cannot be set by a program; of other files it shows also a change after which `touch` or `cp -p` has set back the time.
    changed = 0 if is_copy else status.st_ctime_ns
    text = f"{entry.name}:{entry.sha256}:{status.st_size}:{status.st_ino}:{status.st_mtime_ns}:{changed}"
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _age(file: BinaryIO) -> int:
    status = os.fstat(file.fileno())
    return time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns)
