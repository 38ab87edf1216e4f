"""`scfm study`: compare several ways to train a model, over several seeds, in one table and one plot.

A study is a YAML file: a recipe, settings that all runs share, and arms with settings of their own. Each run is an ordinary
run in STUDY_DIR/ARM/seed-K. The same command runs what is missing; several processes of it share the work.
"""

import contextlib
import json
import os
import shlex
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import TypeAdapter, ValidationError

from recipes.evaluate import evaluate
from recipes.figures import FIGURES, FLOOR, check_metrics, needs_teacher, title
from recipes.plots import Panel, quality_plot
from recipes.train import train
from scfm_core.data.corpus import Corpus
from scfm_core.data.source import json_value
from scfm_core.errors import UserError
from scfm_core.files import lock_file
from scfm_core.launched import launched_size
from scfm_core.models.families import open_family
from scfm_core.train.assemble import build_family
from scfm_core.train.checkpoint import load_checkpoint
from scfm_core.train.config import RunConfig
from scfm_core.train.parse import find_recipe, load_config, to_plain, with_absolute_paths
from scfm_core.train.run_dir import newest_complete
from scfm_core.train.runs import check_same_model

_BASE = "undistilled"
_RESERVED = ("run.seed", "run.dir")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    about: str
    """Description, for the legend of the table."""
    set: tuple[str, ...] = ()
    """Overrides of the recipe: `section.key=value`."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The definition of a study."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    recipe: str
    """Recipe of all runs."""
    arms: dict[str, Arm]
    """The arms, by name."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """`run.seed` of each arm's runs."""
    metric: str | tuple[str, ...] = "fid_teacher"
    """Figure of the table, by its name in `evaluation.json`; or several, which have a table each."""
    set: tuple[str, ...] = ()
    """Overrides of the recipe for all runs."""
    prepare: dict[str, str] = field(default_factory=dict)
    """Output file -> the `scfm` command that makes it, which runs before the first run."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The figures of the tables."""
        return (self.metric,) if isinstance(self.metric, str) else self.metric


@dataclass(frozen=True)
class Run:
    """One arm at one seed."""

    arm: str
    seed: int
    folder: Path
    overrides: list[str]

    @property
    def result(self) -> dict[str, Any] | None:
        """Its evaluation; None until it is done."""
        path = self.folder / "evaluation.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def missing(self, metrics: Sequence[str]) -> list[str]:
        """The figures that its evaluation lacks."""
        rows = (self.result or {"student": {"": {}}})["student"].values()
        return [name for name in metrics if any(name not in row for row in rows)]


