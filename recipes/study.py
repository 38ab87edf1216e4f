"""`scfm study`: compare several ways to train a model, over several seeds, in one table and one plot.

Each run is an ordinary run in STUDY_DIR/ARM/seed-K. The same command runs what is missing; several processes of it share the work.
"""

import contextlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recipes.evaluate import evaluate
from recipes.figures import needs_teacher
from recipes.measurable import check_ready, check_settings
from recipes.study_cost import equal_steps
from recipes.study_file import Run, Study, check_reserved_settings, load_study, runs_of
from recipes.study_origin import write_origin
from recipes.study_tables import write_summary
from recipes.train import train
from scfm_core.errors import UserError
from scfm_core.files import lock_file
from scfm_core.launched import launched_size
from scfm_core.train.assemble import build_family
from scfm_core.train.checkpoint import load_checkpoint
from scfm_core.train.config import RunConfig
from scfm_core.train.device import resolve_device
from scfm_core.train.parse import load_config, to_plain, with_absolute_paths
from scfm_core.train.run_dir import newest_complete
from scfm_core.train.runs import check_same_model

_MEASURED = ("sample.", "evaluate.")
"""Sections of settings that change an evaluation, but no training."""


def run_study(
    path: str,
    root: Path | None,
    overrides: list[str],
    *,
    arms: list[str],
    only: int | None,
    execute: Callable[[list[str]], int],
    equal_passes: str | None = None,
) -> str:
    """Run what is missing, and write STUDY_DIR/study.json, study.md and study.png for the runs that are done.

    If a run fails, it is reported, and the other runs continue.

    Args:
        path: the study's file.
        root: STUDY_DIR; None: runs/study/NAME, with `_equal_passes` if `equal_passes` is given.
        overrides: overrides of all runs.
        arms: the arms to run, and those from which they start; if empty, all.
        only: the number of one run, counted from 0, as in a Slurm array; None: all.
        execute: runs an `scfm` command line, for `prepare`.
        equal_passes: arm whose passes the others get (`load_study`).

    Returns:
        the table.

    Raises:
        UserError: if the study or an arm is invalid, a run failed, or existing runs have other settings.
    """
    if launched_size() > 1:
        raise UserError("each run of a study has one process: start scfm study several times, without a launcher")
    check_reserved_settings(overrides, "scfm study")
    study = load_study(path, equal_passes)
    root = (root or Path("runs/study") / f"{Path(path).stem}{'_equal_passes' * (equal_passes is not None)}").absolute()
    if unknown := [name for name in arms if name not in study.arms]:
        raise UserError(f"{path} has no arm {', '.join(unknown)}; it has {', '.join(study.arms)}")
    runs = runs_of(study, root, overrides)
    if only is not None and not 0 <= only < len(runs):
        raise UserError(f"--only must be in 0..{len(runs) - 1}: {path} has {len(runs)} runs")
    chosen = _chosen(runs, arms, only)
    configs = [  # all mistakes before the first run
        _check_run(study, run, steps_known=study.arms[run.arm].equal_passes is None) for run in chosen
    ]
    against = [name for name in study.metrics if name.endswith("_data")]
    _check_data(against, [*zip(chosen, configs, strict=True), *_done(runs, chosen, against)])
    _check_first(study, path)
    _prepare(study, path, root, execute)
    # It may count stored paths, which `prepare` makes.
    steps = equal_steps(study, runs[: len(study.arms)], {run.arm for run in chosen})
    runs = runs_of(study, root, overrides, steps)
    chosen = _chosen(runs, arms, only)
    for run in chosen if steps else []:
        _check_run(study, run)
    failed = _run_missing(study, runs, chosen)
    command = ["scfm", "study", path, *(["--equal-passes", equal_passes] if equal_passes else []), *overrides]
    summary = write_summary(study, runs, root, shlex.join(command))
    if failed:
        raise UserError(f"{len(failed)} runs failed; the same command tries them again:\n  " + "\n  ".join(failed))
    return summary


