"""Peak memory of recipes on a GPU: the real trainer at true size, with random weights and without data.

    python tests/benchmarks/peak.py [--seconds S] [--json PATH]

Each row is a step after a first one, of two micro-batches. Beside it `make gpu` puts the peak that `scfm train --dry-run` traces.
On the null device the blocks are not compiled, and launches, waits and peak are right while times are not.
"""

import gc
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from harness import GPU, NULL, STARTED, launches, parser, report, save
from torch import Tensor

from scfm_core.data.schema import Batch
from scfm_core.errors import UserError
from scfm_core.readback import read_back
from scfm_core.train import trace_step
from scfm_core.train.config import RunConfig
from scfm_core.train.device import resolve_device
from scfm_core.train.kernels import choose_kernels
from scfm_core.train.parse import load_config
from scfm_core.train.rules import micro_batches
from scfm_core.train.trainer import Trainer

RUNS = {
    "flux_dev_lora": ("flux_dev_lora.yaml",),
    "flux_dev_lora, no checkpointing": ("flux_dev_lora.yaml", "train.activation_checkpointing=none"),
    "flux_dev_lora, full checkpointing, micro 8": (
        "flux_dev_lora.yaml", "train.activation_checkpointing=full", "train.micro_batch_size=8",
    ),
}  # fmt: skip
COLUMNS = {
    "run": "", "micro_batch": "d", "peak_GiB": ".2f", "reserved_GiB": ".2f", "milliseconds": ".0f", "launches": "d", "waits": "d",
    "problem": "",
}  # fmt: skip


def load(name: str, *, compiled: bool) -> RunConfig:
    """The configuration of a row, without pictures."""
    recipe, *overrides = RUNS[name]
    plain = ["sample.every=0", "sample.teacher_steps=0", *(() if compiled else ("train.compile=false",))]
    return load_config(recipe, [*plain, *overrides])


def random_weights(name: str, part: Tensor, start: int) -> None:
    """Not zero: a GPU multiplies zeros at a higher clock."""
    part.normal_(std=0.02)


def read_finite(sums: Tensor, status: Tensor, norm: Tensor) -> list[list[float]]:
    """Waits as the trainer's own. Losses and norm of random weights, or of a null device, would make it skip the step."""
    read_back(sums, status, norm)
    return [[1.0] * sums.numel(), [0.0] * status.numel(), [1.0]]


def step(trainer: Trainer, data: list[Batch]) -> None:
    """The trainer's own step, without its loader, as if it had these micro-batches."""
    trainer.engine._config = replace(trainer.engine._config, accumulation=len(data))  # type: ignore[attr-defined]
    trainer._finish_step(trainer._backward(data), data, [], time.perf_counter())


def measured(config: RunConfig) -> dict[str, Any]:
    """Peak, time and launches of one step. Data and encoders are those of the trace."""
    stubs = replace(
        trace_step._sources(config), device=lambda _: resolve_device("cuda"), fill=random_weights, read_back=read_finite
    )
    if not NULL:
        stubs = replace(stubs, kernels=choose_kernels)
    torch.cuda.empty_cache()
    trainer = Trainer(config, sources=stubs)
    shape = micro_batches(config, 1)
    numbers = range(min(2, shape.number))
    data = [trace_step._batch(config, trainer.family, number, shape.size) for number in numbers]
    step(trainer, data)
    torch.cuda.reset_peak_memory_stats()
    before = launches(), waits()
    began = time.perf_counter()
    step(trainer, data)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {
        "micro_batch": shape.size,
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_GiB": torch.cuda.max_memory_reserved() / 2**30,
        "milliseconds": 1e3 * seconds,
        "launches": launches() - before[0] if NULL else None,
        "waits": waits() - before[1] if NULL else None,
    }


def waits() -> int:
    """How often the host has waited for the null device."""
    if not NULL:
        return 0
    from null_driver import Device

    return int(Device().counters.waits)


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, "peak", 1).parse_args(argv)
    if not GPU:
        sys.exit("this needs a GPU, or the null device: python tests/null_device/run.py tests/benchmarks/peak.py")
    title, rows = "peak memory of a step of two micro-batches", []
    for name in RUNS:
        if rows and time.monotonic() > STARTED + arguments.seconds:
            break
        try:
            rows.append({"run": name, **measured(load(name, compiled=not NULL))})
        except (torch.OutOfMemoryError, UserError, ImportError) as error:
            rows.append({"run": name, "problem": str(error).splitlines()[0]})
        gc.collect()
        save(title, rows, COLUMNS, arguments.json)
    report(title, rows, COLUMNS, arguments.json)


if __name__ == "__main__":
    main()
