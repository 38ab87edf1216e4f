"""Shared by the benchmarks: interleaved measurement of several arms, a table, a JSON file."""

import argparse
import contextlib
import datetime
import importlib.metadata
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import tables
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
NULL = GPU and "NULL_DEVICE_CARD" in os.environ
"""Whether the GPU is a driver that does nothing (tests/null_device): launches and memory are right, values and times are not."""
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels then run, but their times mean nothing
WARM_UP = 3
HEAD_START = 4_000_000
"""Cycles (about 2 ms) that the GPU waits while the CPU launches: a small kernel runs faster than it is launched."""
STARTED = time.monotonic()
LAUNCHES: dict[str, int] = {}
"""On a null device: kernels of an arm's last call."""
RATIOS = {"x_reference", "x_tuned", "of_peak", "of_copy", "TFLOPS", "cost"}
"""Columns without a meaning on a null device."""


def parser(description: str | None, name: str, repeats: int, batch: int = 8) -> argparse.ArgumentParser:
    """The options that every benchmark takes; `repeats` and `batch` are for a GPU."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--repeats", type=int, default=1 if NULL else repeats if GPU else 3)
    result.add_argument("--batch", type=int, default=batch if GPU else 2)
    result.add_argument("--seconds", type=float, default=math.inf, help="begin no further repeat after so long")
    result.add_argument("--json", type=Path, default=Path(f"runs/bench/{name}.json"))
    return result


def machine() -> str:
    """Date, device and versions: the line above every table."""
    name = torch.cuda.get_device_name() if GPU else f"{platform.machine()}, {os.cpu_count()} cores"
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}" for package in ("torch", "triton", "diffusers")
    )
    note = "" if GPU else "; kernels interpreted: their times mean nothing"
    if NULL:
        note = "; a null device: nothing is computed, times are those of the host"
    return f"{datetime.date.today()}, {name}, {versions}{note}"


def measure(
    arms: dict[str, Callable[[], object]],
    repeats: int,
    *,
    block: int = 1,
    turn: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext,
    until: float = math.inf,
    after_round: Callable[[dict[str, float], int], object] | None = None,
) -> dict[str, float]:
    """Median seconds of each arm. The arms are interleaved.

    Args:
        arms: what to measure, by name.
        repeats: how often.
        block: calls of an arm in a row, if a change of arms costs time.
        turn: `with turn(name)` is around each block.
        until: of `time.monotonic()`; no round begins after it, but the first.
        after_round: gets the medians and the number of repeats so far.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    warm_up = 0 if NULL else WARM_UP if GPU else 1
    for number in range(math.ceil(repeats / block)):
        for name, run in arms.items():
            with turn(name):
                for _ in range(warm_up if number == 0 else block > 1):
                    timed(run)
                before = launches()
                seconds[name] += [timed(run) for _ in range(block)]
                LAUNCHES[name] = (launches() - before) // block
        if after_round is not None:
            after_round(_medians(seconds), (number + 1) * block)
        if time.monotonic() > until:
            break
    return _medians(seconds)


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in seconds.items()}


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call. On a GPU by its clock, with launches ahead of it, as in training."""
    if not GPU or NULL:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def launches() -> int:
    """Kernels so far, as a null device counts them; a GPU does not count."""
    if not NULL:
        return 0
    sys.path.append(str(Path(__file__).resolve().parents[1] / "null_device"))
    from null_driver import Device

    return int(Device().counters.launches)


def at_least(flops: float, size: float) -> float | None:
    """Seconds that this GPU needs for so many FLOPs and bytes, by its data sheet; None: it is not in the list."""
    from scfm_core.train.roofline import CARDS

    name = torch.cuda.get_device_name() if GPU else ""
    card = next((card for key, card in CARDS.items() if key.split()[0] in name), None)
    return None if card is None else max(flops / card.bf16, size / card.bandwidth)


def copy_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes: an upper bound for elementwise kernels."""
    source = torch.empty(2**28 if GPU else 2**22, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / measure({"copy": lambda: target.copy_(source)}, 1 if NULL else 20)["copy"]


def save(title: str, rows: tables.Rows, columns: dict[str, str], path: Path) -> None:
    """Write the rows as JSON, so that they are kept if the process is killed before its end."""
    if NULL:
        columns = {key: form for key, form in columns.items() if key not in RATIOS}
        rows = [{key: value for key, value in row.items() if key not in RATIOS} for row in rows]
        if len({row.get("arm") for row in rows}) == len(rows):  # one measurement of each arm
            columns = columns | {"launches": "d"}
            rows = [{"launches": LAUNCHES.get(row.get("arm", "")), **row} for row in rows]
    tables.save(path, {"title": title, "machine": machine(), "columns": columns, "rows": list(rows)})


def report(title: str, rows: tables.Rows, columns: dict[str, str], path: Path) -> None:
    """Print `columns` (key -> format) of the rows as one table, and write the rows as JSON."""
    save(title, rows, columns, path)
    found = tables.load(path)
    print(f"{title}\n{found['machine']}\n{tables.text(found['rows'], found['columns'])}", flush=True)
