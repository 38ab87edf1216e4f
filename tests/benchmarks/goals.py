"""The goals of the benchmarks on a GPU, and how far a day's results are from them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Table = dict[str, Any]
Found = Mapping[str, Mapping[str, Table | None]]
"""By part and name: the tables of a day, None for those that are not written."""
COLUMNS = {"goal": "", "figure": "", "wanted": "", "measured": "", "reached": ""}
GIB = 2**30


@dataclass(frozen=True)
class Goal:
    """One figure."""

    number: str
    figure: str
    wanted: str
    form: str
    """Format of the measured value."""
    measured: Callable[[Found], float | None]
    is_reached: Callable[[float], bool]


def rows(found: Found, part: str, **wanted: Any) -> Iterator[dict[str, Any]]:
    """Rows of a part's table that have these values."""
    table = found.get(part, {}).get(part)
    for row in table["rows"] if table else ():
        if all(row.get(key) == value for key, value in wanted.items()):
            yield row


def _one(key: str, part: str, **wanted: Any) -> Callable[[Found], float | None]:
    return lambda found: next((row.get(key) for row in rows(found, part, **wanted)), None)


def _least(key: str, part: str, arm: str, *, start: bool = False) -> Callable[[Found], float | None]:
    """The smallest value of an arm, whose name may go on after `arm`."""

    def measured(found: Found) -> float | None:
        values = [
            row[key]
            for row in rows(found, part)
            if (row["arm"].startswith(arm) if start else row["arm"] == arm) and row.get(key) is not None
        ]
        return min(values, default=None)

    return measured


def _against_compiled(found: Found) -> float | None:
    """Least ratio of compiled PyTorch's time to ours, of all fused operations."""
    compiled = {
        (row["kernel"], row["pass"]): row["microseconds"] for row in rows(found, "kernels", arm="reference: compiled")
    }
    ratios = [
        compiled[key] / row["microseconds"]
        for row in rows(found, "kernels", arm="ours")
        if (key := (row["kernel"], row["pass"])) in compiled
    ]
    return min(ratios, default=None)


def _worst_peak(found: Found) -> float | None:
    """The largest relative difference between a run's peak and its trace."""
    values = [
        abs(row["peak_GiB"] / row["traced_GiB"] - 1)
        for row in rows(found, "peak")
        if row.get("traced_GiB") and row.get("peak_GiB")
    ]
    return max(values, default=None)


def _at_least(limit: float) -> Callable[[float], bool]:
    return lambda value: value >= limit


def _at_most(limit: float) -> Callable[[float], bool]:
    return lambda value: value <= limit


_SELECTIVE = {"arm": "ours: selective", "batch": 8}
GOALS = (
    Goal("1", "step against the authors' step", "2.2 x", ".2f", _one("x_reference", "step", arm="ours"), _at_least(2.2)),
    Goal("2", "step against the tuned one", "1.15 x", ".2f", _one("x_tuned", "step", arm="ours"), _at_least(1.15)),
    Goal("3", "forward, of bf16 peak", "60%", ".0%", _one("of_peak", "forward", arm="ours: adapters"), _at_least(0.6)),
    Goal("3", "LoRA step, of bf16 peak", "50%", ".0%", _one("of_peak", "step", arm="ours"), _at_least(0.5)),
    Goal("4", "attention as chosen, against the fastest library", "0.98 x", ".2f",
         _least("x_reference", "attention", "ours: auto", start=True), _at_least(0.98)),
    Goal("4", "attention in Triton, against the fastest library", "0.7 x", ".2f",
         _least("x_reference", "attention", "ours: triton"), _at_least(0.7)),
    Goal("5", "fused operations, share of a copy's bandwidth", "80%", ".0%", _least("of_copy", "kernels", "ours"), _at_least(0.8)),
    Goal("5", "fused operations, against eager", "5 x", ".1f", _least("x_reference", "kernels", "ours"), _at_least(5)),
    Goal("5", "fused operations, against compiled", "1 x", ".2f", _against_compiled, _at_least(1)),
    Goal("6", "cost of LoRA in a forward", "5%", ".1%", _one("cost", "forward", arm="ours: adapters"), _at_most(0.05)),
    Goal("7", "switches, optimizer and EMAs", "5 ms", ".1f", _one("milliseconds", "update", arm="ours"), _at_most(5)),
    Goal("8", "peak of batch 8, 512 x 512, 512 text tokens, selective, GiB", "74.5", ".1f",
         _one("peak_GiB", "memory", **_SELECTIVE), _at_most(80e9 / GIB)),
    Goal("8", "slowdown of selective checkpointing, x none", "0.95 x", ".2f",
         _least("x_reference", "memory", "ours: selective"), _at_least(0.95)),
    Goal("9", "FSDP2 on one process, x none", "0.99 x", ".3f", _one("x_reference", "fsdp", arm="ours: FSDP2"), _at_least(0.99)),
    Goal("12", "peak against the trace, largest difference", "5%", ".1%", _worst_peak, _at_most(0.05)),
    Goal("13", "predicted: step against the tuned one, A100, batch 4", "1.15 x", ".2f",
         _one("x_tuned", "predict", arm="ours", card="A100 80 GB", batch=4), _at_least(1.15)),
)  # fmt: skip


def reached(found: Found) -> list[dict[str, Any]]:
    """A row for each goal, for `COLUMNS`. On the null device times mean nothing, so only memory and predictions are compared."""
    is_null = any(
        "null device" in (table or {}).get("machine", "") for part in found.values() for table in part.values()
    )
    result = []
    for goal in GOALS:
        value = goal.measured(found)
        if is_null and "GiB" not in goal.figure and goal.number not in ("12", "13"):
            value = None
        result.append(
            {
                "goal": goal.number,
                "figure": goal.figure,
                "wanted": goal.wanted,
                "measured": None if value is None else format(value, goal.form),
                "reached": None if value is None else "yes" if goal.is_reached(value) else "no",
            }
        )
    return result


def add_predictions(found: Found, device: str) -> None:
    """Put the trace's and the roofline's predictions beside the figures of the step and of the peaks, in place."""
    predicted = {(row["arm"], row["batch"]): row for row in rows(found, "predict") if row["card"].split()[0] in device}
    for row in rows(found, "step"):
        other = predicted.get((row["arm"], row["batch"]), {})
        row |= {"predicted_ms": other.get("total"), "traced_GiB": other.get("peak_GiB")}
    _add_columns(found, "step", "milliseconds", {"predicted_ms": ".1f"})
    _add_columns(found, "step", "peak_GiB", {"traced_GiB": ".1f"})
    traced = found.get("predict", {}).get("predict_peak")
    peaks = {row["run"]: row["traced_GiB"] for row in traced["rows"]} if traced else {}
    for row in rows(found, "peak"):
        row["traced_GiB"] = peaks.get(row["run"])
    _add_columns(found, "peak", "peak_GiB", {"traced_GiB": ".1f"})


def _add_columns(found: Found, part: str, after: str, more: dict[str, str]) -> None:
    table = found.get(part, {}).get(part)
    if table:
        columns: dict[str, str] = {}
        for key, form in table["columns"].items():
            columns[key] = form
            if key == after:
                columns |= more
        table["columns"] = columns
