"""Shared by the benchmarks: interleaved measurement of several arms, a table, a JSON file."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels then run, but their times mean nothing
WARM_UP = 3
HEAD_START = 4_000_000
"""Cycles (about 2 ms) that the GPU waits while the CPU launches: a small kernel runs faster than it is launched."""


def parser(description: str | None, name: str, repeats: int, batch: int = 8) -> argparse.ArgumentParser:
    """The options that every benchmark takes; `repeats` and `batch` are for a GPU."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--repeats", type=int, default=repeats if DEVICE.type == "cuda" else 3)
    result.add_argument("--batch", type=int, default=batch if DEVICE.type == "cuda" else 2)
    result.add_argument("--json", type=Path, default=Path(f"runs/bench/{name}.json"))
    return result


def machine() -> str:
    """Date, device and versions: the line above every table."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}" for package in ("torch", "triton", "diffusers")
    )
    note = "" if DEVICE.type == "cuda" else "; kernels interpreted: their times mean nothing"
    return f"{datetime.date.today()}, {name}, {versions}{note}"


def measure(arms: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each arm. The arms are interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    warm_up = WARM_UP if DEVICE.type == "cuda" else 1
    for number in range(repeats + warm_up):
        for name, run in arms.items():
            elapsed = timed(run)
            if number >= warm_up:
                seconds[name].append(elapsed)
    return {name: statistics.median(times) for name, times in seconds.items()}


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call. On a GPU by its clock, with launches ahead of it, as in training."""
    if DEVICE.type != "cuda":
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


def copy_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes: an upper bound for elementwise kernels."""
    source = torch.empty(2**28 if DEVICE.type == "cuda" else 2**22, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / measure({"copy": lambda: target.copy_(source)}, 20)["copy"]


def report(title: str, rows: Sequence[dict[str, Any]], columns: dict[str, str], path: Path) -> None:
    """Print `columns` (key -> format) of the rows as one table, and write the rows as JSON."""
    print(f"{title}\n{machine()}")
    cells = [[key.replace("_", " ") for key in columns]]
    cells += [["" if row.get(key) is None else format(row[key], form) for key, form in columns.items()] for row in rows]
    widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
    texts = {number for number, key in enumerate(columns) if isinstance(rows[0].get(key), str)}
    for line in cells:
        parts = (c.ljust(w) if n in texts else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(parts).rstrip())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"title": title, "machine": machine(), "rows": list(rows)}, indent=1) + "\n")
