"""One training step of a recipe at its true size on the null device: the real trainer, without data, weights or a GPU.

`python tests/null_device/run.py tests/null_device/null_step.py RECIPE [KEY=VALUE ...] [--world N]` prints what it needs as JSON.
"""

import argparse
import contextlib
import functools
import gc
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from null_driver import Device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scfm_core.data.fields import PackedTokens
from scfm_core.data.schema import Batch
from scfm_core.distributed.world import World
from scfm_core.kernels.attention import AttentionChoice
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.protocol import ModelFamily
from scfm_core.readback import read_back
from scfm_core.train.assemble import build_family
from scfm_core.train.config import RunConfig
from scfm_core.train.inputs import BatchEncoder
from scfm_core.train.kernels import Kernels
from scfm_core.train.parse import load_config
from scfm_core.train.rules import micro_batches as micro_batches_of
from scfm_core.train.sources import Sources
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


class FakeWorld(World):
    """Rank 0 of several processes that do not exist: each has the same values."""

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size

    def from_main(self, value: Any) -> Any:
        return value


@contextlib.contextmanager
def fake_world(size: int) -> Iterator[World]:
    if size == 1:
        yield World()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield FakeWorld(0, size, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def measure(config: RunConfig, *, world: int = 1, micro_batches: int = 2) -> dict[str, Any]:
    """What one process needs for a step, after a first one.

    Args:
        config: of the run.
        world: number of processes; the others do not exist.
        micro_batches: of the step, at most.
    """
    device, compiled = Device(), config.train.compile
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with fake_world(world) as processes:
        began = time.process_time()
        trainer = Trainer(config, world=processes, sources=sources())
        torch.cuda.empty_cache()
        resident = torch.cuda.memory_allocated()
        shape = micro_batches_of(config, world)
        data = [batch(config, trainer.family, number, shape.size) for number in range(min(micro_batches, shape.number))]
        first = step(trainer, data if compiled else data[:1], accumulated=len(data))
        torch.cuda.reset_peak_memory_stats()
        built = time.process_time() - began
        before, launched = device.counters.values(), device.kernels()
        collectives = Collectives()
        with device.waits() as waits, collectives if world > 1 and not compiled else contextlib.nullcontext():
            row = step(trainer, data, accumulated=len(data))
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
            "collectives": {name: [calls, collectives.bytes[name]] for name, calls in sorted(collectives.calls.items())},
            "chosen": str(trainer.kernels),
            "seconds": {"build": round(built, 1), "step": round(time.process_time() - began - built, 1)},
        }
        if compiled:
            stats = torch._dynamo.utils.counters
            result |= {"graphs": stats["stats"]["unique_graphs"], "graph_breaks": sum(stats["graph_break"].values())}
        del trainer, data, first, row
    gc.collect()
    torch.cuda.empty_cache()
    return result


def step(trainer: Trainer, data: list[Batch], *, accumulated: int) -> dict[str, Any]:
    """The trainer's own step, without its loader."""
    trainer.engine._config = replace(trainer.engine._config, accumulation=accumulated)  # type: ignore[attr-defined]
    began = time.perf_counter()
    return trainer._finish_step(trainer._backward(data), data, [], began)


def sources() -> Sources:
    """Stand-ins for data, weights and encoders."""
    return Sources(
        device=lambda _: torch.device("cuda", 0),
        corpus=_corpus,
        family=functools.partial(build_family, offline=True),
        kernels=_kernels,
        encoder=_Encoder,
        fill=lambda name, part, start: None,
        read_back=read_finite,
    )


def read_finite(sums: torch.Tensor, status: torch.Tensor, norm: torch.Tensor) -> list[list[float]]:
    """Waits as the trainer's own. The losses and the norm are not what the null device gives, zero: the step is applied."""
    read_back(sums, status, norm)
    return [[1.0] * sums.numel(), [0.0] * status.numel(), [1.0]]


def _corpus(config: Any, *, with_paths: bool = False) -> Any:
    """A cache of this model's encoders."""
    return SimpleNamespace(
        is_cached=True, fingerprint="null", notes=(), paddings={}, order=lambda *_: None, first_items=dict, networks=dict
    )


def _kernels(config: RunConfig, family: ModelFamily, device: torch.device) -> Kernels:
    """As `choose_kernels` on a GPU, without measurements. The null device has no cuDNN."""
    fused = config.kernels.fused if family.has_kernels else "none"
    backend = config.kernels.attention
    if backend == "auto":
        backend = "efficient" if "masked" in family.fields.values() else "flash"
    return Kernels("triton" if fused == "auto" else fused, "null device", AttentionChoice(backend, "null device"))


class _Encoder(BatchEncoder):
    """Takes the batches of `batch`; loads no encoders."""

    def __init__(self, config: RunConfig, family: ModelFamily, corpus: Any, device: torch.device, *_: Any) -> None:
        self.device, self.text, self.vae, self.prompts, self.prompt_cond, self.paddings = device, None, None, [], None, {}
        length = config.model.text_length
        fields = {
            name: torch.zeros(1, *shape, device=device, dtype=torch.bfloat16) for name, shape in family.shapes(length).items()
        }
        is_masked = "masked" in family.fields.values()
        family.unconditional = Conditioning(fields=fields, lengths=(family.text_tokens(length),) if is_masked else None)


def batch(config: RunConfig, family: ModelFamily, number: int, size: int) -> Batch:
    """A micro-batch of a cache, with captions of the full length."""
    channels, height, width = family.latent_shape(*config.data.resolution)
    fields: dict[str, PackedTokens | torch.Tensor] = {}
    for name, shape in family.shapes(config.model.text_length).items():
        if family.fields[name] == "vector":
            fields[name] = torch.zeros(size, *shape, dtype=torch.bfloat16)
        else:
            paddings = None if family.fields[name] == "masked" else (None,) * size
            tokens = torch.zeros(size * shape[0], *shape[1:], dtype=torch.bfloat16)
            fields[name] = PackedTokens(tokens, (shape[0],) * size, paddings)
    path = None
    if config.method.has_stored_paths:
        intervals = math.lcm(*config.method.trajectory_grids)
        path = {
            "velocities": torch.zeros(size, intervals, channels, height, width, dtype=torch.bfloat16),
            "sigmas": torch.linspace(1, 0, intervals + 1).expand(size, -1).contiguous(),
            "guidance": torch.full((size,), float(config.method.guidance[0])),
        }
    return Batch(
        sample_ids=torch.arange(number * size, (number + 1) * size),
        keys=["null"] * size,
        captions=[""] * size,
        latents=torch.zeros(size, channels, height, width, dtype=torch.bfloat16),
        fields=fields,
        images=None,
        path=path,
    )


def load(recipe: str, overrides: list[str]) -> RunConfig:
    return load_config(recipe, ["sample.every=0", "sample.teacher_steps=0", *overrides])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=2)
    options = parser.parse_args()
    config = load(options.recipe, options.overrides)
    print(json.dumps(measure(config, world=options.world, micro_batches=options.micro_batches), indent=2))


if __name__ == "__main__":
    main()
