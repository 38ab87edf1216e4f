"""`scfm train`: read the configuration, build the run, train."""

import contextlib
import gc
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.export import export
from scfm_core.distributed.deepspeed_config import deepspeed_config
from scfm_core.distributed.world import World, join_world
from scfm_core.errors import UserError
from scfm_core.files import link_or_copy, written_whole
from scfm_core.launched import launched_rank, launched_size, local_rank
from scfm_core.models.protocol import ModelFamily
from scfm_core.train.assemble import build_family, optimizer_config
from scfm_core.train.checkpoint import find_checkpoint, load_checkpoint, set_latest, verify_checkpoint
from scfm_core.train.config import RunConfig
from scfm_core.train.device import resolve_device
from scfm_core.train.estimate import estimate, format_estimate
from scfm_core.train.fit import fit
from scfm_core.train.history import HISTORY, Start
from scfm_core.train.kernels import choose_kernels
from scfm_core.train.parse import dump_config, load_config, to_plain, with_absolute_paths
from scfm_core.train.prompts import validation_prompts
from scfm_core.train.resume import changed_keys
from scfm_core.train.rules import check_base, check_shards, describe_micro_batches
from scfm_core.train.run_dir import checkpoint_folders, checkpoint_path, locked, make_run_dir, step_of
from scfm_core.train.trace_step import Traced, trace_step, why_not_traced
from scfm_core.train.trainer import Trainer
from scfm_core.wording import count

_CPU = "this CPU; on a GPU the choice may differ"
# Files of an attempt at a run; `--resume never` moves them to another folder.
_ATTEMPT_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "incidents.jsonl",
    HISTORY,
    "checkpoints",
    "samples",
    "adapter",
    "evaluation.json",
    "evaluation.yaml",
    ".evaluation",
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
    by_formula: bool = False,
    processes: int | None = None,
    data_may_change: bool = False,
) -> int:
    """Run a recipe; returns the exit code: 0 if all steps are done, 128 + the number of a signal that stopped it."""
    try:
        config = load_config(config_path, overrides)
    except UserError as error:
        # All processes of a machine raise this error. One of them prints it: local rank 0, or rank 0 without its number.
        error.agreed = launched_rank() == 0 or local_rank() != 0
        raise
    if dry_run:
        page = describe(config, processes or launched_size(), by_formula=by_formula)
        if launched_rank() == 0:
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
        gc.collect()  # reference cycles keep the process group, whose threads abort the interpreter if they run at its end


def _in_world(config: RunConfig, resume: str, data_may_change: bool) -> int:
    device = resolve_device(config.run.device)
    needs_group = config.engine.name == "deepspeed" or config.checkpoint.asynchronous
    with (
        join_world(device, config.engine.timeout, always=needs_group) as world,
        _locked_run_dir(config, world),
        Start(Path(config.run.dir) if world.is_main else None).recorded() as start,
    ):
        return _run(config, resume, world, data_may_change, start)


def _run(config: RunConfig, resume: str, world: World, data_may_change: bool, start: Start) -> int:
    run_dir = Path(config.run.dir)
    checkpoint = _find_start(run_dir, resume, world)
    # It raises errors of the configuration, before any file of an earlier attempt is moved.
    trainer = Trainer(config, checkpoint, world, data_may_change=data_may_change)
    is_done = trainer.progress.step >= config.train.steps
    changed: dict[str, tuple[Any, Any]] = {}
    with world.together():
        if world.is_main:
            if resume == "never":
                _move_aside(run_dir, _ATTEMPT_FILES)
            elif resume != "auto" and checkpoint is not None:
                _make_newest(run_dir, checkpoint)
            changed = _record_config(run_dir, config, may_replace=not is_done)
            print(f"kernels: {trainer.kernels}")
            print(f"micro-batch: {describe_micro_batches(config, world.size)}")
            if config.train.compile and not is_done:
                print("train.compile: the first steps compile the network's blocks, and take longer")
            if checkpoint is not None:
                print(f"resuming from {checkpoint} at step {trainer.progress.step}")
        start.begin(trainer.progress.step, config.train.steps, world.size, {} if is_done else changed)
    if not is_done:
        stopped_by = fit(trainer)
        if stopped_by is not None:
            name = signal.Signals(stopped_by).name
            start.end("stopped", trainer.progress.step, name)
            if world.is_main:
                print(f"stopped by {name} after step {trainer.progress.step}; the same command resumes there")
            return 128 + stopped_by
    elif world.is_main:
        print(_nothing_to_do(run_dir, trainer.progress.step, changed))
    with world.together():
        if config.train.weights == "lora" and world.is_main:
            print(f"adapter: {export(run_dir, []).files[0]}")
    start.end("finished", trainer.progress.step)
    return 0


