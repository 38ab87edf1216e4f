"""The time of a step by part, predicted: each arm of bench_step.py at true size on meta tensors, and the roofline of some GPUs.

    python tests/benchmarks/predict.py [--batches 4,8] [--cards "A100 80 GB,H100"] [--arms NAME,...] [--json PATH]

No GPU is needed, and nothing is computed. Times are milliseconds of one step at the peaks of the data sheets; `70/85` is the total with
products and attention at 70 % of the peak and everything else at 85 % of the bandwidth, as assumed in train/roofline.py; the ratios are of
these, in samples/s. Elementwise operators of a compiled arm are those that compiled_traffic.py counted, or else a model of what
`torch.compile` fuses (train/trace_mode.py); `counted` says which. `automodel` has its own batch and other passes: see step_arms.py.
"""

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tables
import torch
from peak import RUNS, load
from setting import Setting
from step_arms import AUTOMODEL_BATCH, automodel, ours, reference, tuned_reference

from scfm_core.train import trace_ops
from scfm_core.train.roofline import CARDS, roofline
from scfm_core.train.trace_device import GpuFunctions, as_gpu
from scfm_core.train.trace_mode import Recorder
from scfm_core.train.trace_ops import Operation
from scfm_core.train.trace_step import trace_step

META = torch.device("meta")
PARTS = {
    "base": (trace_ops.BASE,),
    "adapters": (trace_ops.ADAPTER,),
    "attention": (trace_ops.ATTENTION,),
    "elementwise": (trace_ops.FUSED, trace_ops.ELEMENTWISE, trace_ops.COMPILED, trace_ops.SHARDING),
    "optimizer": (trace_ops.OPTIMIZER,),
}
COLUMNS = {
    "card": "", "arm": "", "batch": "d", **dict.fromkeys(PARTS, ".0f"), "total": ".0f", "70/85": ".0f", "samples_per_s": ".2f",
    "x_reference": ".2f", "x_tuned": ".2f", "TFLOP": ".0f", "launches": "d", "peak_GiB": ".1f", "counted": "",
}  # fmt: skip
COMPILED_TRAFFIC = Path(__file__).with_name("compiled_traffic.json")
BACKEND = "flash"
"""What attention saves does not depend on the backend."""
TRITON = {"backend": BACKEND, "fused": "triton", "compiled": False}
ARMS = {  # how to make it, whether it is compiled
    "reference": (partial(reference, backend=BACKEND), False),
    "reference: tuned": (partial(tuned_reference, backend=BACKEND, compiled=False), True),
    "reference: automodel": (partial(automodel, backend=BACKEND), False),
    "ours: diffusers' blocks": (partial(ours, backend=BACKEND, fused="none", compiled=False), True),
    "ours": (partial(ours, **TRITON), True),
    "ours: selective": (partial(ours, **TRITON, checkpointing="selective"), True),
}
"""`compiled` is modelled by the recorder: nothing is compiled here."""


@dataclass(frozen=True)
class Traced:
    """What one step of an arm does."""

    operators: list[Operation]
    peak: int
    """Bytes of all tensors at the peak."""
    batch: int
    is_counted: bool
    """Whether the compiled kernels are those of the compiler."""

    @property
    def flops(self) -> float:
        return sum(operation.flops for operation in self.operators)

    @property
    def launches(self) -> int:
        return sum(operation.launches for operation in self.operators)


def trace(name: str, batch: int, *, tiny: bool = False) -> Traced:
    """One step of an arm, after a first one."""
    make, compiled = ARMS[name]
    recorder = Recorder(rank=0 if tiny else 64, compiled=compiled)  # tiny layers are as narrow as a rank
    with as_gpu(recorder) as functions, recorder:
        setting = Setting(AUTOMODEL_BATCH if name.endswith("automodel") else batch, device=META, tiny=tiny)
        setting.phase = partial(_phase, recorder, functions, name in ("reference", "reference: tuned") and not tiny)
        arm = make(setting)
        arm()
        recorder.memory.start()
        recorder.is_on = True
        arm()
        recorder.is_on = False
        operators = recorder.operators()
    known = tables.load(COMPILED_TRAFFIC).get(name) if compiled and not tiny and COMPILED_TRAFFIC.is_file() else None
    if known is not None:
        operators = [operation for operation in operators if operation.group != trace_ops.COMPILED]
        launches, size = known["launches"], known["bytes"] * setting.batch / known["batch"]
        operators.append(Operation("passes", trace_ops.COMPILED, "inductor", launches, launches, size, 0.0))
    return Traced(operators, recorder.memory.peak, setting.batch, known is not None)


