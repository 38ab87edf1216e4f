"""`scfm train`: parse, build, loop."""

import contextlib
import fcntl
import gc
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from recipes.export import export
from scfm_core.distributed.deepspeed_config import deepspeed_config
from scfm_core.distributed.world import World, join_world, launched_size
from scfm_core.errors import UserError
from scfm_core.models.protocol import ModelFamily
from scfm_core.train.build import build_family, micro_batches, optimizer_config, resolve_device, validation_prompts
from scfm_core.train.checkpoint import find_checkpoint, point_to, verify_checkpoint
from scfm_core.train.config import RunConfig
from scfm_core.train.estimate import estimate, format_estimate
from scfm_core.train.history import HISTORY, Start
from scfm_core.train.kernels import choose_kernels
from scfm_core.train.parse import dump_config, load_config, with_absolute_paths
from scfm_core.train.trainer import Trainer, fit

# What belongs to one attempt at a run; `--resume never` moves it aside.
_ATTEMPT = (
    "config.yaml",
    "metrics.jsonl",
    "incidents.jsonl",
    HISTORY,
    "checkpoints",
    "samples",
    "adapter",
    "evaluation.json",
    "evaluation.yaml",
    "report.html",
    "wandb_id",
    "wandb",
)


def train(
    config_path: str,
    overrides: list[str],
    *,
    resume: str = "auto",
    dry_run: bool = False,
    processes: int | None = None,
    data_may_change: bool = False,
) -> int:
    """Run a recipe; returns the exit code: 0 when done, 128 + signal when stopped by one (as a shell would)."""
    try:
        config = load_config(config_path, overrides)
    except UserError as error:
        # The same on all processes of a machine, so one of them speaks; rank 0 for its machine without its number.
        error.agreed = os.environ.get("RANK", "0") == "0" or os.environ.get("LOCAL_RANK", "0") != "0"
        raise
    if dry_run:
        page = describe(config, processes or launched_size())
        if os.environ.get("RANK", "0") == "0":
            print(page)
        return 0
    config = with_absolute_paths(config)
    try:
        return _in_world(config, resume, data_may_change)
    except OSError as error:
        raise UserError(
            f"the run in {config.run.dir} stopped: {error}. If its disk is full, make room and run the same command again"
        ) from error
    finally:
        gc.collect()  # cycles hold the process group, whose threads abort an interpreter that ends before them


def _in_world(config: RunConfig, resume: str, data_may_change: bool) -> int:
    device = resolve_device(config.run.device)
    needs_group = config.engine.name == "deepspeed" or config.checkpoint.asynchronous
    with (
        join_world(device, config.engine.timeout, always=needs_group) as world,
        _claimed(config, world),
        Start(Path(config.run.dir) if world.is_main else None).recorded() as start,
    ):
        return _run(config, resume, world, data_may_change, start)


def _run(config: RunConfig, resume: str, world: World, data_may_change: bool, start: Start) -> int:
    run_dir = Path(config.run.dir)
    checkpoint = _starting_point(run_dir, resume, world)
    # Refuses what does not fit, before anything of an earlier attempt is touched.
    trainer = Trainer(config, checkpoint, world, data_may_change=data_may_change)
    with world.together():
        if world.is_main:
            if resume == "never":
                _move_aside(run_dir, _ATTEMPT)
            elif resume != "auto" and checkpoint is not None:
                _go_back(run_dir, checkpoint)
            (run_dir / "config.yaml").write_text(dump_config(config))
            print(f"kernels: {trainer.kernels}")
            if checkpoint is not None:
                print(f"resuming from {checkpoint} at step {trainer.progress.step}")
        start.begin(trainer.progress.step, config.train.steps, world.size)
    if trainer.progress.step < config.train.steps:
        stopped_by = fit(trainer)
        if stopped_by is not None:
            name = signal.Signals(stopped_by).name
            start.end("stopped", trainer.progress.step, name)
            if world.is_main:
                print(f"stopped by {name} after step {trainer.progress.step}; the same command goes on from there")
            return 128 + stopped_by
    elif world.is_main:
        print(f"nothing to do: {run_dir} has all {config.train.steps} steps")
    with world.together():
        if config.train.weights == "lora" and world.is_main:
            print(f"adapter: {export(run_dir, [], merged=None, num_steps=None)}")
    start.end("finished", trainer.progress.step)
    return 0