def _record_config(run_dir: Path, config: RunConfig, *, may_replace: bool) -> dict[str, tuple[Any, Any]]:
    """Write `config.yaml`, and return what differs from the one before. That of a run that has all its steps is kept."""
    path = run_dir / "config.yaml"
    changed: dict[str, tuple[Any, Any]] = {}
    if path.is_file():
        with contextlib.suppress(UserError):  # of a version whose keys no longer exist
            changed = changed_keys(to_plain(load_config(path, stored=True)), to_plain(config))
    if may_replace or not path.is_file():
        with written_whole(path, "run.dir", "Make room, and run the same command again") as partial:
            partial.write_text(dump_config(config), encoding="utf-8")
    return changed


def _nothing_to_do(run_dir: Path, step: int, changed: dict[str, tuple[Any, Any]]) -> str:
    """That a run has all its steps, and that settings which differ from those of the run have no effect."""
    message = f"nothing to do: {run_dir} has its {count(step, 'step')}"
    changed = {key: values for key, values in changed.items() if key not in ("train.steps", "run.dir", "data.format")}
    if not changed:
        return message
    lines = "".join(f"\n  {key}: {before} in the run, {now} now" for key, (before, now) in changed.items())
    return (
        f"{message}. Settings that differ have no effect:{lines}\nTo train with them, set another run.dir; to train longer, raise "
        f"train.steps"
    )


@contextlib.contextmanager
def _locked_run_dir(config: RunConfig, world: World) -> Iterator[None]:
    """Rank 0 creates the run's folder and locks it; if this fails, every rank raises the error."""
    run_dir = Path(config.run.dir)
    with contextlib.ExitStack() as stack:
        with world.together():
            if world.is_main:
                make_run_dir(run_dir)
                stack.enter_context(locked(run_dir))
        yield


def describe(config: RunConfig, processes: int = 1, *, by_formula: bool = False) -> str:
    """The dry run: check the configuration for `processes` processes, trace a step at its true size, and compute the cost.

    Args:
        config: the run.
        processes: their number.
        by_formula: without the trace, which takes some ten seconds.
    """
    validation_prompts(config.sample)
    optimizer = optimizer_config(config, processes)
    check_shards(config, processes)
    check_base(config, processes)
    if config.engine.name == "deepspeed":
        deepspeed_config(config.engine, optimizer, processes, config.train.weights)
    family = build_family(config, offline=True)
    reason = "--estimate" if by_formula else why_not_traced(config)
    traced = trace_step(config, world=processes) if reason is None else None
    kernels = _kernels_here(config, family) if traced is None else _kernels_of_trace(config, family, traced)
    page = format_estimate(estimate(config, family, processes, traced), config, kernels)
    return page if reason in (None, "--estimate") else f"{page}\nnot traced, all by formula: {reason}"


def _kernels_here(config: RunConfig, family: ModelFamily) -> str:
    """The kernels on this machine. A dry run also works on a machine that cannot run the configuration."""
    try:
        device = resolve_device(config.run.device)
        kernels = choose_kernels(config, family, device)
    except UserError as error:
        return f"unavailable here: {error}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _CPU
    return f"{kernels}; on {name}"


def _kernels_of_trace(config: RunConfig, family: ModelFamily, traced: Traced) -> str:
    """Those that the trace assumes, and those of this machine if it has a GPU, or cannot run the configuration."""
    here = _kernels_here(config, family)
    return f"{traced.kernels}, in the trace" + f"\n            here: {here}" * (_CPU not in here)


def _find_start(run_dir: Path, resume: str, world: World) -> Path | None:
    """The verified checkpoint to resume from, the same on every rank; it changes no file."""
    if resume == "auto":
        return find_checkpoint(run_dir, world=world)
    if resume == "never":
        return None
    path = Path(resume).expanduser().absolute()
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


def _make_newest(run_dir: Path, start: Path) -> None:
    """Make `start` the newest checkpoint of this run, so that a later start with `auto` resumes from it too."""
    own, step = run_dir / "checkpoints", load_checkpoint(start, verify=False).state["step"]
    newest = checkpoint_path(run_dir, step)
    if start.resolve().parent == own.resolve():
        replaced = [newest.name] if start.name != newest.name else []  # by a copy of it that has another name
        later = [path.name for path in checkpoint_folders(run_dir) if step_of(path) > step]
        _move_aside(own, replaced + later, into=run_dir)
    else:
        _move_aside(run_dir, _ATTEMPT_FILES)
        metrics = start.parents[1] / "metrics.jsonl"
        if metrics.is_file():
            shutil.copy(metrics, run_dir / "metrics.jsonl")
        own.mkdir()
    if start.resolve() != newest.resolve():
        temporary = newest.with_name(f".{newest.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # from a save that was killed
        shutil.copytree(start, temporary, copy_function=link_or_copy)  # the files of a checkpoint never change
        temporary.rename(newest)
    set_latest(newest)


def _move_aside(folder: Path, names: Sequence[str], into: Path | None = None) -> None:
    """Move files of an earlier attempt to `previous-1`, `previous-2`, ...; nothing is deleted."""
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
