"""How long a GPU would take for a traced step at least: each kernel's bytes, FLOPs or launch, whatever takes longest.

Nothing here is measured. Times of communication and of the host are not counted.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

from scfm_core.train.trace_ops import Operation

LAUNCH = 3e-6
"""Seconds of the smallest kernel, assumed."""
ASSUMED_COMPUTE = 0.7
"""Share of the peak FLOP/s that products and attention reach, assumed: the best bf16 products measured on an H200 at
such shapes are at 68 %."""
ASSUMED_BANDWIDTH = 0.85
"""Share of the peak bandwidth that other kernels reach, assumed."""
_IN_FP8 = ("aten::_scaled_mm",)


@dataclass(frozen=True, kw_only=True)
class Card:
    """The peaks of a GPU: dense products with fp32 accumulation, without sparsity."""

    bf16: float
    """FLOP/s."""
    fp8: float
    """FLOP/s; a card without fp8 has its bf16 figure."""
    bandwidth: float
    """Bytes/s of its memory."""
    memory: int
    """GB in its name."""
    usable: float
    """GiB that the driver reports, with ECC on data-centre cards."""
    source: str
    """The data sheet."""


_A100 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_BLACKWELL = "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
CARDS: dict[str, Card] = {
    "A100 40 GB": Card(bf16=312e12, fp8=312e12, bandwidth=1.555e12, memory=40, usable=39.4, source=_A100),
    "A100 80 GB": Card(bf16=312e12, fp8=312e12, bandwidth=2.039e12, memory=80, usable=79.3, source=_A100),
    "H100": Card(
        bf16=989e12,
        fp8=1979e12,
        bandwidth=3.35e12,
        memory=80,
        usable=79.6,
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "H200": Card(
        bf16=989e12,
        fp8=1979e12,
        bandwidth=4.8e12,
        memory=141,
        usable=140.4,
        source="https://www.nvidia.com/en-us/data-center/h200/",
    ),
    "L40S": Card(
        bf16=362e12,
        fp8=733e12,
        bandwidth=0.864e12,
        memory=48,
        usable=45.0,
        source="https://www.nvidia.com/en-us/data-center/l40s/",
    ),
    "RTX 4090": Card(bf16=165.2e12, fp8=330.3e12, bandwidth=1.008e12, memory=24, usable=23.9, source=_ADA),
    "RTX 5090": Card(bf16=209.5e12, fp8=419e12, bandwidth=1.792e12, memory=32, usable=31.8, source=_BLACKWELL),
}
"""By name. A100 and H100 are the SXM ones."""


class Operations(Protocol):
    """A `Traced`, or something else that has operators."""

    @property
    def operators(self) -> list[Operation]:
        """Of a step."""


def seconds(operation: Operation, card: Card, *, at_peak: bool = True) -> float:
    """The time of an operation's calls.

    Args:
        operation: equal calls.
        card: the GPU.
        at_peak: at the peaks of the data sheet; else at the assumed shares of them.
    """
    flops, bandwidth = card.fp8 if operation.op in _IN_FP8 else card.bf16, card.bandwidth
    if not at_peak:
        flops, bandwidth = ASSUMED_COMPUTE * flops, ASSUMED_BANDWIDTH * bandwidth
    return max(operation.bytes / bandwidth, operation.flops / flops, operation.launches * LAUNCH)


def roofline(traced: Operations, card: Card, *, at_peak: bool = True) -> dict[str, float]:
    """Seconds by group of operators, the longest first; see `seconds`."""
    found: defaultdict[str, float] = defaultdict(float)
    for operation in traced.operators:
        found[operation.group] += seconds(operation, card, at_peak=at_peak)
    return dict(sorted(found.items(), key=lambda item: -item[1]))
