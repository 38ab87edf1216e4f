"""Progress of long work, which the watchdog looks at: code of any package can report it.

The time of the last report is in memory that forked processes share, so the workers of a loader count too.
"""

import mmap
import struct
import time

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
    if where is not None:
        _where = where
    _TIME.pack_into(_last, 0, time.monotonic())  # one aligned word: a reader never sees half of it


def last() -> tuple[float, str]:
    """When this process or one of its workers reported progress, in seconds of `time.monotonic`; where this process is."""
    return _TIME.unpack_from(_last, 0)[0], _where
