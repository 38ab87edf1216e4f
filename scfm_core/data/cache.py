"""Local copies of remote shards: verified, limited in size, shared by processes and jobs.

The name of a copy is a hash of its address and sha256. A partial download is `KEY.BYTES.part`; its process holds an
flock on that very file and renames it to `KEY` when it is complete. BYTES reserves the space that the copy will need.
The lock ends with its process, also after kill -9; the next process to start takes over or deletes the partial
download. It is safe to delete a copy while another process reads it: the open file descriptor stays valid.
"""

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from scfm_core.data.reading import may_pass
from scfm_core.data.remote import fetch
from scfm_core.data.schema import BadData
from scfm_core.errors import UserError
from scfm_core.file_systems import is_memory, is_network, type_of
from scfm_core.files import lock_file, machine, mismatch

_HOME = "~/.cache/scfm/shards"
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
"""Of Slurm, PBS, LSF and Grid Engine: a process with one of these variables is in a batch job."""
_DISKS_OF_JOBS = ("SLURM_TMPDIR", "LOCAL_SCRATCH", "TMPDIR")
"""Variables that name a folder of the job on the machine's disk. Most clusters have one; the scheduler deletes the folder
at the job's end."""
_PART = ".part"
_COPY_NAME = re.compile(r"[0-9a-f]{24}-")


def cache_folder(setting: str | None) -> Path:
    """The folder of the cache on this machine; it may not exist yet.

    Args:
        setting: `data.cache.dir`. None: a folder of the batch job on a local disk (not in memory, not on a network), if the
            scheduler names one, else one below the home.
    """
    if setting is not None:
        return Path(setting).expanduser()
    if any(name in os.environ for name in _JOBS):
        for place in (Path(os.environ[name]) for name in _DISKS_OF_JOBS if os.environ.get(name)):
            kind = type_of(place)
            if os.access(place, os.W_OK) and not is_network(kind) and not is_memory(kind):
                return place / f"scfm-{os.getuid()}" / "shards"  # /tmp is everybody's
    return Path(_HOME).expanduser()


def warn_of_network(folder: Path) -> None:
    """Say that the cache is on a network, which most often has a quota, and is slower than a disk."""
    kind = type_of(folder)
    if is_network(kind):
        print(
            f"warning: data.cache.dir: {folder}, for copies of remote shards, is on a network file system ({kind}). Set "
            f"data.cache.dir to a folder on a local disk of each machine",
            flush=True,
        )


