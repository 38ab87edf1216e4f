"""Signals that ask a run to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_early: list[int] = []


def remember_early() -> None:
    """Keep Slurm's signals from now on until a run listens, instead of ignoring them; for a process's first lines.

    A job script starts the training with SIGTERM and USR2 ignored, and loading torch and the model takes half a minute, in
    which a warning would be lost. Where they are not ignored nothing changes: a start may be killed.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda number, frame: _early.append(number))


class StopRequest:
    """SIGTERM, SIGINT and USR2 ask for a stop at the next step boundary; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Install the handlers; the old ones come back afterwards."""
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        if _early:
            self.signal = _early[0]
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
