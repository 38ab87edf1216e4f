"""Files as bytes: hashes, comparison with a manifest, fsync; locks; how many may be open; folders that can be written."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import io
import itertools
import os
import resource
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

from scfm_core.errors import UserError
from scfm_core.progress import beat

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""flock on Lustre without `flock`, on NFS without a lock daemon, on some FUSE file systems."""
_DISK = {
    errno.ENOSPC: ("No space left on device", "the disk is full"),
    errno.EDQUOT: ("Disk quota exceeded", "the quota of the disk is used up"),
    errno.EFBIG: ("File too large", "the file is larger than the system permits (`ulimit -f`)"),
    errno.EROFS: ("Read-only file system", "the file system is read-only"),
}
_PROBE_BYTES = 4096
_BUFFER_BYTES, _WRITE_BYTES, _SYNC_BYTES = 1 << 20, 64 << 20, 1 << 30


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """sha256 of an open file's whole content, in hex; moves the file's position."""
    file.seek(0)
    digest, name = hashlib.sha256(), f"hashing {Path(str(getattr(file, 'name', ''))).name}"
    buffer = memoryview(bytearray(1 << 20))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
        beat(name)
    return digest.hexdigest()


FileEntry = tuple[int, str]
"""Bytes and sha256 (hex) of a file."""
Written = Mapping[Path, FileEntry]
"""What a rank has written, by path."""


class _HashedBytes(io.FileIO):
    """What `HashedFile` writes, when its buffer is full."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.digest, self.count, self._unsynced = hashlib.sha256(), 0, 0
        self._place = f"writing {path.name}"

    def write(self, data: Any) -> int:
        """Write and hash the first part of `data`; returns its bytes."""
        part = memoryview(data).cast("B")[:_WRITE_BYTES]
        written = super().write(part)
        self.digest.update(part[:written])
        self.count += written
        self._unsynced += written
        if self._unsynced > _SYNC_BYTES:
            os.fdatasync(self.fileno())
            self._unsynced = 0
        beat(self._place)
        return written


class HashedFile(io.BufferedWriter):
    """A new file that is hashed while it is written, from its first byte to its last.

    It is flushed to the disk from time to time: a file of 30 GB would otherwise wait in memory for one long fsync, in which
    nothing shows that the disk works. Small writes are collected: `torch.save` makes forty of them for a tensor.
    """

    def __init__(self, path: Path) -> None:
        self._bytes = _HashedBytes(path)
        super().__init__(self._bytes, _BUFFER_BYTES)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Not possible: the hash follows the order of writing."""
        raise io.UnsupportedOperation("a file that is hashed while it is written cannot seek")

    @property
    def entry(self) -> FileEntry:
        """Bytes and hash of what was written so far."""
        if not self.closed:
            self.flush()
        return self._bytes.count, self._bytes.digest.hexdigest()

    def close(self) -> None:
        """Flush the file to the disk, and close it."""
        try:
            if not self.closed:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().close()


def mismatch(file: BinaryIO, size: int, sha256: str | None) -> str | None:
    """How an open file differs from its manifest.

    Args:
        file: opened for reading; its position moves.
        size: bytes, from the manifest.
        sha256: in hex, from the manifest; None: only the size is compared.

    Returns:
        the difference, as part of a sentence; None if the file matches.
    """
    found = os.fstat(file.fileno()).st_size
    if found != size:
        return f"it has {found} bytes, the manifest says {size}"
    if sha256 is None:
        return None
    digest = sha256_of(file)
    return None if digest == sha256 else f"its sha256 is {digest[:12]}..., the manifest says {sha256[:12]}..."


def link_or_copy(source: str, target: str) -> str:
    """Make `target` another name of a file that nobody changes any more, or a copy if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    beat(f"copying {Path(source).name}")
    return target


def permit_reading(path: Path) -> None:
    """Give a file, or every file and folder in a folder, the mode that a new one gets here: the umask decides.

    safetensors writes files of mode 0600, and copies keep the mode of their source.
    """
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
    probe.touch()  # os.umask cannot be read without a change, and a default ACL of the folder may decide too
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for entry in (path, *path.rglob("*")):
        entry.chmod(mode | (mode & 0o444) >> 2 if entry.is_dir() else mode)


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to disk, so that it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(file: IO[Any], *, wait: bool = False, shared: bool = False) -> bool | None:
    """Lock an open file (flock). The lock ends when the file is closed, or with the process.

    Args:
        file: the open file.
        wait: wait until another process gives the lock back.
        shared: a lock that several processes may hold at the same time.

    Returns:
        whether the lock was taken; None if the file system has no locks, which is said once.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn_no_locks(Path(str(file.name)).parent, error)
        return None
    return True


_warned: set[str] = set()


