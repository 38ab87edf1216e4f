"""One training step of a recipe at its true size on the null device: the real trainer, without data, weights or a GPU."""

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from null_driver import Device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scfm_core.data.schema import Batch
from scfm_core.models.protocol import ModelFamily
from scfm_core.readback import read_back
from scfm_core.train import trace_step
from scfm_core.train.config import RunConfig
from scfm_core.train.device import resolve_device
from scfm_core.train.inputs import BatchEncoder
from scfm_core.train.kernels import Kernels
from scfm_core.train.parse import load_config
from scfm_core.train.rules import micro_batches as micro_batches_of
from scfm_core.train.sources import Sources
from scfm_core.train.trace_device import fake_world
from scfm_core.train.trainer import Trainer


class Collectives(TorchDispatchMode):
    """Calls and bytes of the larger side, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            name = func.__name__.partition(".")[0].strip("_")
            self.calls[name] += 1
            leaves = tree_leaves((args, kwargs or {}))
            self.bytes[name] += max((t.nbytes for t in leaves if isinstance(t, torch.Tensor)), default=0)
        return func(*args, **(kwargs or {}))


def measure(config: RunConfig, *, world: int = 1, micro_batches: int = 2) -> dict[str, Any]:
    """What one process needs for a step, after a first one.

    Args:
        config: of the run.
        world: number of processes; the others do not exist.
        micro_batches: of the step, at most.
    """
    shape = micro_batches_of(config, world)
    number = min(micro_batches, shape.number)
    config = replace(config, train=replace(config.train, global_batch_size=number * shape.size * world))
    device, compiled = Device(), config.train.compile
    resolve_device("cuda")  # it sets the allocator's options, before anything else starts the allocator
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with fake_world(world) as processes:
        began = time.process_time()
        trainer = Trainer(config, world=processes, sources=sources(config))
        torch.cuda.empty_cache()
        resident = torch.cuda.memory_allocated()
        data = [trace_step._batch(config, trainer.family, index, shape.size) for index in range(number)]
        step(trainer, data if world > 1 else data[:1])  # a sharded engine counts the micro-batches
        torch.cuda.reset_peak_memory_stats()
        built = time.process_time() - began
        before, launched = device.counters.values(), device.kernels()
        collectives = Collectives()
        with device.waits() as waits, collectives if world > 1 and not compiled else contextlib.nullcontext():
            step(trainer, data)
        counted = {name: value - before[name] for name, value in device.counters.values().items()}
        memory = torch.cuda.memory_stats()
        result = {
            "peak": memory["allocated_bytes.all.peak"],
            "resident": resident,
            "reserved": memory["reserved_bytes.all.peak"],
            "micro_batches": len(data),
            "micro_batch_size": shape.size,
            **{name: counted[name] for name in ("launches", "products", "graph_nodes", "copies", "pageable", "waits")},
            "lines": dict(waits),
            "kernels": dict((device.kernels() - launched).most_common()),
            "collectives": {
                name: [calls, collectives.bytes[name]] for name, calls in sorted(collectives.calls.items())
            },
            "chosen": str(trainer.kernels),
            "seconds": {"build": round(built, 1), "step": round(time.process_time() - began - built, 1)},
        }
        if compiled:
            stats = torch._dynamo.utils.counters
            result |= {"graphs": stats["stats"]["unique_graphs"], "graph_breaks": sum(stats["graph_break"].values())}
        del trainer, data
    gc.collect()
    torch.cuda.empty_cache()
    return result


def step(trainer: Trainer, data: list[Batch]) -> dict[str, Any]:
    """The trainer's own step, without its loader."""
    began = time.perf_counter()
    return trainer._finish_step(trainer._backward(data), data, [], began)


def sources(config: RunConfig) -> Sources:
    """The trace's stand-ins for data, weights and encoders, on the null device."""
    return replace(
        trace_step._sources(config),
        device=lambda _: torch.device("cuda", 0),
        kernels=_kernels,
        encoder=_encoder,
        read_back=read_finite,
    )


def _encoder(config: RunConfig, family: ModelFamily, corpus: Any, device: torch.device, *others: Any) -> BatchEncoder:
    """The trace's, with the empty caption on the null device."""
    encoder = trace_step._Encoder(config, family, corpus, device, *others)
    empty = family.unconditional
    if empty is not None:
        fields = {name: torch.empty_like(value, device=device) for name, value in empty.fields.items()}
        family.unconditional = replace(empty, fields=fields)
    return encoder


def read_finite(sums: torch.Tensor, status: torch.Tensor, norm: torch.Tensor) -> list[list[float]]:
    """Waits as the trainer's own. The losses and the norm are not what the null device gives, zero: the step is applied."""
    read_back(sums, status, norm)
    return [[1.0] * sums.numel(), [0.0] * status.numel(), [1.0]]


def _kernels(config: RunConfig, family: ModelFamily, device: torch.device) -> Kernels:
    """As the trace's; the null device has no cuDNN."""
    kernels = trace_step.assumed_kernels(config, family, device)
    assert kernels.attention is not None
    backend = "efficient" if kernels.attention.backend == "cudnn" else kernels.attention.backend
    return replace(kernels, attention=replace(kernels.attention, backend=backend))


def load(recipe: str, overrides: Iterable[str]) -> RunConfig:
    """A shipped recipe without validation grids."""
    return load_config(f"{recipe}.yaml", ["sample.every=0", "sample.teacher_steps=0", *overrides])