@contextlib.contextmanager
def _phase(recorder: Recorder, functions: GpuFunctions, autocast: bool, name: str) -> Iterator[None]:
    """A phase of the step. What the backward recomputes is under autocast, as its forward was."""
    within = functions.autocast(torch.bfloat16) if autocast and name == "backward" else contextlib.nullcontext()
    with recorder.within(name), within:
        yield


def rows_of(name: str, traced: Traced, cards: list[str]) -> list[dict[str, Any]]:
    """A row for each card, without the ratios."""
    found = []
    for card in cards:
        peak, real = (roofline(traced, CARDS[card], at_peak=at_peak) for at_peak in (True, False))
        parts = {part: 1e3 * sum(peak.get(group, 0.0) for group in groups) for part, groups in PARTS.items()}
        found.append(
            {
                "card": card,
                "arm": name,
                "batch": traced.batch,
                **parts,
                "total": 1e3 * sum(peak.values()),
                "70/85": 1e3 * sum(real.values()),
                "samples_per_s": traced.batch / sum(real.values()),
                "TFLOP": traced.flops / 1e12,
                "launches": traced.launches,
                "peak_GiB": traced.peak / 2**30,
                "counted": "yes" if traced.is_counted else "",
            }
        )
    return found


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`x_reference` and `x_tuned`: samples/s against those arms on the same card, of the batch of the other arms."""
    rates = {(row["card"], row["batch"], row["arm"]): row["samples_per_s"] for row in rows}
    for row in rows:
        for key, arm in (("x_reference", "reference"), ("x_tuned", "reference: tuned")):
            rate = rates.get((row["card"], row["batch"], arm))
            row[key] = None if rate is None else row["samples_per_s"] / rate
    return sorted(rows, key=lambda row: (row["card"], row["arm"] == "reference: automodel", row["batch"]))


def traced_peaks(path: Path) -> None:
    """Peaks of the runs of peak.py, as the dry run traces them."""
    rows: list[dict[str, Any]] = []
    for name in RUNS:
        traced = trace_step(load(name, compiled=True))
        rows.append({"run": name, "traced_GiB": traced.peak / 2**30, "reserved_GiB": traced.reserved / 2**30})
        columns = {"run": "", "traced_GiB": ".2f", "reserved_GiB": ".2f"}
        tables.save(path, {"title": "peaks, traced", "machine": "no GPU", "columns": columns, "rows": rows})
    print(tables.text(rows, columns), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="4,8")
    parser.add_argument("--cards", default="A100 80 GB,H100,H200")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--json", type=Path, default=Path("runs/bench/predict.json"))
    options = parser.parse_args(argv)
    cards, names = options.cards.split(","), options.arms.split(",")
    title = "one step of Flux.1-dev, 512 x 512 pixels, 256 text tokens, rank 64: predicted, not measured"
    rows: list[dict[str, Any]] = []

    def save() -> None:
        machine = f"traced on meta tensors, torch {torch.__version__}"
        content = {"title": title, "machine": machine, "columns": COLUMNS, "rows": with_ratios(rows)}
        tables.save(options.json, content)

    for batch in map(int, options.batches.split(",")):
        for name in names:
            if name.endswith("automodel") and any(row["arm"] == name for row in rows):
                continue
            began = time.process_time()
            rows += rows_of(name, trace(name, batch), cards)
            print(f"{name}, batch {rows[-1]['batch']}: {time.process_time() - began:.0f} s of the CPU", flush=True)
            save()
    print(f"{title}\n{tables.text(with_ratios(rows), COLUMNS)}", flush=True)
    traced_peaks(options.json.with_name("predict_peak.json"))


if __name__ == "__main__":
    main()