def _warn_no_locks(folder: Path, error: OSError) -> None:
    if "locks" not in _warned:
        _warned.add("locks")
        print(
            f"scfm: warning: the file system of {folder} has no file locks ({error.strerror}). Nothing prevents two "
            f"processes from writing the same files there: start each run only once",
            file=sys.stderr,
        )


def permit_open_files(wanted: int) -> int:
    """Raise this process's limit of open files, which is often 1,024; the processes that it starts inherit it.

    Args:
        wanted: files. Some containers permit a thousand million, through which other programs then loop.

    Returns:
        how many it may open now, `wanted` at most.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    permitted = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < permitted:
        with contextlib.suppress(OSError, ValueError):  # the system's own limit may be lower
            resource.setrlimit(resource.RLIMIT_NOFILE, (permitted, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file; also after a line that a killed process or a full disk has cut off."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def disk_problem(error: BaseException) -> str | None:
    """The failure of a disk behind an error, as part of a sentence; None if it is another error."""
    text = str(error)
    for number, (mark, reason) in _DISK.items():  # libraries in C++ and Rust report only the text
        if getattr(error, "errno", None) == number or mark in text:
            return reason
    return error.strerror or text if isinstance(error, OSError) else None


def is_disk_failure(error: BaseException) -> bool:
    """Whether a full, read-only or forbidden place is behind an error, or the lack of any for temporary files."""
    forbidden = isinstance(error, PermissionError) or "No usable temporary directory" in str(error)
    return forbidden or disk_problem(error) in {reason for _, reason in _DISK.values()}


def check_writable(folder: Path, what: str, advice: str) -> None:
    """Make a folder if it is missing, and write some bytes there: bad disks are found before the work and not after it.

    Args:
        folder: where a command will write.
        what: the option or key that names the folder, for the message.
        advice: the sentence that ends the message.

    Raises:
        UserError: if the disk is full or read-only, or the folder cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        reason = "it is a file" if folder.is_file() else disk_problem(error)
        raise UserError(f"{what}: {folder} cannot be written ({reason}). {advice}") from error


@contextlib.contextmanager
def saving(target: Path, what: str, advice: str, *partial: Path) -> Iterator[None]:
    """Within `with`, `target` is written. If the disk fails, `partial` is removed.

    Args:
        target: for the message.
        what, advice: as in `check_writable`.
        partial: files and folders that are incomplete if the block fails.

    Raises:
        UserError: if the disk fails; every other error remains as it is.
    """
    try:
        yield
    except BaseException as error:
        for path in partial:
            _remove(path)
        if isinstance(error, UserError) or (reason := disk_problem(error)) is None:
            raise
        raise UserError(f"{what}: {target} cannot be written ({reason}). {advice}") from error


@contextlib.contextmanager
def written_whole(path: Path, what: str, advice: str) -> Iterator[Path]:
    """Within `with`, write the path that this gives; at the end it is renamed to `path`. Errors as in `saving`.

    Args:
        path: a file; its folder is made.
        what, advice: as in `check_writable`.
    """
    # Libraries look at the suffix.
    with saving(path, what, advice), renamed_at_end(path, ending=f".tmp{path.suffix}") as partial:
        yield partial


@contextlib.contextmanager
def renamed_at_end(path: Path, *, ending: str = ".tmp") -> Iterator[Path]:
    """Within `with`, write the file or folder that this gives; at the end it is renamed to `path`.

    Others may write the same path at the same time, also from other machines: each has a name of its own, and a name shows its process.
    What a killed process of this machine has left is removed, and so is what the block leaves when it fails.

    Args:
        path: a file, which is replaced, or a folder, which must not exist at the end; the folder above is made.
        ending: of the name.

    Raises:
        UserError: if `path` is a folder that another process has written meanwhile.
    """
    host, name = machine(), f".{path.name.removesuffix(path.suffix)}."
    partial = path.with_name(f"{name}{host}-{os.getpid()}-{next(_numbers)}{ending}")
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.glob(f"{glob.escape(name + host)}-*{glob.escape(ending)}"):
        if not _is_alive(other.name.removeprefix(f"{name}{host}-").removesuffix(ending).partition("-")[0]):
            _remove(other)
    try:
        yield partial
        if partial.is_dir() and path.exists():
            raise UserError(
                f"{path} exists already: another process has written it. Choose another folder, or delete it"
            )
        partial.replace(path)
    finally:
        _remove(partial)


def machine() -> str:
    """A name of this machine, or of this container: containers of one machine may share its name, and count processes on their own."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        space = 0
    return f"{os.uname().nodename}-{space}"


_numbers = itertools.count()
"""Of the files of `renamed_at_end` in this process."""


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(process: str) -> bool:
    """Whether a process of this machine exists; True if that is unknown."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, OSError):
        return True
    return True