@contextlib.contextmanager
def _claimed(config: RunConfig, world: World) -> Iterator[None]:
    """Rank 0 makes the run's folder and locks it; what stands in the way is every rank's error."""
    run_dir = Path(config.run.dir)
    with contextlib.ExitStack() as stack:
        with world.together():
            if world.is_main:
                try:
                    run_dir.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    reason = "it is a file" if run_dir.is_file() else error.strerror
                    raise UserError(
                        f"run.dir: {run_dir} cannot be written ({reason}). Choose another with run.dir=PATH"
                    ) from error
                stack.enter_context(_only_one(run_dir))
        yield


@contextlib.contextmanager
def _only_one(run_dir: Path) -> Iterator[None]:
    """Two runs in one folder would write over each other. The lock ends with the process, however it ends."""
    with (run_dir / ".lock").open("w") as lock:
        os.register_at_fork(after_in_child=lock.close)  # a loader's worker outlives a killed rank by some seconds
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another scfm train is running in {run_dir}. Wait for it, or use another run.dir"
            ) from error
        yield


def describe(config: RunConfig, processes: int = 1) -> str:
    """The dry run: the configuration is valid for so many processes; this is what it will cost."""
    validation_prompts(config)
    accumulation = micro_batches(config.train, World(size=processes))
    if config.engine.name == "deepspeed":
        deepspeed_config(config.engine, optimizer_config(config.train, accumulation), processes, config.train.weights)
    elif config.engine.shard != -1 and processes % config.engine.shard:
        raise UserError(
            f"engine.shard={config.engine.shard} does not divide {processes} processes; say how many with --gpus"
        )
    family = build_family(config, offline=True)
    return format_estimate(estimate(config, family, processes), config, _kernels_here(config, family))


def _kernels_here(config: RunConfig, family: ModelFamily) -> str:
    """What this machine would compute with; a dry run may be made where the run could not."""
    try:
        device = resolve_device(config.run.device)
        kernels = choose_kernels(config, family, device)
    except UserError as error:
        return f"not to be chosen here: {error}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU; a GPU chooses for itself"
    return f"{kernels}; on {name}"


def _starting_point(run_dir: Path, resume: str, world: World) -> Path | None:
    """The verified checkpoint to go on from, the same on every rank; nothing is changed."""
    if resume == "auto":
        return find_checkpoint(run_dir, world=world)
    if resume == "never":
        return None
    path = Path(resume).expanduser()
    if not path.is_dir():
        raise UserError(
            f"--resume {resume}: there is no such checkpoint folder. Use auto, never, or a path to step_XXXXXXXX"
        )
    if (path / "checkpoints").is_dir():
        found = find_checkpoint(path, world=world)
        if found is None:
            raise UserError(f"--resume {resume}: that run has no complete checkpoint")
        return found
    verify_checkpoint(path, world)
    return path


def _go_back(run_dir: Path, start: Path) -> None:
    """Make `start` the newest checkpoint of this run, so that a later start with `auto` goes on from it too."""
    own = run_dir / "checkpoints"
    if start.resolve().parent == own.resolve():
        _move_aside(own, [path.name for path in own.glob("step_*") if path.name > start.name], into=run_dir)
        point_to(start)
        return
    _move_aside(run_dir, _ATTEMPT)
    metrics = start.parents[1] / "metrics.jsonl"
    if metrics.is_file():
        shutil.copy(metrics, run_dir / "metrics.jsonl")
    own.mkdir()
    aside = own / f".{start.name}.tmp"
    shutil.copytree(start, aside)
    aside.rename(own / start.name)
    point_to(own / start.name)


def _move_aside(folder: Path, names: Sequence[str], into: Path | None = None) -> None:
    """Nothing of an earlier attempt is deleted: it goes to `previous-1`, `previous-2`, ..."""
    present = [name for name in names if (folder / name).exists()]
    if not present:
        return
    number = 1
    while ((into or folder) / f"previous-{number}").exists():
        number += 1
    target = (into or folder) / f"previous-{number}"
    target.mkdir()
    for name in present:
        (folder / name).rename(target / name)
    print(f"moved {', '.join(present)} of the earlier attempt to {target}")
