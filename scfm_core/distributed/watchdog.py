"""If a run hangs or loses a process, every rank ends within a bounded time with a message that names the rank.

It is the only clock of a run: collectives themselves wait almost forever (`world.PATIENCE`). So a slow rank is not lost as long
as any rank reports progress, and a message comes before NCCL would abort the process without naming the missing rank.
"""

import contextlib
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from scfm_core import progress
from scfm_core.errors import PeerLost

PULSE = 1.0
"""Seconds between two heartbeats of a rank: two requests to the store."""
_LONGEST_BLAME = 7 * PULSE + 15
"""Seconds after which the store itself is to blame."""
_STORE_IS_GONE = "rank 0, or the launcher that holds the rendezvous store, is gone"


class _Imports:
    """Counts imports as progress: from a network file system, by many ranks at once, those of transformers may take minutes."""

    @staticmethod
    def find_spec(*_: object) -> None:
        progress.beat()


class Watchdog:
    """Watches the ranks of a run. Each counts its progress in the store, and writes a heartbeat every `PULSE` seconds.

    Used as a context manager: within `with`, one thread talks to the store, and one has the clock. A request to the store of a process
    that is frozen, or of a machine without power, waits far longer than any timeout of it.

    Args:
        store: of the launcher, connected; None: a single process, which nobody waits for.
        rank, size: of this process, and number of processes.
        timeout: seconds without progress of any rank (`scfm_core.progress`) after which each process ends itself.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self._rank, self._size, self._timeout = rank, size, timeout
        self._limit = f"engine.timeout={timeout:g} s"
        self._stop = threading.Event()
        self._moved = time.monotonic()
        """When the progress of any rank was last seen."""
        # A separate connection: the training's connection may be blocked in a rendezvous.
        self._store = None if store is None else store.clone()
        self._pulses = 0

    def __enter__(self) -> "Watchdog":
        progress.start()
        if self._store is not None:
            self._pulse()
            self._moved = time.monotonic()
            for name, loop in (("heartbeat", self._talk), ("watchdog", self._watch)):
                threading.Thread(target=loop, daemon=True, name=f"scfm {name}").start()
            sys.meta_path.insert(0, _Imports)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if _Imports in sys.meta_path:
            sys.meta_path.remove(_Imports)

    @contextlib.contextmanager
    def at_most(self, seconds: float, where: str) -> Iterator[None]:
        """A shorter timeout for work that is known to be short; `where` is reported as progress."""
        progress.beat(where)
        usual = self._timeout, self._limit
        if seconds < self._timeout:
            self._timeout, self._limit = seconds, f"{seconds:g} s"
        try:
            yield
        finally:
            self._timeout, self._limit = usual

    @contextlib.contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Raise PeerLost in place of the error of a collective whose connection to another rank broke."""
        try:
            yield
        except Exception as error:
            if self._store is None or not is_connection_error(error):
                raise
            raise PeerLost(f"{self.blame()} ({_first_line(error)})") from error

    def blame(self) -> str:
        """A sentence that names the ranks that are gone, or where each rank is. Takes three pulses, or `_LONGEST_BLAME`."""
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(self._ask()), daemon=True, name="scfm blame")
        thread.start()
        thread.join(_LONGEST_BLAME)
        return found[0] if found else _STORE_IS_GONE

    def _ask(self) -> str:
        """The first rank that asks reads the heartbeats of all ranks; the others read its sentence."""
        assert self._store is not None
        try:
            self._store.append("scfm/failed", f"{self._rank} ")
            if self._store.add("scfm/blames", 1) == 1:
                sentence = self._verdict()
                self._store.set("scfm/verdict", sentence)
                time.sleep(PULSE)  # this process may hold the store, which the others still read
                return sentence
            with contextlib.suppress(dist.DistStoreError):  # the rank that reads has ended
                self._store.wait(["scfm/verdict"], timedelta(seconds=3 * PULSE + 10))
                return str(self._store.get("scfm/verdict").decode())
            return self._verdict()
        except RuntimeError:
            return _STORE_IS_GONE

    def _verdict(self) -> str:
        assert self._store is not None
        before = self._heartbeats()
        time.sleep(3 * PULSE)
        after = self._heartbeats()
        # A rank that noticed the failure and ended is not the cause.
        survivors = {int(rank) for rank in self._store.get("scfm/failed").decode().split()}
        places = {rank: heartbeat.partition(" ")[2] or "start (unknown)" for rank, heartbeat in after.items()}
        gone = [rank for rank in after if before[rank] == after[rank] and rank not in survivors]
        if gone:
            return _together("; ", {rank: f"gone, last seen at {places[rank]}" for rank in gone})
        return "no progress: " + _together(", ", {rank: f"at {place}" for rank, place in places.items()})

    def _heartbeats(self) -> dict[int, str]:
        """The last heartbeat of each rank; empty for one that has not begun."""
        assert self._store is not None
        keys = [f"scfm/at/{rank}" for rank in range(self._size)]
        if self._store.check(keys):
            return {rank: value.decode() for rank, value in enumerate(self._store.multi_get(keys))}
        return {
            rank: self._store.get(key).decode() if self._store.check([key]) else "" for rank, key in enumerate(keys)
        }

    def _pulse(self) -> None:
        assert self._store is not None
        self._pulses += 1
        where = progress.last()[1]
        self._store.set(f"scfm/at/{self._rank}", f"{self._pulses} {where} ({_current_function()})")

    def _talk(self) -> None:
        assert self._store is not None
        counted, seen = 0.0, 0
        while not self._stop.wait(PULSE):
            last = progress.last()[0]
            # If the process with the store is gone, the training's own collective fails, or this rank's own progress counts.
            with contextlib.suppress(RuntimeError):
                self._pulse()
                total = self._store.add("scfm/progress", int(last > counted))
                counted = last
                if total != seen:
                    seen, self._moved = total, time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(PULSE):
            last, where = progress.last()
            if time.monotonic() - max(last, self._moved) > self._timeout:
                _request_nccl_dump(self._rank)
                print(
                    f"scfm: error: rank {self._rank} has been at {where} for more than {self._limit}: {self.blame()}. "
                    f"The job ends; start it again to resume from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(PeerLost.exit_code)


def _request_nccl_dump(rank: int) -> None:
    """Ask NCCL's flight recorder for its dump, which takes less time than `blame`. docs/debugging.md has the variables."""
    prefix = os.environ.get("TORCH_NCCL_DEBUG_INFO_PIPE_FILE")
    if prefix:
        with contextlib.suppress(OSError):  # nobody reads the pipe: there is no NCCL
            pipe = os.open(f"{prefix}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            os.write(pipe, b"1\n")
            os.close(pipe)


def _together(separator: str, texts: dict[int, str]) -> str:
    """The ranks of the same text in one part: `rank 3 is gone, ranks 0-2, 4 are at step 7`."""
    groups: dict[str, list[int]] = defaultdict(list)
    for rank, text in texts.items():
        groups[text].append(rank)
    return separator.join(
        f"{ranks_in_words(ranks)} {'is' if len(ranks) == 1 else 'are'} {text}" for text, ranks in groups.items()
    )


def ranks_in_words(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 4`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [part for run in runs for part in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    return f"rank {parts[0]}" if len(runs) == 1 and len(runs[0]) == 1 else f"ranks {', '.join(parts)}"


def _current_function() -> str:
    """The main thread's current function. A rank that waits in a collective is not the one that the others wait for."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "ended"
    return f"in {frame.f_code.co_name}, {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def is_connection_error(error: BaseException) -> bool:
    """Whether a collective or the store raised it: errors of gloo and of the store are DistErrors or plain RuntimeErrors."""
    if isinstance(error, PeerLost):
        return False
    text = str(error).lower()
    marks = ("connection closed", "connection reset", "gloo", "timed out", "broken pipe", "nccl")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(mark in text for mark in marks)
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
