"""A run that stands still, or has lost a process, ends on every rank within a bounded time, and says which rank."""

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
"""Seconds between two signs of life of a rank."""


class Watchdog:
    """Every rank's pulse lies in the launcher's store: a step counter (`beat`) and a sign of life every `PULSE` seconds.

    Args:
        world: the processes.
        timeout: seconds without a `beat` after which this process ends itself.

    Within `with`, a thread watches. NCCL would otherwise abort the process without saying who was missing.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self._world, self._timeout = world, timeout
        self._last, self._where = time.monotonic(), "start"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="scfm watchdog")
        # A connection of its own: the training's may be blocked in a rendezvous.
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
        # Only collectives fail like this: gloo's and the store's errors are RuntimeErrors that torch derives from.
        if self._store is not None and isinstance(error, dist.DistError | RuntimeError) and _is_connection(error):
            raise PeerLost(f"{self.blame()} ({_first_line(error)})") from error

    def beat(self, where: str) -> None:
        """This rank is alive and at `where` ("step 12")."""
        self._last, self._where = time.monotonic(), where
        if self._store is not None:
            self._store.set(f"scfm/at/{self._world.rank}", where)

    def blame(self) -> str:
        """Which ranks are gone, or behind the others. Takes three pulses."""
        assert self._store is not None
        try:
            self._store.set(f"scfm/failed/{self._world.rank}", "1")
            before = [self._get("alive", rank) for rank in range(self._world.size)]
            time.sleep(3 * PULSE)
            after = [self._get("alive", rank) for rank in range(self._world.size)]
            # A rank that has noticed the failure and left is not the cause.
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
            # If the store's holder has gone, the training's own collective says so, or the time runs out below.
            with contextlib.suppress(RuntimeError):
                self._store.set(f"scfm/alive/{self._world.rank}", str(time.monotonic()))
                self._store.set(f"scfm/doing/{self._world.rank}", _doing())
            if time.monotonic() - self._last > self._timeout:
                print(
                    f"scfm: error: rank {self._world.rank} has stood at {self._where} for more than engine.timeout="
                    f"{self._timeout:g} s: {self.blame()}. The job ends; start it again to go on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(PeerLost.exit_code)


def _doing() -> str:
    """What the main thread is at: who waits in a collective is not who is waited for."""
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
