"""The processes that read data: waiting for their batches, why one of them ended, and the memory that they share."""

import contextlib
import errno
import gc
import math
import mmap
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import Any

from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

from scfm_core.data.schema import Batch
from scfm_core.errors import UserError
from scfm_core.launched import local_rank

POLL = 1.0
"""Seconds between two looks at the workers and at the stop request, while there is no batch."""
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
_TRIES = 50
_SHARED = "/dev/shm"  # nosec B108 # its size is read, no file is made
_NO_ROOM = 75
"""Exit code of a worker that could not pass on a batch."""
_LIMIT_OF_FILES = (
    "too many files are open. Raise the limit of open files (`ulimit -n 65536`), or set data.num_workers=0"
)


class Stopped(Exception):
    """The run was asked to stop while it waited for a batch."""


def ignore_signals() -> None:
    """Ignore the signals that stop a run, in a child process.

    Ctrl-C, Slurm's signals and the end of a terminal reach every process of the job. The training process decides when to
    stop; its workers must live until then.
    """
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)


def portable(error: Exception) -> Exception:
    """An error that can pass from a worker to the training process, where it is raised; a note has its traceback."""
    if get_worker_info() is None:
        return error
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))  # nosec B301 # of its own
    except Exception:  # of the error's own constructor, or of what it holds
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, UserError):  # whose message says everything
        copy.add_note("In a data worker:\n" + "".join(traceback.format_exception(error)))
    return copy


class WorkerGroup:
    """What the workers of one loader share with the training process.

    Args:
        queued: largest number of batches that wait in the queues of this machine's workers.
        least: the number that waits there at least.
    """

    def __init__(self, queued: int, least: int) -> None:
        self._queued, self._least = queued, least
        self._is_first = True
        self._reason = mmap.mmap(-1, 1024)  # anonymous: forked processes share it

    def start(self, worker: int) -> None:
        """In a worker: ignore signals, and end if a batch cannot be passed on. The default only prints, and waits forever."""
        ignore_signals()
        self._is_first = worker == 0

        def end(error: Exception, _: object) -> None:
            text = str(error).encode()[:1000]
            self._reason[: len(text)] = text
            os._exit(_NO_ROOM)

        Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]

    def has_room(self, batch: Batch) -> UserError | None:
        """In a worker: why shared memory has no room for a batch; at the first batch also for those that will wait."""
        try:
            status = os.statvfs(_SHARED)
        except OSError:
            return None
        if not status.f_blocks:  # a tmpfs without a limit
            return None
        size, free, total = batch.nbytes, status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
        if size > free or size * self._least > total:
            return UserError(self._too_small(size, total))
        if self._is_first and size * self._queued > total and local_rank() == 0:
            print(f"warning: {self._too_small(size, total)}", flush=True)
        self._is_first = False
        return None

    def _too_small(self, size: int, total: int) -> str:
        need = size * self._queued
        return (
            f"data: {_SHARED}, through which the workers pass batches, is too small: {total / 1e6:,.3g} MB for up to "
            f"{self._queued} batches of {size / 1e6:,.3g} MB. {_advice(need)}"
        )

    def why_ended(self, worker: BaseProcess) -> UserError:
        """Why a worker has ended before its work was done."""
        code = worker.exitcode or 0
        reason = self._reason[:].rstrip(b"\0").decode(errors="replace")
        if "Too many open files" in reason:
            return UserError(f"data: a worker could not pass on a batch: {_LIMIT_OF_FILES}")
        if code == _NO_ROOM:
            return UserError(f"data: a worker could not pass on a batch ({reason}). {_advice(None)}")
        if code == -signal.SIGBUS:
            return UserError(f"data: a worker was ended by SIGBUS: {_SHARED} is full. {_advice(None)}")
        if code == -signal.SIGKILL:
            return UserError(
                f"data: a worker (process {worker.pid}) was killed by signal 9 (SIGKILL). Most often the memory of the machine, "
                f"container or job is full (`dmesg` tells). Lower data.num_workers or train.micro_batch_size, or ask for more memory"
            )
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return UserError(
            f"data: a worker (process {worker.pid}) ended {how}; what it printed comes before this message"
        )


def _advice(need: int | None) -> str:
    size = "" if need is None else f"={max(1, math.ceil(need * 1.25 / 2**30))}g"
    return (
        f"In a container, start it with --shm-size{size} or --ipc=host (Kubernetes: a volume `emptyDir: {{medium: Memory}}` at "
        f"{_SHARED}). Or set data.num_workers=0, which needs no shared memory"
    )


def batches_of_workers(
    loader: "DataLoader[Batch | Exception]", group: WorkerGroup, is_stopping: Callable[[], bool]
) -> Generator[Batch | Exception]:
    """The loader's batches, in order. The loader has workers, and a timeout of `POLL`.

    Args:
        loader: its `worker_init_fn` is `group.start`.
        group: of the loader's workers.
        is_stopping: whether the run was asked to stop.

    Raises:
        UserError: if a worker has ended.
        Stopped: if there is no batch yet, and `is_stopping` is true.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    with frozen_garbage():
        iterator: Any = iter(loader)
    if handler is not None and threading.current_thread() is threading.main_thread():
        # torch's handler would raise the end of a worker anywhere, for example between the updates of two weights.
        signal.signal(signal.SIGCHLD, handler)
    try:
        while True:
            try:
                batch = next(iterator, None)
            except (RuntimeError, OSError, EOFError) as error:
                has_timed_out = str(error).startswith("DataLoader timed out")
                if not has_timed_out and (ended := _ended(iterator._workers)):
                    raise group.why_ended(ended[0]) from error
                if (
                    getattr(error, "errno", None) == errno.EMFILE
                    or "open files" in str(error)
                    or "ancdata" in str(error)
                ):
                    raise UserError(f"data: {_LIMIT_OF_FILES}") from error
                if not has_timed_out:
                    raise
                if is_stopping():
                    raise Stopped from None
                continue
            if batch is None:
                return
            yield batch
    finally:
        _end_workers(iterator)


def _ended(workers: list[BaseProcess]) -> list[BaseProcess]:
    """The workers that have ended with an error. The connection to one may break before the system reports its end."""
    for _ in range(_TRIES):
        if ended := [worker for worker in workers if worker.exitcode]:
            return ended
        time.sleep(0.02)
    return []


def _end_workers(iterator: Any) -> None:
    """End the workers for certain: they ignore SIGTERM, so torch's own shutdown may wait for them forever.

    It also waits for locks that a killed worker holds. Nothing is lost: workers only read.
    """
    if iterator._worker_pids_set:
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    iterator._shutdown = True
    for worker in iterator._workers:
        worker.kill()
    for worker in iterator._workers:
        worker.join()
    for queue in iterator._index_queues:
        queue.cancel_join_thread()
        queue.close()


@contextlib.contextmanager
def frozen_garbage() -> Generator[None]:
    """Keep processes that are forked in this context from collecting garbage that they inherit.

    This garbage may contain a process group (FSDP's modules hold one in a reference cycle). Its destructor joins
    threads, which do not exist in a forked process, so that process would be aborted. Another benefit: the pages to
    which a collection writes are not copied.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
