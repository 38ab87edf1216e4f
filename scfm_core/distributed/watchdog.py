"""If a run hangs or loses a process, every rank ends within a bounded time with a message that names the rank."""

import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from scfm_core.distributed.world import World
from scfm_core.errors import PeerLost

PULSE = 1.0
"""Seconds between two heartbeats of a rank."""


class Watchdog:
    """Watches the ranks. Each writes its position (`beat`) and, every `PULSE` seconds, a heartbeat to the launcher's store.

    Used as a context manager: within `with`, a thread watches. Without it NCCL would abort the process and would not
    say which rank was missing.

    Args:
        world: the processes.
        timeout: seconds without a `beat` after which this process ends itself.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self._world, self._timeout = world, timeout
        self._last, self._where = time.monotonic(), "start"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="scfm watchdog")
        # A separate connection: the training's connection may be blocked in a rendezvous.
        self._store: Any = dist.distributed_c10d._get_default_store().clone() if world.size > 1 else None  # type: ignore[attr-defined]

    def __enter__(self) -> "Watchdog":
        self.beat("start")
        if self._store is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        # Errors of gloo and of the store are DistErrors or plain RuntimeErrors; only collectives raise them.
        if self._store is not None and isinstance(error, dist.DistError | RuntimeError) and _is_connection(error):
            raise PeerLost(f"{self.blame()} ({_first_line(error)})") from error

    def beat(self, where: str) -> None:
        """Report progress: this rank is at `where` ("step 12")."""
        self._last, self._where = time.monotonic(), where
        if self._store is not None:
            self._store.set(f"scfm/at/{self._world.rank}", where)

    def blame(self) -> str:
        """A sentence that names the ranks that are gone, or where each rank is. Takes three pulses."""
        assert self._store is not None
        try:
            self._store.set(f"scfm/failed/{self._world.rank}", "1")
            before = [self._get("alive", rank) for rank in range(self._world.size)]
            time.sleep(3 * PULSE)
            after = [self._get("alive", rank) for rank in range(self._world.size)]
            # A rank that noticed the failure and ended is not the cause.
            survivors = [rank for rank in range(self._world.size) if self._get("failed", rank) is not None]
            places = {
                rank: f"{self._get('at', rank) or 'start'} ({self._get('doing', rank) or 'unknown'})"
                for rank in range(self._world.size)
            }
        except RuntimeError:
            return "rank 0, or the launcher that holds the rendezvous store, is gone"
        gone = [rank for rank in places if before[rank] == after[rank] and rank not in survivors]
        if gone:
            return "; ".join(f"rank {rank} is gone, last seen at {places[rank]}" for rank in gone)
        return "no progress: " + ", ".join(f"rank {rank} is at {place}" for rank, place in places.items())

    def _get(self, kind: str, rank: int) -> str | None:
        assert self._store is not None
        key = f"scfm/{kind}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _watch(self) -> None:
        assert self._store is not None
        while not self._stop.wait(PULSE):
            # If the process with the store is gone, the training's own collective fails, or the timeout below applies.
            with contextlib.suppress(RuntimeError):
                self._store.set(f"scfm/alive/{self._world.rank}", str(time.monotonic()))
                self._store.set(f"scfm/doing/{self._world.rank}", _current_function())
            if time.monotonic() - self._last > self._timeout:
                print(
                    f"scfm: error: rank {self._world.rank} has been at {self._where} for more than engine.timeout="
                    f"{self._timeout:g} s: {self.blame()}. The job ends; start it again to resume from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(PeerLost.exit_code)


def _current_function() -> str:
    """The main thread's current function. A rank that waits in a collective is not the one that the others wait for."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "ended"
    return f"in {frame.f_code.co_name}, {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _is_connection(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("connection closed", "connection reset", "gloo", "timed out", "broken pipe", "nccl")
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
