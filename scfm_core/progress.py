"""Progress of long work, which the watchdog looks at: code of any package can report it.

The time of the last report is in memory that forked processes share, so the workers of a loader count too.
"""

import contextlib
import mmap
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_TIME = struct.Struct("d")
_last = mmap.mmap(-1, _TIME.size)
_where = "start"


def start() -> None:
    """Begin to count, in this process and in those that it forks after that."""
    global _last
    _last = mmap.mmap(-1, _TIME.size)
    beat("start")


def beat(where: str | None = None) -> None:
    """Report progress: a file, a shard, a block of weights, a pass, a step is done. Cheap, and safe in threads.

    Args:
        where: what this process does now, as "step 12" or "hashing 00012.tar"; a message shows it if the run hangs. None: the
            same as before.
    """
    global _where
    if where is not None and threading.current_thread() is threading.main_thread():
        _where = where  # not that of a thread that writes a checkpoint beside the steps
    _TIME.pack_into(_last, 0, time.monotonic())  # one aligned word: a reader never sees half of it


def last() -> tuple[float, str]:
    """When this process or one of its workers reported progress, in seconds of `time.monotonic`; where this process is."""
    return _TIME.unpack_from(_last, 0)[0], _where


_MEGABYTE = 1 << 20


@contextlib.contextmanager
def counting_io(where: str) -> Iterator[None]:
    """Within `with`, each megabyte that this process reads or writes is progress: for libraries that download or load files.

    Args:
        where: as for `beat`.
    """
    beat(where)
    end = threading.Event()

    def watch() -> None:
        seen = _io()
        while not end.wait(1.0):
            if (now := _io()) - seen > _MEGABYTE:
                seen = now
                beat()

    thread = threading.Thread(target=watch, daemon=True, name="scfm progress")
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _io() -> int:
    """Bytes that this process has read and written so far, and has loaded into mapped memory; 0 if the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        faults = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()[9])
    except (OSError, ValueError, IndexError):
        return 0
    counts = dict(line.split(": ") for line in lines)
    return int(counts["rchar"]) + int(counts["wchar"]) + faults * mmap.PAGESIZE
