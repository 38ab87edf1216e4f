"""The processes of a run: which one this is, and how they agree on values and errors."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from scfm_core.errors import UserError
from scfm_core.launched import launched_size

_LAUNCHER = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them. Without arguments: a single process."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """A gloo group for Python values. Over NCCL every exchange would wait for the GPU's queue."""
    timeout: timedelta | None = None
    """How long a collective of `group` may wait for a rank; None: PyTorch's default of 30 minutes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and prints its messages."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def second_group(self) -> "World":
        """The same processes with a separate group, for a thread that communicates at the same time as the training."""
        if self.group is None:
            return self
        with quiet_gloo():
            return replace(self, group=dist.new_group(backend="gloo", timeout=self.timeout))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """If the block raises a UserError or an OSError on any rank, every rank raises the same UserError.

        Raises:
            UserError: with the message of every rank that failed.
        """
        error: Exception | None = None
        try:
            yield
        except (UserError, OSError) as caught:
            error = caught
        self.agree(error)

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank has an error. Every rank calls it.

        Raises:
            UserError: with the message of every rank that failed.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        messages = self.gather(None if error is None else str(error))
        failed = {message: [r for r in range(self.size) if messages[r] == message] for message in messages if message}
        if not failed:
            return
        if len(failed) == 1 and len(next(iter(failed.values()))) == self.size:
            joint = UserError(next(iter(failed)))
        else:
            joint = UserError("\n".join(f"{_ranks(ranks)}: {text}" for text, ranks in failed.items()))
        joint.agreed = True
        raise joint from error


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


@contextlib.contextmanager
def quiet_gloo() -> Iterator[None]:
    """Drop the lines that gloo prints about each group that it connects ("[Gloo] Rank 0 is connected to ...")."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ValueError):  # there may be no standard output
            sys.stdout.flush()
            output, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, null)
            stack.callback(os.close, output)
            os.dup2(null, 1)
            stack.callback(os.dup2, output, 1)
        yield


@contextlib.contextmanager
def join_world(device: torch.device, timeout: float, *, always: bool = False) -> Iterator[World]:
    """Join the launcher's process group; within `with` the processes can communicate.

    Args:
        device: of this process; a GPU with its index. The backend is NCCL for CUDA and gloo for a CPU.
        timeout: seconds that a collective may wait for a rank.
        always: also make a process group for a single process (DeepSpeed needs one).

    Raises:
        UserError: if the launcher's environment is incomplete, or not all processes join in time.
    """
    size = launched_size()
    if size == 1 and not always:
        yield World()
        return
    wait_limit = timedelta(seconds=timeout)
    options: dict[str, Any] = {"timeout": wait_limit}
    if size == 1:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
    elif missing := [name for name in _LAUNCHER if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {size}, but without {', '.join(missing)}. Start several processes with torchrun or the "
            f"deepspeed launcher, or unset WORLD_SIZE"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        with quiet_gloo():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **options)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(
            f"{size} processes should meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, but not all joined within "
            f"{timeout:g} s ({str(error).splitlines()[0]}). Check the logs of the other processes, and whether this machine can "
            f"reach that address"
        ) from error
    failed = True
    try:
        with quiet_gloo():
            group = dist.new_group(backend="gloo", timeout=wait_limit) if device.type == "cuda" else dist.group.WORLD
        yield World(dist.get_rank(), size, group, wait_limit)
        failed = False
    finally:
        # A rank that failed must not wait here for the others; the launcher ends them. With NCCL, destroying the group
        # is a collective, so a failed rank skips it. With gloo it is not.
        if not (failed and size > 1 and device.type == "cuda"):
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
