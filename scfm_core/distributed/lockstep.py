"""Two sharded networks of one architecture, gathered block by block together, while each process runs only one of them."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


class Lockstep:
    """For passes in which some processes need one network and the others the other one.

    Weights are gathered collectively, so every process takes part for both networks. One network after the other would cost the
    time of two passes: each process would wait for the processes that need the network that it does not need. Here all
    processes gather both networks unit by unit, in the same order, and compute with one of them: the time of one pass. The
    weights of two units of both networks are in memory at a time; the units are those of `fully_shard`.

    Args:
        first, second: prepared by `Fsdp2Layout`. Each unit runs once in a pass.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        self._units = list(zip(_units(first), _units(second), strict=True))
        self._gathered: set[int] | None = None
        """Units that were gathered in the current pass; None: no pass in lockstep."""
        for number, (one, other) in enumerate(self._units):
            for own, idle in ((one, other), (other, one)):
                # Before FSDP2's own hook, which would gather one unit alone. Dynamo cannot compile collectives in hooks.
                before = torch._dynamo.disable(functools.partial(self._gather, number))
                assert isinstance(own, nn.Module)
                own.register_forward_pre_hook(before, prepend=True)
                own.register_forward_hook(torch._dynamo.disable(functools.partial(self._free, idle)))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Within `with`, run one of the networks once. Every process does so at the same place of its step."""
        self._gathered = set()
        try:
            yield
        finally:
            self._gathered = None

    def _gather(self, number: int, *_: Any) -> None:
        """Start to gather a unit of both networks and the next one, so that the next one arrives while this one computes."""
        if self._gathered is None:
            return
        for wanted in (number, number + 1):
            if wanted < len(self._units) and wanted not in self._gathered:
                self._gathered.add(wanted)
                for unit in self._units[wanted]:
                    unit.unshard(async_op=True)

    def _free(self, idle: FSDPModule, *_: Any) -> None:
        """After a unit of the own network: free the same unit of the other one."""
        if self._gathered is not None:
            idle.unshard()  # waits until it is there: a pending gather would be taken for the next pass
            idle.reshard()


def _units(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]