class ShardCache:
    """A folder of copies.

    Args:
        folder: made if missing. On a file system without flock, several processes may download the same shard.
        limit: bytes. Above it the least recently used copies are deleted (evicted). None: no limit.
        timeout: seconds for one download, with all retries and the pauses between them.

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
        """The path of a shard's copy, which may not exist yet."""
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
        """The path of a shard's copy. If there is none, one process downloads it, and the others wait.

        The copy may be evicted before the caller opens it. The caller must then call again.

        Args:
            uri: of the object.
            size: its bytes.
            sha256: its hash in hex, if known.
            unpack: decompresses the object's content, for a compressed shard.
            unpacked_size: bytes of a decompressed copy.

        Returns:
            the path, and whether this call downloaded and verified it. Not verified are a copy that existed before and
            a decompressed one.

        Raises:
            BadData: if the object's content differs from the manifest in two downloads.
            UserError: if it cannot be downloaded, or the cache's disk is full.
            OSError: of the cache's disk, if it may pass.
        """
        copy, end = self.path(uri, sha256), time.monotonic() + self.timeout
        try:
            if self._mark_used(copy):
                return copy, False
            space = max(size, unpacked_size)
            with self._partial_download(copy, space, end, uri) as part:
                if self._mark_used(copy):
                    return copy, False
                self._evict(space, part, uri)
                self._download(uri, part, size, sha256, end)
                if unpack is not None:
                    part.write_bytes(unpack(part.read_bytes()))
                part.replace(copy)
                return copy, unpack is None
        except OSError as error:
            if may_pass(error):
                raise
            raise self._user_error(error) from error

    def discard(self, uri: str, sha256: str | None) -> None:
        """Delete a corrupt copy; the original is never touched."""
        self.path(uri, sha256).unlink(missing_ok=True)

    def mark_used(self, uri: str, sha256: str | None) -> None:
        """Mark a copy, if it exists, as the most recently used one."""
        self._mark_used(self.path(uri, sha256))

    def sweep(self) -> None:
        """Delete the partial downloads of killed processes."""
        for part in self.folder.glob(f"*{_PART}"):
            with contextlib.suppress(OSError), part.open("r+b") as file:  # NFS locks no file that is only read
                if lock_file(file) and _is_same_file(file, part):
                    part.unlink()

    def _mark_used(self, copy: Path) -> bool:
        """Mark a copy as the most recently used one; False if it does not exist."""
        with contextlib.suppress(OSError):  # the cache may be read-only
            # Only the time of access: that of the content shows whether the copy has changed since it was hashed.
            os.utime(copy, ns=(time.time_ns(), copy.stat().st_mtime_ns))
        return copy.exists()

    @contextlib.contextmanager
    def _partial_download(self, copy: Path, space: int, end: float, uri: str) -> Iterator[Path]:
        """`KEY.BYTES.part`, empty and locked by this process.

        The time of waiting for the lock counts towards the timeout. Otherwise each of many processes would wait for its
        predecessor, then try for the whole timeout, and fail.
        """
        part = copy.with_name(f"{copy.name}.{space}{_PART}")
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)  # it may have been deleted meanwhile
            with part.open("ab") as file:
                while (is_locked := lock_file(file)) is False:
                    if time.monotonic() > end:
                        raise UserError(
                            f"data: {uri} was not available within {self.timeout:.0f} s, while another process tried to "
                            f"download it. If the storage is slow, raise data.cache.timeout"
                        )
                    time.sleep(0.02)
                if is_locked is None:  # no locks: each process downloads into a file of its own
                    part.unlink(missing_ok=True)
                    own = copy.with_name(f"{copy.name}.{machine()}-{os.getpid()}.{space}{_PART}")
                    try:
                        yield own
                    finally:
                        own.unlink(missing_ok=True)
                    return
                # The last owner of the lock may have renamed or deleted the file. Then this lock is on another file.
                if _is_same_file(file, part):
                    file.truncate(0)
                    try:
                        yield part
                    finally:
                        if _is_same_file(file, part):  # not renamed: the copy exists already, or the download failed
                            part.unlink(missing_ok=True)
                    return

    def _download(self, uri: str, part: Path, size: int, sha256: str | None, end: float) -> None:
        for attempt in (1, 2):
            fetch(uri, part, max(1.0, end - time.monotonic()))
            with part.open("rb") as file:
                difference = mismatch(file, size, sha256)
            if difference is None:
                return
            if attempt == 2:
                raise BadData(f"data: {uri} is corrupt, after two downloads: {difference}")

    def _evict(self, size: int, own: Path, uri: str) -> None:
        """Delete the least recently used copies until `size` bytes fit into the limit."""
        if self.limit is None:
            return
        if size > self.limit:
            raise UserError(
                f"data.cache.limit_gb: {uri} alone has {size / 1e9:.3g} GB, the limit is {self.limit / 1e9:.3g} GB. "
                f"Raise the limit"
            )
        with (self.folder / ".room").open("w", encoding="utf-8") as lock:
            lock_file(lock, wait=True)
            copies, total = [], size
            for path in self.folder.iterdir():
                if not _COPY_NAME.match(path.name) or path == own:
                    continue  # not a file of the cache
                if path.name.endswith(_PART):
                    total += int(path.name.split(".")[-2])
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    copies.append((status.st_atime_ns, status.st_size, path))
                    total += status.st_size
            for _, size_of_copy, path in sorted(copies):
                if total <= self.limit:
                    break
                path.unlink(missing_ok=True)
                total -= size_of_copy

    def _user_error(self, error: OSError) -> UserError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return UserError(
                f"data.cache.dir: the disk of {self.folder} is full. Free some space, or set data.cache.limit_gb below its size"
            )
        return UserError(
            f"data.cache.dir: {self.folder} cannot be used ({error.strerror or error}). Choose another folder"
        )


def _is_same_file(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