def load_study(path: str) -> Study:
    """Read a study; a bare name is looked up among the shipped ones.

    Raises:
        UserError: if it is not a valid study.
    """
    file = find_recipe(path, "study")
    try:
        study = TypeAdapter(Study).validate_python(yaml.safe_load(file.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [f"  {'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise UserError(f"{file} is not a valid study:\n" + "\n".join(lines)) from None
    if not (study.arms and study.seeds and study.metrics):
        raise UserError(f"{file}: a study needs at least one arm, one seed and one metric")
    check_metrics(study.metrics, f"{file}: metric")
    if len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"{file}: seeds {list(study.seeds)} contains a seed twice; both runs would be the same")
    if _BASE in study.arms:
        raise UserError(
            f"{file}: {_BASE!r} is the name of the original model in the table. Use another name for the arm"
        )
    for overrides in (study.set, *(arm.set for arm in study.arms.values())):
        check_reserved_settings(list(overrides), str(file))
    return study


def check_reserved_settings(overrides: list[str], where: str) -> None:
    """UserError if an override sets a key that the study sets for each run."""
    if reserved := [override for override in overrides if override.partition("=")[0] in _RESERVED]:
        raise UserError(
            f"{where}: {reserved[0]} has no effect in a study, which sets {', '.join(_RESERVED)} of each run (`seeds`, --output)"
        )


def runs_of(study: Study, root: Path, overrides: list[str]) -> list[Run]:
    """All runs, ordered by seed and then by arm."""
    has_keep = any(override.startswith("evaluate.keep=") for override in study.set)
    keep = [] if has_keep else [f"evaluate.keep={root / 'teacher'}"]
    return [
        Run(name, seed, folder, [
            *study.set, *keep, *arm.set, *overrides, f"run.seed={seed}", f"run.dir={folder}"
        ])
        for seed in study.seeds for name, arm in study.arms.items() for folder in [root / name / f"seed-{seed}"]
    ]  # fmt: skip


def run_study(
    path: str,
    root: Path | None,
    overrides: list[str],
    *,
    arms: list[str],
    only: int | None,
    execute: Callable[[list[str]], int],
) -> str:
    """Run what is missing, and write STUDY_DIR/study.json, study.md and study.png for the runs that are done.

    If a run fails, it is reported, and the other runs continue.

    Args:
        path: the study's file.
        root: STUDY_DIR; None: runs/study/NAME.
        overrides: overrides of all runs.
        arms: the arms to run; if empty, all.
        only: the number of one run, counted from 0, as in a Slurm array; None: all.
        execute: runs an `scfm` command line, for `prepare`.

    Returns:
        the table.

    Raises:
        UserError: if the study or an arm is invalid, a run failed, or existing runs have other settings.
    """
    if launched_size() > 1:
        raise UserError("each run of a study has one process: start scfm study several times, without a launcher")
    check_reserved_settings(overrides, "scfm study")
    study, root = load_study(path), (root or Path("runs/study") / Path(path).stem).absolute()
    if unknown := [name for name in arms if name not in study.arms]:
        raise UserError(f"{path} has no arm {', '.join(unknown)}; it has {', '.join(study.arms)}")
    all_runs = runs_of(study, root, overrides)
    if only is not None and not 0 <= only < len(all_runs):
        raise UserError(f"--only must be in 0..{len(all_runs) - 1}: {path} has {len(all_runs)} runs")
    chosen = [run for run in (all_runs if only is None else [all_runs[only]]) if not arms or run.arm in arms]
    for run in all_runs:
        _check_run(study, run)  # find all mistakes before the first run
    root.mkdir(parents=True, exist_ok=True)
    for output, command in study.prepare.items():
        # Also if the output exists: the command raises an error if it was made from another model.
        with _locked(root / ".prepare", wait=True), _outside_array():
            if execute(shlex.split(command)) or not Path(output).exists():
                raise UserError(f"{path}: the command that makes {output} failed: scfm {command}")
    failed = _run_missing(study, chosen)
    summary = write_summary(study, all_runs, root)
    if failed:
        raise UserError(f"{len(failed)} runs failed; the same command tries them again:\n  " + "\n  ".join(failed))
    return summary


def _run_missing(study: Study, chosen: list[Run]) -> list[str]:
    """Train and evaluate the runs that are not done and that no other process runs; returns the failures."""
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
                # An evaluated run is trained, and may have no checkpoint.
                if run.result is None and (code := train(study.recipe, run.overrides)):
                    raise SystemExit(code)  # stopped by a signal, which the run has printed
                evaluate(run.folder, [])
                if missing := run.missing(study.metrics):
                    raise UserError(
                        f"its evaluation has no {', '.join(missing)}: there are too few images or prompts for it, or evaluate.features cannot measure it"
                    )
            except Exception as error:  # e.g. out of memory in one arm: continue with the others
                if not isinstance(error, UserError):
                    traceback.print_exc()
                failed.append(f"{run.arm}, seed {run.seed}: {error or type(error).__name__}")
                print(failed[-1], file=sys.stderr, flush=True)
    return failed


def _check_run(study: Study, run: Run) -> None:
    """Check that the run's settings are valid, give the study's metric, and match an existing run in its folder."""
    wanted = load_config(study.recipe, run.overrides, place=f"in the settings of arm {run.arm}")
    has_teacher = wanted.train.weights != "full" or wanted.method.follows_teacher
    for name in study.metrics:
        if needs_teacher(name) and not has_teacher:
            raise UserError(
                f"arm {run.arm} has no teacher to compare with: set the study's metric to fid_data, not {name}"
            )
        needs = FIGURES[name].needs
        if needs is not None and getattr(wanted.evaluate, needs) is None:
            raise UserError(f"the study's metric {name} needs evaluate.{needs}; arm {run.arm} has none")
    how = run.folder / ("config.yaml" if run.result is None else "evaluation.yaml")
    if not how.is_file():
        return
    stored, now = (to_plain(with_absolute_paths(config)) for config in (load_config(how, stored=True), wanted))
    ignored = () if run.result is not None else ("sample", "evaluate")  # they do not affect training
    other = [
        f"{section}.{key}"
        for section in now if section not in ignored
        for key in now[section] if stored[section][key] != now[section][key]
    ]  # fmt: skip
    if other:
        raise UserError(
            f"{run.folder} was made with other settings ({', '.join(other)}). Delete it, or choose another folder with --output"
        )
    newest = newest_complete(run.folder)
    if newest is not None:  # a finished run may have none: they may be deleted
        check_same_model(load_checkpoint(newest, verify=False), build_family(wanted), run.folder)


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


def write_summary(study: Study, runs: list[Run], root: Path) -> str:
    """Write tables and plot of the runs that are done; returns the tables."""
    done = [(run, result) for run in runs if (result := run.result) is not None]
    if not done:
        return "no run is done yet"
    values = {metric: _values(metric, done) for metric in study.metrics}
    folders = {run.arm: run.folder for run, _ in done}
    passes = {arm: target_passes(load_config(folder / "config.yaml", stored=True)) for arm, folder in folders.items()}
    floors = {metric: _floor(metric, done) for metric in study.metrics}
    tables = [_table(metric, lines, passes) for metric, lines in values.items() if lines]
    legend = [f"- {name}: {arm.about}" for name, arm in study.arms.items() if name in folders]
    text = "\n\n".join([*tables, "Mean ± standard deviation over seeds.", "\n".join(legend)]) + "\n"
    for metric, floor in floors.items():
        if floor is not None:
            text += f"\nTwo independent sets of the teacher's samples: {title(metric)} {floor:.3f}.\n"
    record = {"metric": study.metrics, "values": values, "passes": passes}
    panels = [
        Panel(title(metric), lines, floors[metric], FIGURES[metric].is_distance)
        for metric, lines in values.items()
        if lines
    ]
    _write(root / "study.md", text.encode())
    _write(root / "study.json", (json.dumps(record, indent=2) + "\n").encode())
    _write(root / "study.png", quality_plot(panels))
    return text


def _values(metric: str, done: list[tuple[Run, dict[str, Any]]]) -> dict[str, dict[int, list[float]]]:
    """Arm -> step count -> a value for each seed. The base is the same in every run."""
    lines: dict[str, dict[int, list[float]]] = {}
    for run, result in done:
        for kind, name in (("base", _BASE), ("student", run.arm)):
            if name == _BASE and name in lines:
                continue
            for steps, row in result.get(kind, {}).items():
                if metric in row:
                    lines.setdefault(name, {}).setdefault(int(steps), []).append(row[metric])
    return lines


def _floor(metric: str, done: list[tuple[Run, dict[str, Any]]]) -> float | None:
    """The metric of two independent sets of the teacher's images, if it was measured."""
    if not metric.endswith("_teacher"):
        return None
    name = metric.removesuffix("_teacher") + FLOOR
    rows = (row for _, result in done for row in result.get("teacher", {}).values())
    return next((row[name] for row in rows if name in row), None)


def _table(metric: str, lines: dict[str, dict[int, list[float]]], passes: dict[str, float]) -> str:
    columns = sorted({steps for rows in lines.values() for steps in rows})
    table = [
        f"| {title(metric)} at steps | " + " | ".join(str(n) for n in columns) + " | seeds | passes for a target |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for name, rows in lines.items():
        cells = [_cell(rows[n]) if n in rows else "" for n in columns]
        seeds = len(next(iter(rows.values())))
        tail = ["", ""] if name == _BASE else [str(seeds), f"{passes[name]:.2f}"]
        table.append("| " + " | ".join([name, *cells, *tail]) + " |")
    return "\n".join(table)


def _write(path: Path, content: bytes) -> None:
    """Write atomically: several processes may write the same file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _cell(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3g}" if len(values) == 1 else f"{mean:.3g} ± {statistics.stdev(values):.2g}"


def target_passes(config: RunConfig) -> float:
    """Network passes for a sample's target, and those of the fake score; the passes for a stored path are divided by the number of its uses."""
    method, train = config.method, config.train
    guided = open_family(config.model.path).passes
    _, passes = method.passes(guided)
    passes += method.matching_fraction  # the fake score's own, which has a gradient too
    if not method.has_stored_paths:
        return passes
    corpus = Corpus(config.data, with_paths=True)
    first = list(corpus.first_items().values())
    stored = sum(
        (end - start) * _steps_of(corpus, start) for start, end in zip(first, [*first[1:], len(corpus)], strict=True)
    )
    return passes + guided * stored / (train.steps * train.global_batch_size)


def _steps_of(corpus: Corpus, item: int) -> int:
    """The teacher's steps along a stored path; if unknown, one for each interval."""
    shard, at, _ = corpus.raw(item)
    with contextlib.suppress(ValueError):  # invalid JSON
        steps = None if shard is None else json_value(shard.read(at, "json") or b"{}", ["steps"])
        if isinstance(steps, int):
            return steps
    path = corpus.record(item).path
    assert path is not None
    return path["velocities"].shape[0]
