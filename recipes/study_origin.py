"""Where and when a run of a study was made: date, commit, machine. A table without them cannot be made again."""

import contextlib
import json
import os
import subprocess  # nosec B404 # git alone, with fixed words
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from scfm_core import __version__
from scfm_core.files import written_whole

_FILE = "origin.json"


def write_origin(folder: Path, part: str, device: torch.device) -> None:
    """Note in RUN_DIR/origin.json that a part of the run has just been made here.

    Args:
        folder: the run.
        part: `trained` or `evaluated`.
        device: of the run.
    """
    path = folder / _FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[part] = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": machine(device)}
    with written_whole(path, "RUN_DIR", "Make room there") as partial:
        partial.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def read_origins(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Dates, commits and machines of these runs, each once; runs that no study has made have none."""
    found: dict[str, set[str]] = {"date": set(), "commit": set(), "machine": set()}
    for folder in folders:
        if (folder / _FILE).is_file():
            for origin in json.loads((folder / _FILE).read_text(encoding="utf-8")).values():
                for key, value in origin.items():
                    found[key].add(value)
    return {key: sorted(values) for key, values in found.items()}


def commit() -> str:
    """The commit of this code, with `-dirty` if files have changed since; the version, where there is no git repository."""
    git = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*")
    with contextlib.suppress(OSError):
        done = subprocess.run(git, capture_output=True, text=True, check=False)  # nosec B603
        return done.stdout.strip() or f"of {__version__}"
    return f"of {__version__}"


def machine(device: torch.device) -> str:
    """The GPU, or the number and model of the CPU's cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores" + (f" ({model})" if model else "")
