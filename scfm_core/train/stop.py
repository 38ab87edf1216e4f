"""Signals that ask a run to stop."""

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from scfm_core.launched import launched_rank

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""SIGTERM of Kubernetes and Slurm, SIGHUP of a closed terminal, the others of batch systems before a limit."""
_IGNORED_BY_SCRIPTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_early: list[int] = []


def remember_early() -> None:
    """Remember SIGTERM, USR1 and USR2 until a run listens, if they are ignored now. Call it at the start of the process.

    A job script starts the training with these signals ignored, and loading torch and the model takes half a minute, in
    which a signal would be lost. If they are not ignored, nothing changes, and a signal ends the process.
    """
    for number in _IGNORED_BY_SCRIPTS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda number, frame: _early.append(number))


class StopRequest:
    """A signal of `SIGNALS` requests a stop after the current step; a second SIGINT stops immediately."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Install the handlers, and restore the previous ones at the end. `nohup` ignores SIGHUP, and it stays ignored."""
        ignored = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else []
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS if number not in ignored}
        if _early:
            self.signal = _early[0]
            _early.clear()
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None and launched_rank() == 0:
            again = "; press again to stop now" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # the terminal may be gone; a handler must not use Python's buffers
                os.write(2, f"\n{signal.Signals(number).name}: stopping after this step, saving{again}\n".encode())
        self.signal = number
