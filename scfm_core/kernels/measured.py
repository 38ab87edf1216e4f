"""Times of kernels on this GPU, and the files that keep what was measured."""

import json
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 7, calls: int = 5) -> float:
    """Median time of `call` by the GPU's clock. Several calls are launched during a wait of about 5 ms on the GPU, so that launches
    are ahead of the GPU, as in training."""
    times = []
    for number in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(10_000_000)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        if number >= 2:
            times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def cache_file(name: str) -> Path:
    """A file in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "scfm" / name


def write_measured(path: Path, measured: Mapping[str, Any]) -> None:
    """Write the file atomically, because several processes may write at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Machines and containers that share the folder may have the same process numbers.
        temporary = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}")
        temporary.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return  # without a cache, every start measures again, which takes seconds