def _check_first(study: Study, path: str) -> None:
    """UserError if something is missing that a person makes before the study."""
    for needed, command in study.first.items():
        if not Path(needed).exists():
            raise UserError(
                f"the study {path} needs {Path(needed).absolute()}, which does not exist. First run: {command}"
            )


def _chosen(runs: Sequence[Run], arms: list[str], only: int | None) -> list[Run]:
    """The runs that were asked for and those from which they start, which come first.

    Raises:
        UserError: if the one run is of another arm.
    """
    asked = [run for run in runs if not arms or run.arm in arms]
    if only is not None:
        if runs[only] not in asked:
            numbers = ", ".join(str(runs.index(run)) for run in asked)
            raise UserError(
                f"--only {only} is a run of {runs[only].arm}, which is not in --arms. The runs of these arms: {numbers}"
            )
        asked = [runs[only]]
    needed = {stage.folder: stage for run in asked for stage in run.stages}
    return sorted(needed.values(), key=lambda run: len(run.stages))


def _prepare(study: Study, path: str, root: Path, execute: Callable[[list[str]], int]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for output, command in study.prepare.items():
        # Also if the output exists: the command raises an error if it was made from another model.
        with _locked(root / ".prepare", wait=True), _outside_array():
            code = execute(shlex.split(command))
            if code > 128:
                raise SystemExit(code)  # stopped by a signal, which the command has said
            if code or not Path(output).exists():
                raise UserError(f"{path}: the command that makes {output} failed: scfm {command}")


def _run_missing(study: Study, runs: list[Run], chosen: list[Run]) -> list[str]:
    """Train and evaluate those of the chosen `runs` that are not done and that no other process runs; returns the failures."""
    failed: list[str] = []
    for number, run in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {run.arm}, seed {run.seed}", flush=True)
        run.folder.mkdir(parents=True, exist_ok=True)
        with _locked(run.folder / ".study", wait=False) as is_locked:
            if not is_locked:
                print("another process works on this run", flush=True)
            if not is_locked or not run.missing(study.metrics):
                continue
            try:
                _make(study, run, has_base=any(other.has_base(study.metrics) for other in runs))
            except Exception as error:  # e.g. out of memory in one arm: continue with the others
                if not isinstance(error, UserError):
                    traceback.print_exc()
                failed.append(f"{run.arm}, seed {run.seed}: {error or type(error).__name__}")
                print(failed[-1], file=sys.stderr, flush=True)
    return failed


def _make(study: Study, run: Run, *, has_base: bool) -> None:
    """Train a run, unless an earlier evaluation says that this is done, and measure the study's figures.

    `has_base`: another run has those of the undistilled model, which are the same for all."""
    config = load_config(study.recipe, run.overrides)
    check_ready(study.metrics, config)
    device = resolve_device(config.run.device)
    if run.result is None:  # an evaluated run is trained, and may have no checkpoint
        if run.start is not None:
            _wait_for(run.start)
        if code := train(study.recipe, run.overrides):
            raise SystemExit(code)  # stopped by a signal, which the run has printed
        write_origin(run.folder, "trained", device)
    evaluate(run.folder, _changes_of_evaluation(run, config), student_alone=has_base)
    write_origin(run.folder, "evaluated", device)
    if missing := run.missing(study.metrics):
        raise UserError(
            f"its evaluation has no {', '.join(missing)}: there are too few images or prompts for it, or evaluate.features cannot measure it"
        )


def _wait_for(start: Run) -> None:
    """Wait while another process works on the run from which one starts.

    Raises:
        UserError: if that run failed.
    """
    with _locked(start.folder / ".study", wait=True):
        if start.result is None:
            raise UserError(f"it starts from {start.arm}, seed {start.seed}, which is not done")


def _changes_of_evaluation(run: Run, config: RunConfig) -> list[str]:
    """Overrides that give a run, which may be trained long ago, the study's present settings of the evaluation."""
    stored, now = _plain(load_config(run.folder / "config.yaml", stored=True)), _plain(config)
    return [f"{key}={json.dumps(_value(now, key))}" for key in _differences(stored, now) if key.startswith(_MEASURED)]


def _plain(config: RunConfig) -> dict[str, Any]:
    return to_plain(with_absolute_paths(config))


def _value(tree: dict[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return tree[section][name]


def _differences(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`section.key` of the settings that differ."""
    keys = (f"{section}.{key}" for section in now for key in now[section])
    return [key for key in keys if _value(stored, key) != _value(now, key)]


def _done(runs: Sequence[Run], chosen: Sequence[Run], figures: Sequence[str]) -> Iterator[tuple[Run, RunConfig]]:
    """The other runs with some of these figures, and the settings with which they were measured."""
    for run in runs:
        how = run.folder / "evaluation.yaml"
        if run not in chosen and how.is_file() and len(run.missing(figures)) < len(figures):
            yield run, load_config(how, stored=True)


def _check_data(against: Sequence[str], runs: Sequence[tuple[Run, RunConfig]]) -> None:
    """UserError if figures against the data would be against other data for some arms."""
    if not against:
        return
    (one, settings), *others = runs
    for other, theirs in others:
        if _data(with_absolute_paths(settings)) != _data(with_absolute_paths(theirs)):
            raise UserError(
                f"{against[0]} would compare {one.arm} with {_data(settings)}, and {other.arm} with {_data(theirs)}. Give all arms the same "
                f"data: evaluate.data=FOLDER in `set` of the study"
            )


def _data(config: RunConfig) -> str:
    """What figures against the data compare with."""
    return config.evaluate.data or ", ".join(source.uri for source in config.data.mixture())


def _check_run(study: Study, run: Run, *, steps_known: bool = True) -> RunConfig:
    """Check that the run's settings are valid, give the study's figures, and match an existing run in its folder; returns them."""
    wanted = load_config(study.recipe, run.overrides, place=f"in the settings of arm {run.arm}")
    has_teacher = wanted.train.weights != "full" or wanted.method.follows_teacher
    for name in study.metrics:
        if needs_teacher(name) and not has_teacher:
            raise UserError(
                f"arm {run.arm} has no teacher to compare with: set the study's metric to fid_data, not {name}"
            )
    check_settings(study.metrics, wanted.evaluate, f"arm {run.arm}")
    missing = run.missing(study.metrics)
    how = run.folder / ("config.yaml" if run.result is None else "evaluation.yaml")
    if not how.is_file():
        return wanted
    # An evaluation that lacks a figure is made again, with the settings of now.
    free = (*(_MEASURED if missing else ()), *(() if steps_known else ("train.steps",)))
    other = _differences(_plain(load_config(how, stored=True)), _plain(wanted))
    newest = newest_complete(run.folder)
    if other := [key for key in other if not key.startswith(free)]:
        is_trained = newest is not None and all(key.startswith(_MEASURED) for key in other)
        advice = (
            f"Delete {run.folder / 'evaluation.json'} to measure it again, without training it"
            if is_trained
            else "Delete it"
        )
        raise UserError(
            f"{run.folder} was made with other settings ({', '.join(other)}). {advice}, or choose another folder with --output"
        )
    if newest is not None:  # a finished run may have none: they may be deleted
        check_same_model(load_checkpoint(newest, verify=False), build_family(wanted), run.folder)
    elif missing and run.result is not None:
        raise UserError(
            f"{run.folder} has no {', '.join(missing)}, and no checkpoint any more to measure it. Delete the folder to train the run again, "
            f"or leave these figures out"
        )
    return wanted


@contextlib.contextmanager
def _outside_array() -> Iterator[None]:
    """Hide the variables of a Slurm array: as a task of an array `scfm data` would only make its part of the shards."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("SLURM_ARRAY_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a file; yields False if another process has the lock and `wait` is False."""
    with path.open("w", encoding="utf-8") as lock:
        os.register_at_fork(after_in_child=lock.close)  # a data worker runs some seconds longer than a killed process
        yield lock_file(lock, wait=wait) is not False
