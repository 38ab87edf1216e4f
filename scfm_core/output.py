"""Output that may be lost: a closed pipe, a terminal that is gone, a log on a full disk end no run."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ESTALE)


class _Surviving:
    """A text stream whose writes never fail. After the reader is gone, everything goes to /dev/null."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if error.errno not in _GONE:
            return  # a log on a full disk: there may be room later
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # also for what is in the buffer, and for libraries
            os.close(null)


def prepare_streams() -> None:
    """Make the standard streams safe to write to.

    Closed ones (`>&-`) are connected to /dev/null: else the next file that is opened gets their number. In a locale without
    UTF-8, other characters are written as escapes.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            assert null == number
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # it flushes the stream, whose reader may be gone
                stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def surviving_output(*names: str) -> Iterator[None]:
    """Within `with`, writes to these streams (`stdout`, `stderr`) raise no OSError."""
    before = {name: getattr(sys, name) for name in names}
    for name, stream in before.items():
        if stream is not None and not isinstance(stream, _Surviving):
            setattr(sys, name, _Surviving(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            if (wrapped := getattr(sys, name)) is not None:
                wrapped.flush()
            setattr(sys, name, stream)
