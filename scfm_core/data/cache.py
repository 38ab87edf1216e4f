"""Local copies of remote shards: keyed by address and hash, verified, limited in size, shared by processes and jobs.

A copy is written to `KEY.BYTES.part` under an flock on that very file, then renamed to `KEY`: a file without `.part` is
complete, and one with it takes the room that it will need. The lock ends with its process, however it ends, so that a kill -9 leaves at most a `.part` that nobody holds;
the next start takes it over or sweeps it. Deleting a copy that another process reads is harmless: its descriptor lives.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from scfm_core.data.remote import fetch
from scfm_core.data.schema import BadData
from scfm_core.errors import UserError
from scfm_core.files import mismatch

_PART = ".part"
_OURS = re.compile(r"[0-9a-f]{24}-")


class ShardCache:
    """A folder of copies.

    Args:
        folder: made if missing; on a local disk, for flock.
        limit: bytes above which the least recently used copies are deleted; none: no limit.
        timeout: seconds for one download, attempts and pauses included.

    Raises:
        UserError: if the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int | None, timeout: float) -> None:
        self.folder, self.limit, self.timeout = folder, limit, timeout
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache.dir: {folder} cannot be made ({error.strerror}). Choose another folder"
            ) from error

    def path(self, uri: str, sha256: str | None) -> Path:
        """Where the copy of a shard lies, if it is there."""
        key = hashlib.sha256(f"{uri}\n{sha256}".encode()).hexdigest()[:24]
        name = re.sub(r"[^\w.-]", "_", uri.rpartition("/")[2])[-80:]
        return self.folder / f"{key}-{name}"

    def get(
        self,
        uri: str,
        size: int,
        sha256: str | None,
        unpack: Callable[[bytes], bytes] | None = None,
        unpacked_size: int = 0,
    ) -> tuple[Path, bool]:
        """The path of a shard's copy, which is downloaded if need be, by one process while the others wait.

        The copy may be deleted, to make room, before the caller opens it: ask again then.

        Args:
            uri: of the object.
            size: its bytes.
            sha256: its hash, if known.
            unpack: from the object's content to the copy's, for a compressed shard.
            unpacked_size: bytes of the copy then.

        Returns:
            the path, and whether it was verified just now: a copy that was there already, or was unpacked, is not.

        Raises:
            BadData: if the object's content is twice not what the manifest says.
            UserError: if it cannot be downloaded, or the cache's disk is full.
        """
        copy, end = self.path(uri, sha256), time.monotonic() + self.timeout
        try:
            if self._touch(copy):
                return copy, False
            room = max(size, unpacked_size)
            with self._part(copy, room, end, uri) as part:
                if self._touch(copy):
                    return copy, False
                self._make_room(room, part, uri)
                self._download(uri, part, size, sha256, end)
                if unpack is not None:
                    part.write_bytes(unpack(part.read_bytes()))
                part.replace(copy)
                return copy, unpack is None
        except OSError as error:
            raise self._explained(error) from error

    def discard(self, uri: str, sha256: str | None) -> None:
        """Delete a copy that turned out to be damaged; the original is never touched."""
        self.path(uri, sha256).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what killed downloads left."""
        for part in self.folder.glob(f"*{_PART}"):
            with contextlib.suppress(OSError), part.open("rb") as file:
                if _locked(file) and _is_of(file, part):
                    part.unlink()

    def _touch(self, copy: Path) -> bool:
        """Mark as used now; whether it is there."""
        with contextlib.suppress(OSError):  # the cache may be read-only
            os.utime(copy)
        return copy.exists()

    @contextlib.contextmanager
    def _part(self, copy: Path, room: int, end: float, uri: str) -> Iterator[Path]:
        """`KEY.BYTES.part`, empty and held by this process alone. Waiting counts: else many processes would fail in turn."""
        part = copy.with_name(f"{copy.name}.{room}{_PART}")
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have cleaned up
            with part.open("ab") as file:
                while not _locked(file):
                    if time.monotonic() > end:
                        raise UserError(
                            f"data: {uri} could not be had within {self.timeout:.0f} s, in which another process tried to "
                            f"download it. If the storage is slow, raise data.cache.timeout"
                        )
                    time.sleep(0.02)
                # Whoever held it has renamed or deleted it meanwhile: this lock is then of another file.
                if _is_of(file, part):
                    file.truncate(0)
                    try:
                        yield part
                    finally:
                        if _is_of(file, part):  # not renamed: the copy was there, or the download failed
                            part.unlink(missing_ok=True)
                    return

    def _download(self, uri: str, part: Path, size: int, sha256: str | None, end: float) -> None:
        for attempt in (1, 2):
            fetch(uri, part, max(1.0, end - time.monotonic()))
            with part.open("rb") as file:
                wrong = mismatch(file, size, sha256)
            if wrong is None:
                return
            if attempt == 2:
                raise BadData(f"data: {uri} is corrupt, downloaded twice: {wrong}")

    def _make_room(self, size: int, own: Path, uri: str) -> None:
        if self.limit is None:
            return
        if size > self.limit:
            raise UserError(
                f"data.cache.limit_gb: {uri} alone has {size / 1e9:.3g} GB, the cache may have {self.limit / 1e9:.3g}. "
                f"Raise the limit"
            )
        with (self.folder / ".room").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            copies, taken = [], size
            for path in self.folder.iterdir():
                if not _OURS.match(path.name) or path == own:
                    continue  # somebody else's
                if path.name.endswith(_PART):
                    taken += int(path.name.split(".")[-2])
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    copies.append((status.st_mtime_ns, status.st_size, path))
                    taken += status.st_size
            for _, used, path in sorted(copies):
                if taken <= self.limit:
                    break
                path.unlink(missing_ok=True)
                taken -= used

    def _explained(self, error: OSError) -> UserError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return UserError(
                f"data.cache.dir: the disk of {self.folder} is full. Make room, or set data.cache.limit_gb below it"
            )
        return UserError(
            f"data.cache.dir: {self.folder} cannot be used ({error.strerror or error}). Choose another folder"
        )


def _is_of(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is what lies at `path` now."""
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _locked(file: IO[bytes]) -> bool:
    """Lock, unless another open file has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
