"""What a step of each objective costs at the size of Flux.1-dev: passes, FLOPs, predicted time, and memory. Nothing is measured on a GPU.

    python tests/null_device/objectives.py [NAME ...]      by default all, in some 4 minutes on a core

The step is that of the recipes: 512 x 512 pixels, 256 text tokens, LoRA of rank 64, batch 16 in micro-batches of 4, selective
checkpointing. Passes are those of a sample: with gradient, and without it for the target, in the mean of the draws. Seconds and TFLOP are
of a step with the mean number of passes, by the dry run's trace of two micro-batches: at the peaks of the data sheet, and with products and attention
at 70 % and all else at 85 % of them, as assumed in train/roofline.py; elementwise operators as `train.compile` is modelled to fuse
them. The peak is that of PyTorch's allocator on the null device, and that of the trace, both with eager blocks and the rows that seed 0
draws; CUDA's context comes on top (2 GiB, assumed).
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import null_cases
import null_driver
import null_step
import torch
from null_cases import Case

from scfm_core.models.student import LoRAModel
from scfm_core.train.roofline import CARDS, Card, seconds
from scfm_core.train.rules import micro_batches as micro_batches_of
from scfm_core.train.trace_ops import PASSES, UPDATES
from scfm_core.train.trace_step import Traced, trace_step

CARD = "A100 80 GB"
STEPS = 3000
"""Of the recipes."""
_PAPER = ("method.step_gain=none",)
_FLOW_MAP = "method.flow_map."
OBJECTIVES: dict[str, tuple[str, tuple[str, ...]]] = {
    "pairs, paper": ("flux_dev_lora", _PAPER),
    "pairs, step-scaled": ("flux_dev_lora", ()),
    "pairs, near: student": ("flux_dev_lora", (*_PAPER, "method.near=student")),
    "stored paths": ("flux_dev_trajectories", ()),
    "paths taken in training, 24 steps": ("flux_dev_trajectories", ("method.trajectory_steps=24",)),
    "flow map, teacher_step, own starts": ("flux_dev_flow_map", ()),
    "flow map, teacher_step, data": ("flux_dev_flow_map", (f"{_FLOW_MAP}starts=data",)),
    "flow map, one_sided, own starts": ("flux_dev_flow_map", (f"{_FLOW_MAP}difference=one_sided",)),
    "flow map, central, own starts": ("flux_dev_flow_map", (f"{_FLOW_MAP}difference=central",)),
    "flow map, central, data": ("flux_dev_flow_map", (f"{_FLOW_MAP}difference=central", f"{_FLOW_MAP}starts=data")),
    "Eulerian, teacher_step, own starts": ("flux_dev_flow_map", (f"{_FLOW_MAP}form=eulerian",)),
    "Eulerian, central, own starts": (
        "flux_dev_flow_map",
        (f"{_FLOW_MAP}form=eulerian", f"{_FLOW_MAP}difference=central"),
    ),
    "matching alone": ("flux_dev_lora", ("method.matching_fraction=1", "method.teacher_fraction=0")),
}
"""Recipe and settings."""
_TARGET = tuple(phase for phase in PASSES if phase not in ("student", "backward"))


@contextlib.contextmanager
def count_rows() -> Iterator[Counter[bool]]:
    """Rows that go through the network with gradient (True) and without."""
    rows: Counter[bool] = Counter()
    velocity = LoRAModel.velocity

    def counted(model: LoRAModel, role: str, x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        rows[torch.is_grad_enabled()] += len(x)
        return velocity(model, role, x, *rest, **options)

    LoRAModel.velocity = counted  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        LoRAModel.velocity = velocity  # type: ignore[method-assign]


def mean_step(traced: Traced, micro_batches: int, share: float, card: Card) -> tuple[float, float, float]:
    """Seconds at the peaks, seconds at the assumed shares of them, and FLOPs.

    Args:
        traced: some micro-batches, and the update.
        micro_batches: of a step.
        share: passes other than the student's with gradient in the mean of the draws, as a share of those of the traced rows.
        card: the GPU.
    """
    totals = [0.0, 0.0, 0.0]
    for operation in traced.operators:
        factor = 1.0 if operation.phase in UPDATES else micro_batches / traced.micro_batches
        factor *= share if operation.phase in _TARGET else 1.0
        times = (seconds(operation, card, at_peak=at_peak) for at_peak in (True, False))
        for index, value in enumerate((*times, operation.flops)):
            totals[index] += factor * value
    return totals[0], totals[1], totals[2]


def row(name: str, measured: dict[str, Any]) -> str:
    """A line of the table."""
    recipe, overrides = OBJECTIVES[name]
    config = null_step.load(recipe, overrides)
    with count_rows() as rows:
        traced = trace_step(config)
    samples = traced.micro_batches * traced.micro_batch_size
    with_gradient, without = config.method.passes(1)
    with_gradient += config.method.matching_fraction  # the fake score's own
    for_target = rows[True] + rows[False] - samples
    share = (with_gradient + without - 1) * samples / for_target if for_target else 1.0
    at_peak, assumed, flops = mean_step(traced, micro_batches_of(config, 1).number, share, CARDS[CARD])
    cells = [
        name, f"{with_gradient:.3g} + {without:.3g}", f"{flops / 1e12:,.0f}", f"{at_peak:.1f}", f"{assumed:.1f}",
        f"{assumed * STEPS / 3600:.1f}", f"{measured['peak'] / 2**30:.1f}", f"{traced.peak / 2**30:.1f}",
        f"{measured['waits']}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    reason = null_driver.why_unavailable() or null_driver.why_no_triton()
    if reason is not None:
        sys.exit(reason)
    names = sys.argv[1:] or list(OBJECTIVES)
    if unknown := set(names) - set(OBJECTIVES):
        sys.exit(f"unknown: {', '.join(sorted(unknown))}. The objectives are: {', '.join(OBJECTIVES)}")
    cases = {
        name: Case(recipe, ("train.compile=false", *overrides))
        for name, (recipe, overrides) in OBJECTIVES.items()
        if name in names
    }
    head = [
        "objective", "passes", "TFLOP a step", "s at the peaks", "s at 70/85 %", f"hours of {STEPS:,} steps",
        "peak GiB, null device", "peak GiB, trace", "host waits a step",
    ]  # fmt: skip
    print(f"Predicted for an {CARD}, not measured.\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, measured in null_cases.measure_in_process(cases):
        print(row(name, measured), flush=True)


if __name__ == "__main__":
    main()
