"""Local copies of remote shards: keyed by address and hash, verified, limited in size, shared by processes and jobs.

A copy is written to `KEY.part` under an flock on that very file, then renamed to `KEY`: a file without `.part` is
complete. The lock ends with its process, however it ends, so that a kill -9 leaves at most a `.part` that nobody holds;
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
from typing import IO, BinaryIO

from scfm_core.data.remote import fetch
from scfm_core.data.schema import BadData
from scfm_core.errors import UserError

_PART = ".part"


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
        self, uri: str, size: int, sha256: str | None, unpack: Callable[[bytes], bytes] | None = None
    ) -> tuple[Path, bool]:
        """The path of a shard's copy, which is downloaded if need be, by one process while the others wait.

        The copy may be deleted, to make room, before the caller opens it: ask again then.

        Args:
            uri: of the object.
            size: its bytes.
            sha256: its hash, if known.
            unpack: from the object's content to the copy's, for a compressed shard.

        Returns:
            the path, and whether it was verified just now: a copy that was there already is not looked into.

        Raises:
            BadData: if the object's content is twice not what the manifest says.
            UserError: if it cannot be downloaded, or the cache's disk is full.
        """
        copy, end = self.path(uri, sha256), time.monotonic() + self.timeout
        if self._touch(copy):
            return copy, False
        with self._part(copy, end, uri) as part:
            if self._touch(copy):
                return copy, False
            self._make_room(size, uri)
            try:
                self._download(uri, part, size, sha256, end)
                if unpack is not None:
                    part.write_bytes(unpack(part.read_bytes()))
            except OSError as error:
                part.unlink(missing_ok=True)
                raise self._no_room(error) from error
            except UserError:
                part.unlink(missing_ok=True)
                raise
            part.replace(copy)
            return copy, True

    def discard(self, uri: str, sha256: str | None) -> None:
        """Delete a copy that turned out to be damaged; the original is never touched."""
        self.path(uri, sha256).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what killed downloads left."""
        for part in self.folder.glob(f"*{_PART}"):
            with contextlib.suppress(OSError), part.open("rb") as file:
                if _locked(file):
                    part.unlink()

    def _touch(self, copy: Path) -> bool:
        """Mark as used now; whether it is there."""
        try:
            os.utime(copy)
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def _part(self, copy: Path, end: float, uri: str) -> Iterator[Path]:
        """`KEY.part`, empty and held by this process alone. Waiting counts: else many processes would fail in turn."""
        part = copy.with_name(copy.name + _PART)
        while True:
            with part.open("ab") as file:
                while not _locked(file):
                    if time.monotonic() > end:
                        raise UserError(
                            f"data: {uri} could not be had within {self.timeout:.0f} s, in which another process tried to "
                            f"download it. If the storage is slow, raise data.cache.timeout"
                        )
                    time.sleep(0.02)
                # Whoever held it has renamed or deleted it meanwhile: this lock is then of another file.
                with contextlib.suppress(FileNotFoundError):
                    if os.fstat(file.fileno()).st_ino == part.stat().st_ino:
                        file.truncate(0)
                        yield part
                        with contextlib.suppress(OSError):
                            if os.fstat(file.fileno()).st_ino == part.stat().st_ino:
                                part.unlink()  # not renamed: the copy was there, or the download failed
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

    def _make_room(self, size: int, uri: str) -> None:
        if self.limit is None:
            return
        if size > self.limit:
            raise UserError(
                f"data.cache.limit_gb: {uri} alone has {size / 1e9:.3g} GB, the cache may have {self.limit / 1e9:.3g}. "
                f"Raise the limit"
            )
        with (self.folder / ".room").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            copies = []
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if path.name != ".room":
                        status = path.stat()
                        copies.append((status.st_mtime_ns, status.st_size, path))
            excess = sum(copy[1] for copy in copies) + size - self.limit
            for _, used, path in sorted(copies):
                if excess <= 0:
                    break
                if not path.name.endswith(_PART):
                    path.unlink(missing_ok=True)
                    excess -= used

    def _no_room(self, error: OSError) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return UserError(
                f"data.cache.dir: the disk of {self.folder} is full. Make room, or set data.cache.limit_gb below it"
            )
        return error


def _locked(file: IO[bytes]) -> bool:
    """Lock, unless another open file has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def mismatch(file: BinaryIO, size: int, sha256: str | None) -> str | None:
    """What is wrong with a file's content, or None."""
    found = os.fstat(file.fileno()).st_size
    if found != size:
        return f"it has {found} bytes, the manifest says {size}"
    if sha256 is None:
        return None
    digest = sha256_of(file)
    return None if digest == sha256 else f"its sha256 is {digest[:12]}..., the manifest says {sha256[:12]}..."


def sha256_of(file: BinaryIO) -> str:
    """sha256 of a file from its start, in hex."""
    file.seek(0)
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return sha256_of(file)
