"""Progress of long work, which the watchdog counts: code of any package can report it."""

from collections.abc import Callable

_listener: Callable[[str], None] | None = None


def beat(where: str) -> None:
    """Report progress: a file, a shard, a block of weights, a step is done. Cheap, and safe in threads.

    Args:
        where: what this process does now, as "step 12" or "hashing shard 00012.tar"; a message shows it if the run hangs.
    """
    if _listener is not None:
        _listener(where)


def listen(listener: Callable[[str], None] | None) -> None:
    """Pass every later `beat` of this process to `listener`; None: to nobody."""
    global _listener
    _listener = listener
