"""The processes of a run: which one this is, and how they agree on values and errors."""

import contextlib
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from scfm_core.distributed.watchdog import Watchdog, is_connection_error, ranks_in_words
from scfm_core.errors import PeerLost, UserError, agreed_error
from scfm_core.launched import launched_rank, launched_size

PATIENCE = timedelta(days=7)
"""How long a collective waits for a rank. The watchdog's timeout ends a run that hangs, long before that."""
_LAUNCHER = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them. Without arguments: a single process."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """Of all processes, with gloo for values in host memory: over NCCL every exchange would wait for the GPU's queue."""

    watchdog: Watchdog | None = None

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
            return replace(self, group=dist.new_group(backend="gloo", timeout=PATIENCE))

    def naming_lost_ranks(self) -> contextlib.AbstractContextManager[None]:
        """Within `with`, a broken connection becomes PeerLost, which names the ranks that are gone. See `Watchdog`."""
        return contextlib.nullcontext() if self.watchdog is None else self.watchdog.naming_lost_ranks()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """If the block raises on any rank, every rank raises. See `agree`."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if is_connection_error(caught):  # of a collective in the block: the other ranks cannot be asked
                raise
            error = caught
        self.agree(error)

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank has an error. Every rank calls it.

        Raises:
            UserError: with the message of every rank that failed, if all of these are UserErrors or OSErrors.
            PeerLost: on the ranks without error, if one has another error, which it raises itself: a bug of ours keeps its
                traceback.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        reports = self.gather(None if error is None else _report(error))
        failed = [report for report in reports if report is not None]
        if not failed:
            return
        if error is not None and _report(error)[1] == _BUG:
            raise error
        ranks = {text: [rank for rank in range(self.size) if reports[rank] == (text, code)] for text, code in failed}
        message = "\n".join(f"{ranks_in_words(own)}: {text}" for text, own in ranks.items())
        if len(ranks) == 1 and len(failed) == self.size:
            message = failed[0][0]
        if any(code == _BUG for _, code in failed):
            raise PeerLost(message) from error
        joint = agreed_error(message)
        joint.exit_code = failed[0][1]
        raise joint from error


_BUG = 1


def _report(error: Exception) -> tuple[str, int]:
    """What the other ranks learn of an error: its message, and the exit code of a command that ends with it."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    return (
        (str(error), UserError.exit_code) if isinstance(error, OSError) else (f"{type(error).__name__}: {error}", _BUG)
    )


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


def same_patience() -> None:
    """Give every process group of this process the same timeout. Meshes and libraries make groups with a timeout of 10 to 30 minutes."""
    for group in list(dist.distributed_c10d._world.pg_map):
        with warnings.catch_warnings(action="ignore"):  # a backend without timeouts
            dist.distributed_c10d._set_pg_timeout(PATIENCE, group)


@contextlib.contextmanager
def join_world(device: torch.device, timeout: float, *, always: bool = False) -> Iterator[World]:
    """Join the launcher's process group; within `with` the processes can communicate, and a watchdog watches them.

    Args:
        device: of this process; a GPU with its index. The backend is NCCL for CUDA and gloo for a CPU.
        timeout: seconds without progress of any rank after which all end; and seconds to wait for the start of all ranks.
        always: also make a process group for a single process (DeepSpeed needs one).

    Raises:
        UserError: if the launcher's environment is incomplete, or not all processes join in time.
        PeerLost: if the connection to another rank breaks within `with`.
    """
    size = launched_size()
    if size == 1 and not always:
        yield World()
        return
    if size == 1:
        os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed takes this GPU
    elif missing := [name for name in _LAUNCHER if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {size}, but without {', '.join(missing)}. Start several processes with torchrun or the "
            f"deepspeed launcher, or unset WORLD_SIZE"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, failed = launched_rank(), True
    store = _meet(rank, size, timeout) if size > 1 else dist.HashStore()
    with Watchdog(store if size > 1 else None, rank, size, timeout) as watchdog, watchdog.naming_lost_ranks():
        store.set_timeout(PATIENCE)  # the first collective of a group of NCCL waits here for the group's first rank
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with quiet_gloo():
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        try:
            yield World(rank, size, dist.group.WORLD, watchdog)
            failed = False
        finally:
            # A rank that failed must not wait here for the others; the launcher ends them. With NCCL, destroying the group
            # is a collective, so a failed rank skips it. With gloo it is not.
            if not (failed and size > 1 and device.type == "cuda"):
                with contextlib.suppress(Exception):
                    dist.destroy_process_group()


def _meet(rank: int, size: int, timeout: float) -> Any:
    """The launcher's store, as soon as all ranks are connected to it.

    Raises:
        UserError: if the address cannot be reached, its port is in use, or ranks are missing after `timeout` seconds; it names them.
    """
    address, port, limit = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=timeout)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        if (
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        ):  # torchrun's, which has a part for each of its restarts
            store = next(dist.rendezvous("env://", rank, size, timeout=limit))[0]
        else:  # rank 0 holds it; torch's own rendezvous would wait there for all ranks, and not say which are missing
            store = dist.TCPStore(address, port, size, rank == 0, limit, wait_for_workers=False, multi_tenant=True)
        store.set(f"scfm/joined/{rank}", node)
        if store.add("scfm/joined", 1) == size:
            store.set("scfm/joined/all", "")
        try:
            store.wait(["scfm/joined/all"], limit)
        except dist.DistStoreError as error:
            missing = [other for other in range(size) if not store.check([f"scfm/joined/{other}"])]
            here = sorted({store.get(f"scfm/joined/{other}").decode() for other in range(size) if other not in missing})
            if rank == 0:
                time.sleep(1)  # it may hold the store, in which the others look too
            late = UserError(
                f"{ranks_in_words(missing)} of {size} did not come to {address}:{port} within {timeout:g} s; the ranks on "
                f"{', '.join(here)} did. Look at the logs of the others"
            )
            late.agreed = 0 not in missing
            raise late from error
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {port} of node {node}, where the {size} processes meet, is in use by another program. Choose another: "
                f"MASTER_PORT, with the job scripts SCFM_RENDEZVOUS_PORT"
            ) from error
        raise UserError(
            f"node {node} cannot reach {address}:{port}, where the {size} processes meet ({str(error).splitlines()[0]}). Look at the "
            f"log of rank 0, check network and firewall, or choose an address that all nodes reach: MASTER_ADDR, with the job "
            f"scripts SCFM_RENDEZVOUS_HOST"
        ) from error
    return store
