"""`scfm health`: check the machines of a launch before a run, to find a bad one within a minute and not after an hour."""

import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from recipes.job import other_job
from scfm_core.data.cache import cache_folder
from scfm_core.data.corpus import Corpus
from scfm_core.distributed.world import World, join_world
from scfm_core.errors import UserError, agreed_error
from scfm_core.launched import launched_size, local_rank, local_size
from scfm_core.progress import beat
from scfm_core.secrets import scrub
from scfm_core.train.assemble import build_family
from scfm_core.train.config import RunConfig
from scfm_core.train.device import resolve_device
from scfm_core.train.disk import disk_bytes, present_bytes
from scfm_core.train.estimate import estimate
from scfm_core.train.history import write_event
from scfm_core.train.parse import load_config

_PACKAGES = ("scfm", "torch", "diffusers", "transformers", "deepspeed", "numpy", "safetensors")
_MAX_SKEW = 5.0
"""Largest difference between clocks in seconds. From minutes on, signed requests to storage fail; below, logs
are hard to compare."""
_MIN_FREE_MEMORY = 0.9
"""Smallest free fraction of a GPU's memory; with less, another process uses the GPU."""
_MIN_FREE_DISK = 5e9
"""Smallest free space in bytes of folders for temporary files and copies, whose size is not known before the run."""
_NETWORK_TIMEOUT = 120.0
"""Seconds for the all-reduce, which includes the first connections of NCCL. Everything else has `engine.timeout`, as in training."""
_ALL = "all nodes"
_ALL_REDUCE_BYTES = 64 << 20


@dataclass(kw_only=True)
class Report:
    """The findings of one process."""

    node: str
    clock: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    gpus: int = 0
    free: float = 1.0
    problems: list[str] = field(default_factory=list)
    """Of the run."""
    faults: list[str] = field(default_factory=list)
    """Of this node: another may be well. If all of several nodes have one, it is the run's."""


def check_health(config_path: str, overrides: list[str]) -> None:
    """Check this launch's machines for a recipe; rank 0 prints a table.

    In phases, as a training starts: local work, which may be slow as long as it reports progress; then the ranks agree; then
    collectives.

    Raises:
        UserError: on every rank, naming the node of every problem.
    """
    config = load_config(config_path, overrides)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    device = resolve_device(config.run.device)
    with join_world(device, config.engine.timeout) as world:
        with world.together():
            report = _inspect(config, node, device)
        world.gather(None)  # all clocks are read at the same moment
        report.clock = time.time()
        reports = world.gather(report)
        problems = find_problems(reports)
        if problems:
            on_all_nodes = all(line.startswith(_ALL) for line in problems)
            what = "the run cannot work with these settings" if on_all_nodes else "these nodes cannot run it"
            error = agreed_error(f"{what}:\n" + "\n".join(f"  {line}" for line in problems))
            run_dir = Path(config.run.dir)
            # A batch job reads there whether to try again. A job that was submitted twice must not write there.
            if world.is_main and run_dir.is_dir() and other_job(run_dir) is None:
                how = "refused" if on_all_nodes else "failed"
                write_event(run_dir, "end", how=how, step=None, reason=scrub(str(error)))
            raise error
        seconds = None
        if world.watchdog is not None:
            with world.together(), world.watchdog.at_most(_NETWORK_TIMEOUT, "the all-reduce"):
                seconds = time_all_reduce(world, device)
        if world.is_main:
            print(_table(reports, seconds), flush=True)


