"""Workers that are killed, shared memory that is too small, a stop request while there are no data."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from scfm_core import progress
from scfm_core.data import workers
from scfm_core.data.schema import Batch, Record, collate
from scfm_core.data.workers import Stopped, WorkerGroup, batches_of_workers
from scfm_core.errors import UserError
from scfm_core.progress import beat


def make_batch(number: int) -> Batch:
    """A batch of one sample with 1,000 bytes of latents."""
    return collate([number], [Record(key=str(number), caption="", latents=torch.zeros(10, 5, 5))])


class Items(Dataset):  # type: ignore[type-arg]
    def __init__(self, act: Callable[[int], object]) -> None:
        self.act = act

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> Batch:
        batch = make_batch(number)
        self.act(number)
        return batch


def read(act: Callable[[int], object], is_stopping: Callable[[], bool] = lambda: False) -> list[int]:
    """The numbers of the batches that two workers read; `act(number)` runs in the worker of that batch."""
    group = WorkerGroup(queued=4, least=4)
    loader: Any = DataLoader(
        Items(act),
        batch_size=None,
        num_workers=2,
        timeout=0.2,
        worker_init_fn=group.start,
        multiprocessing_context="fork",
    )
    try:
        return [int(batch.keys[0]) for batch in batches_of_workers(loader, group, is_stopping)]  # type: ignore[union-attr]
    finally:
        assert multiprocessing.active_children() == []


@pytest.mark.processes
class TestWaiting:
    def test_longer_than_the_timeout_loses_nothing(self):
        assert read(lambda number: time.sleep(0.7 if number == 3 else 0)) == list(range(8))

    def test_ends_when_the_run_is_asked_to_stop(self):
        with pytest.raises(Stopped):
            read(lambda number: time.sleep(0 if number < 3 else 600), is_stopping=lambda: True)

    @pytest.mark.parametrize(
        ("number", "message"),
        [
            (signal.SIGKILL, r"was killed by signal 9 \(SIGKILL\)\. Most often the memory"),
            (signal.SIGBUS, "/dev/shm is full.*--shm-size"),
        ],
        ids=["SIGKILL", "SIGBUS"],
    )
    def test_ends_when_a_worker_is_killed(self, number, message):
        """The main process learns of it only here: torch's handler would raise it in the middle of a step."""
        before = signal.getsignal(signal.SIGCHLD)
        with pytest.raises(UserError, match=message):
            read(lambda at: os.kill(os.getpid(), number) if at == 5 else None)
        assert signal.getsignal(signal.SIGCHLD) is before

    def test_reports_the_progress_of_the_workers(self):
        """A worker that hashes a large shard is slow, and not dead: the watchdog is in the training process."""
        progress.start()
        began = progress.last()[0]
        assert read(lambda number: beat("hashing x") if number == 3 else None) == list(range(8))
        assert progress.last()[0] > began

    def test_ends_when_a_worker_exits(self):
        with pytest.raises(UserError, match="ended with exit code 3"):
            read(lambda at: os._exit(3) if at == 5 else None)

    @pytest.mark.parametrize(
        ("reason", "message"),
        [
            ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", "--shm-size.*num_workers=0"),
            ("unable to open shared memory object </torch_1>: Too many open files (24)", "ulimit -n"),
        ],
        ids=["no room", "open files"],
    )  # fmt: skip
    def test_ends_when_a_batch_cannot_be_passed_on(self, reason, message, monkeypatch):
        """By default the worker prints a traceback, and everybody waits forever."""

        def fail(storage: object) -> object:
            raise RuntimeError(reason)

        monkeypatch.setitem(multiprocessing.reduction.ForkingPickler._extra_reducers, torch.UntypedStorage, fail)
        with pytest.raises(UserError, match=f"could not pass on a batch.*{message}"):
            read(lambda at: None)


class TestSharedMemory:
    """Before the first batch is passed on: do the queues fit?"""

    @pytest.fixture
    def shared(self, monkeypatch):
        def size(total: int, free: int) -> None:
            status = SimpleNamespace(f_bavail=free, f_blocks=total, f_frsize=1)
            monkeypatch.setattr(workers.os, "statvfs", lambda path: status)

        return size

    def group(self) -> WorkerGroup:
        return WorkerGroup(queued=8, least=4)

    @pytest.mark.parametrize("size", [8000, 0], ids=["just so", "without a limit"])
    def test_large_enough(self, shared, capsys, size):
        shared(size, size)
        assert self.group().has_room(make_batch(0)) is None
        assert not capsys.readouterr().out

    def test_too_small_for_full_queues_is_a_warning_once(self, shared, capsys):
        shared(7999, 7999)
        group = self.group()
        assert group.has_room(make_batch(0)) is group.has_room(make_batch(1)) is None
        (line,) = capsys.readouterr().out.splitlines()
        assert "0.008 MB for up to 8 batches of 0.001 MB" in line
        assert "--shm-size=1g" in line and "data.num_workers=0" in line

    @pytest.mark.parametrize(("total", "free"), [(3999, 3999), (8000, 999)], ids=["for the queues", "now"])
    def test_too_small_is_an_error(self, shared, total, free):
        shared(total, free)
        error = self.group().has_room(make_batch(0))
        assert isinstance(error, UserError)
        assert "/dev/shm" in str(error) and "--shm-size" in str(error)
