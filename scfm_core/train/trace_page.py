"""The trace's part of a dry run's output."""

from dataclasses import replace

from scfm_core.train.cards import GIB
from scfm_core.train.roofline import ASSUMED_BANDWIDTH, ASSUMED_COMPUTE, CARDS, LAUNCH, roofline
from scfm_core.train.trace_ops import GROUPS, UPDATES
from scfm_core.train.trace_step import Traced
from scfm_core.wording import count

OUTSIDE = 2 * GIB
"""Bytes of CUDA's context, NCCL's buffers and the workspaces of cuBLAS and cuDNN, assumed: PyTorch's allocator does not have them."""


def format_memory(parts: dict[str, float]) -> list[str]:
    """Memory by formula."""
    return ["memory of one GPU, by formula", *table(parts)]


def format_traced(traced: Traced, formula: dict[str, float], *, compiled: bool) -> list[str]:
    """Memory, number of kernels and collectives of a traced step; `formula` has the parts that no trace has, `compiled` is `train.compile`."""
    encoders = formula["encoders (on the fly)"]
    parts: dict[str, float] = {**traced.peak_by_part, "encoders (on the fly, by formula)": encoders}
    reserved = traced.reserved + encoders
    number = count(traced.micro_batches, "micro-batch", "micro-batches")
    collectives = ", ".join(
        f"{kind} {calls} x, {size / 1e9:,.3g} GB" for kind, (calls, size) in traced.collectives.items()
    )
    return [
        f"memory of one GPU at the peak, traced: {number} and the optimizer, at the true size"
        + "; blocks are eager, although train.compile=true" * compiled,
        *table(parts),
        f"  {'reserved':<28} {gib(reserved)} by a model of PyTorch's allocator without expandable segments, which are the default and leave fewer gaps; {gib(reserved + OUTSIDE).strip()} with 2 GiB for CUDA's context, "
        f"NCCL and cuBLAS (assumed)",
        f"traced      {_flops(traced.flops)} and {traced.launches:,} kernels in {number}; the host waits "
        f"{count(traced.reads, 'time', 'times')}",
        *([f"collectives {collectives}, in {number}"] if collectives else []),
    ]


def format_roofline(traced: Traced, number: int, steps: int) -> list[str]:
    """Milliseconds of a step of `number` micro-batches by group on each card, and hours of `steps` of them."""
    scale = number / traced.micro_batches
    step = replace(
        traced,
        operators=[
            operation
            if operation.phase in UPDATES
            else replace(
                operation,
                launches=scale * operation.launches,
                bytes=scale * operation.bytes,
                flops=scale * operation.flops,
            )
            for operation in traced.operators
        ],
    )
    times = [roofline(step, card) for card in CARDS.values()]
    likely = [roofline(step, card, at_peak=False) for card in CARDS.values()]
    samples = number * traced.micro_batch_size

    def row(name: str, values: list[str]) -> str:
        return f"  {name:<28}" + "".join(f"{value:>11}" for value in values)

    def milliseconds(name: str) -> list[str]:
        return [f"{1e3 * found.get(name, 0.0):,.0f}" for found in times]

    rows = [row(name, milliseconds(name)) for name in GROUPS if any(found.get(name) for found in times)]
    totals = [sum(found.values()) for found in likely]
    return [
        f"roofline of a step of {count(number, 'micro-batch', 'micro-batches')}, ms: the most of bytes / bandwidth, FLOPs / peak, and "
        f"{1e6 * LAUNCH:.0f} us a kernel; communication is not counted",
        row("", list(CARDS)),
        *rows,
        row("total at the peaks", [f"{1e3 * sum(found.values()):,.0f}" for found in times]),
        row(
            f"at {ASSUMED_COMPUTE:.0%} and {ASSUMED_BANDWIDTH:.0%} (assumed)",
            [f"{1e3 * total:,.0f}" for total in totals],
        ),
        row("samples/s of a GPU, at these", [f"{samples / total:,.2f}" for total in totals]),
        row("hours of this run, at these", [f"{steps * total / 3600:,.1f}" for total in totals]),
        "  elementwise operators of compiled blocks are modelled: what lies between two other kernels reads its inputs and writes what is "
        "used later, once; packed weights are dequantised in them",
    ]


def table(parts: dict[str, float]) -> list[str]:
    """Lines of bytes by part, and their sum."""
    rows = [f"  {name:<28} {gib(size)}" for name, size in parts.items() if size]
    return [*rows, f"  {'total':<28} {gib(sum(parts.values()))}"]


def gib(size: float) -> str:
    """Bytes in GiB, or MiB."""
    return f"{size / GIB:8.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:8.2f} MiB"


def _flops(number: float) -> str:
    return f"{number / 1e12:,.4g} TFLOPs" if number >= 1e12 else f"{number / 1e9:,.4g} GFLOPs"
