"""Several real processes for a test: gloo, a time limit, and the failing rank's own traceback.

The processes are forked from one server that has imported all that ranks import (torch, diffusers, DeepSpeed, MDS), so
starting them takes a tenth of a second. It has run nothing, so each test's processes have fresh global state.
"""

import gc
import io
import multiprocessing
import os
import pickle
import queue
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any

from ports import free_ports

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# `diffusers.models` imports what is asked of it and no more; the attention backends in it bring xformers and torchvision.
_PRELOADED = [
    "torch.distributed.checkpoint",
    "diffusers.models.transformers",
    "peft",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "s3fs",
    "streaming.base.format.mds",
    "data_tools.pack",
    "recipes.cli",
    "recipes.train",
    "recipes.export",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


_WORLDS = 8
"""How often a function may join a world, one after another."""


@dataclass
class Outcome:
    """How one rank ended."""

    value: Any = None
    traceback: str | None = None
    exit_code: int | None = None
    output: str = ""


class RankFailed(AssertionError):
    """A rank raised, was killed, or did not end in time."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 300, expect_failure: bool = False
) -> list[Any]:
    """Call `function(*arguments)` in `world_size` processes with a launcher's environment, rank by rank's return value.

    Args:
        function: at the top of a test module; what it takes and returns must pickle.
        world_size: processes; RANK, WORLD_SIZE and so on are set, nothing is initialised.
        arguments: the same for all.
        timeout: seconds for all of it.
        expect_failure: return an `Outcome` a rank, whatever happened; None of a rank that did not end in time.

    Raises:
        RankFailed: with the failing rank's traceback and what it printed.
    """
    ports, results = free_ports(_WORLDS), _context.Queue()
    processes = [
        _context.Process(target=_rank, args=(results, function, arguments, rank, world_size, ports), daemon=False)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    outcomes: dict[int, Outcome] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(outcomes) < world_size and time.monotonic() < deadline:
            try:
                rank, payload = results.get(timeout=0.1)
                outcomes[rank] = pickle.loads(payload)
            except queue.Empty:
                for rank, process in enumerate(processes):
                    if rank not in outcomes and process.exitcode is not None and results.empty():
                        outcomes[rank] = Outcome(traceback=f"ended with code {process.exitcode}, without a result")
            if not expect_failure:
                _raise_first(outcomes)
        if len(outcomes) < world_size and not expect_failure:
            raise RankFailed(f"ranks {sorted(set(range(world_size)) - set(outcomes))} did not end within {timeout} s")
        for rank, process in enumerate(processes):
            process.join(max(0.0, min(10.0, deadline - time.monotonic())))
            if rank in outcomes:
                outcomes[rank].exit_code = process.exitcode
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    if expect_failure:
        return [outcomes.get(rank) for rank in range(world_size)]
    return [outcomes[rank].value for rank in range(world_size)]


def _raise_first(outcomes: dict[int, Outcome]) -> None:
    for rank, outcome in sorted(outcomes.items()):
        if outcome.traceback:
            raise RankFailed(f"rank {rank}:\n{outcome.traceback}\n--- it printed:\n{outcome.output}")


def _rank(
    results: Any, function: Any, arguments: tuple[Any, ...], rank: int, world_size: int, ports: list[int]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ports[0]),
    }
    import torch

    from scfm_core.distributed import watchdog, world

    gc.freeze()  # what the server has imported: a collection would copy all of its pages into this process
    gc.set_threshold(50_000, 20, 100)
    world._meet = partial(_meet_anew, iter(ports), world._meet)
    watchdog.PULSE = 0.2  # who is gone is then known after 0.6 s
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    printed, outcome = io.StringIO(), Outcome()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            outcome.value = function(*arguments)
        except BaseException:
            outcome.traceback = traceback.format_exc()
    outcome.output = printed.getvalue()
    results.put((rank, pickle.dumps(outcome)))
    results.close()
    results.join_thread()
    os._exit(1 if outcome.traceback else 0)


def _meet_anew(ports: Iterator[int], meet: Callable[..., Any], *arguments: Any) -> Any:
    """Where nobody has met: at the last world's port a rank may find the last store, if rank 0 has not closed it yet."""
    os.environ["MASTER_PORT"] = str(next(ports))
    return meet(*arguments)