def _inspect(config: RunConfig, node: str, device: torch.device) -> Report:
    """The findings of this process, without communication."""
    report = Report(node=node, device=device.type, gpus=torch.cuda.device_count() if device.type == "cuda" else 0)
    report.versions = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        report.device, report.free = torch.cuda.get_device_name(device), free / total
        report.versions["cuda"] = str(torch.version.cuda)
        report.versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        if report.free < _MIN_FREE_MEMORY:
            report.faults.append(
                f"GPU {device.index or 0} has {free / 1e9:.0f} of {total / 1e9:.0f} GB free: another process uses it"
            )
    if local_rank() == 0:  # once for each node
        local = local_size()
        if device.type == "cuda" and report.gpus < local:
            report.faults.append(f"{report.gpus} GPUs are visible, {local} processes were started")
        report.problems += _problem_of_folder("run.dir", Path(config.run.dir).expanduser(), _needed_for_run(config))
        for what, folder in (
            ("TMPDIR", tempfile.gettempdir()),
            ("data.cache.dir", cache_folder(config.data.cache.dir)),
        ):
            report.faults += _problem_of_folder(what, Path(folder).expanduser(), _MIN_FREE_DISK)
        for what, check in (
            ("model.path", lambda: build_family(config, offline=True)),
            ("data", lambda: Corpus(config.data)),
        ):
            beat(f"the check of {what}")
            try:
                check()
            except (UserError, OSError) as error:
                report.problems.append(str(error) if str(error).startswith(what) else f"{what}: {error}")
    return report


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _needed_for_run(config: RunConfig) -> float:
    """Bytes that the run will write into `run.dir`, less the checkpoints that are there and that it will replace."""
    try:
        result = estimate(config, build_family(config, offline=True), launched_size())
    except (UserError, OSError):  # reported as a problem of the model
        return _MIN_FREE_DISK
    checkpoint = sum(result.checkpoint.values())
    return max(disk_bytes(config, checkpoint) - present_bytes(Path(config.run.dir)), checkpoint)


def _problem_of_folder(what: str, folder: Path, needed: float) -> list[str]:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        return [
            f"{what}: {folder} has {free / 1e9:.1f} GB free, less than the {needed / 1e9:.1f} GB that a run needs there. Make room, or "
            f"set another {what}; `scfm train --dry-run` lists what a run writes"
        ]
    if not os.access(existing, os.W_OK):
        return [f"{what}: {existing} cannot be written"]
    return []


def find_problems(reports: list[Report]) -> list[str]:
    """Every problem, with its nodes; versions, devices and clocks that differ from the majority are problems too."""
    nodes = {report.node for report in reports}
    faults = {text for report in reports for text in report.faults}
    found: dict[str, set[str]] = {}
    for report in reports:
        for text in report.problems + report.faults:
            found.setdefault(text, set()).add(report.node)
    problems = [
        f"{_ALL if where == nodes and not (len(nodes) == 1 and text in faults) else ', '.join(sorted(where))}: {text}"
        for text, where in found.items()
    ]
    for name in reports[0].versions:
        counts = Counter(report.versions.get(name) for report in reports)
        usual = counts.most_common(1)[0][0]
        others = {r.node: r.versions.get(name) for r in reports if r.versions.get(name) != usual}
        problems += [f"{node}: {name} {version}, the others have {usual}" for node, version in others.items()]
    devices = Counter(report.device for report in reports)
    usual_device = devices.most_common(1)[0][0]
    problems += [
        f"{node}: {device}, the others have {usual_device}"
        for node, device in dict.fromkeys((r.node, r.device) for r in reports)
        if device != usual_device
    ]
    middle = sorted(report.clock for report in reports)[len(reports) // 2]
    skews = {report.node: report.clock - middle for report in reports}
    problems += [
        f"{node}: its clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}; synchronise it (chrony, ntpd)"
        for node, skew in skews.items()
        if abs(skew) > _MAX_SKEW
    ]
    return problems


def time_all_reduce(world: World, device: torch.device, size: int = _ALL_REDUCE_BYTES) -> float | None:
    """Seconds of an all-reduce of `size` bytes over all processes, after a warm-up; None for a single process.

    Raises:
        UserError: if the sum is wrong.
    """
    if world.size == 1:
        return None
    tensor = torch.ones(size // 4, device=device)
    for _ in range(2):
        tensor.fill_(1.0)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    if not bool((tensor == world.size).all()):
        raise UserError(
            f"node {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}: an all-reduce of ones over {world.size} "
            f"processes gave a wrong sum. Its GPU or network corrupts data: exclude the node (sbatch --exclude)"
        )
    return seconds


def _table(reports: list[Report], seconds: float | None) -> str:
    nodes = Counter(report.node for report in reports)
    lines = [
        f"health: {len(nodes)} node{'s' if len(nodes) > 1 else ''} fit, {len(reports)} processes on {reports[0].device}"
    ]
    lines += [f"  {node}: {count} processes" for node, count in nodes.items()]
    if seconds is not None:
        lines.append(f"  all-reduce of {_ALL_REDUCE_BYTES >> 20} MiB: {seconds * 1e3:.1f} ms")
    lines.append("  " + ", ".join(f"{name} {version}" for name, version in reports[0].versions.items()))
    return "\n".join(lines)
