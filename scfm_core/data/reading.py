"""Reading of local files: by offset, and again after an error that may pass."""

import errno
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from scfm_core.data.text import shown_name
from scfm_core.errors import UserError
from scfm_core.progress import beat

T = TypeVar("T")

_MAY_PASS = frozenset(
    {
        errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO, errno.ENOLINK,
        errno.ENOBUFS, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN,
        errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EPIPE, errno.EPROTO, errno.ECOMM,
    }
)  # fmt: skip
"""What file systems of a network answer while a server restarts or evicts a client: NFS ESTALE, ETIMEDOUT and EIO, Lustre
ESHUTDOWN and ENOTCONN, FUSE ENOTCONN and EIO. A disk answers EIO for good, which costs the retries' time."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0
_THREADS, _PART = 16, 256
"""Reading small files waits for the disk, or for the network."""


def may_pass(error: BaseException) -> bool:
    """Whether an error of a file system may pass by itself."""
    return isinstance(error, OSError) and error.errno in _MAY_PASS


def retried(
    call: Callable[[], T], what: Callable[[], str], seconds: float, reset: Callable[[], None] = lambda: None
) -> T:
    """The result of `call()`, called again after errors that may pass, with growing pauses.

    Args:
        call: reads something.
        what: returns what is read, for messages.
        seconds: from now; after them the last error is final.
        reset: called before each further call, to drop what is open.

    Raises:
        UserError: if the errors did not pass; its cause is the last one.
        Exception: every other error of `call`, at once.
    """
    end, pause = time.monotonic() + seconds, 0.0
    while True:
        try:
            return call()
        except OSError as error:
            if not may_pass(error):
                raise
            if not pause:
                print(
                    f"warning: data: {what()}: {error.strerror}; it is read again, for up to {seconds:.0f} s",
                    flush=True,
                )
            pause = min(2 * pause, _LONGEST_PAUSE) or _FIRST_PAUSE
            if time.monotonic() + pause > end:
                raise UserError(
                    f"data: {what()} could not be read within {seconds:.0f} s; the last attempt failed with: {error}. Check its "
                    f"disk or network. If it needs longer to recover, raise data.cache.timeout"
                ) from error
        beat(f"waiting to read {what()} again")
        time.sleep(pause * random.uniform(0.5, 1.0))  # jitter, so that not all processes read again at once
        reset()


def read_in_threads(paths: Sequence[Path], read: Callable[[Path], T], seconds: float) -> list[T]:
    """`read(path)` of every path, again after errors that may pass for up to `seconds`; every 256 files are a sign of progress.

    Raises:
        UserError: as `retried`.
        Exception: every other error of `read`, at once.
    """

    def part(start: int) -> list[T]:
        return [
            retried(lambda path=path: read(path), lambda path=path: shown_name(str(path)), seconds)  # type: ignore[misc]
            for path in paths[start : start + _PART]
        ]

    found: list[T] = []
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for some in pool.map(part, range(0, len(paths), _PART)):
            found += some
            beat(f"reading {len(paths):,} files")
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def read_at(descriptor: int, offset: int, count: int) -> bytes:
    """Bytes `offset` to `offset + count - 1` of an open file; fewer only at its end.

    Files are read by pread and not by memory map: where a file is truncated, or its server is gone, a map ends the process
    with SIGBUS. pread returns fewer bytes, or raises.
    """
    content = os.pread(descriptor, count, offset)
    while len(content) < count and (more := os.pread(descriptor, count - len(content), offset + len(content))):
        content += more
    return content
