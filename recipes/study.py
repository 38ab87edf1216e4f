"""`scfm study`: several ways to train one model, several seeds of each, in one table and one plot.

A study is a YAML file: a recipe, settings that all runs share, and arms that differ from it. Each run is an ordinary run in
STUDY_DIR/ARM/seed-K. What is done stays done: the same command goes on, and several at once share the work.
"""

import contextlib
import fcntl
import json
import os
import shlex
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from recipes.evaluate import evaluate
from recipes.plots import quality_plot
from recipes.runs import refuse_other_model
from recipes.train import train
from scfm_core.data.corpus import Corpus
from scfm_core.data.source import json_value
from scfm_core.distributed.world import launched_size
from scfm_core.errors import UserError
from scfm_core.models.families import open_family
from scfm_core.train.assemble import build_family
from scfm_core.train.checkpoint import load_checkpoint, newest_complete
from scfm_core.train.config import RunConfig
from scfm_core.train.parse import find_recipe, load_config, to_plain, with_absolute_paths

_BASE = "undistilled"
_OWN = ("run.seed", "run.dir")
_TITLES = {"fid_teacher": "Fréchet distance to the teacher", "fid_data": "Fréchet distance to the data"}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    about: str
    """What it is, for the table."""
    set: tuple[str, ...] = ()
    """Overrides of the recipe: `section.key=value`."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    recipe: str
    """All runs begin with it."""
    arms: dict[str, Arm]
    """By name."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """`run.seed` of each arm's runs."""
    metric: Literal["fid_teacher", "fid_data"] = "fid_teacher"
    """What the table shows."""
    set: tuple[str, ...] = ()
    """Overrides of all runs."""
    prepare: dict[str, str] = field(default_factory=dict)
    """File that is there once an `scfm` command has been run -> that command."""


@dataclass(frozen=True)
class Run:
    """One arm at one seed."""

    arm: str
    seed: int
    folder: Path
    overrides: list[str]

    @property
    def result(self) -> dict[str, Any] | None:
        """Its evaluation, once it is done."""
        path = self.folder / "evaluation.json"
        return json.loads(path.read_text()) if path.is_file() else None


def load_study(path: str) -> Study:
    """Read a study; a bare name is looked up among the shipped ones.

    Raises:
        UserError: if it is none, or an arm is no valid configuration.
    """
    file = find_recipe(path, "study")
    try:
        study = TypeAdapter(Study).validate_python(yaml.safe_load(file.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [f"  {'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise UserError(f"{file} is not a valid study:\n" + "\n".join(lines)) from None
    if not (study.arms and study.seeds):
        raise UserError(f"{file}: a study needs at least one arm and one seed")
    if len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"{file}: seeds {list(study.seeds)} has one twice, whose runs would be the same")
    if _BASE in study.arms:
        raise UserError(f"{file}: {_BASE!r} is the table's name for the model as it was. Name the arm otherwise")
    for words in (study.set, *(arm.set for arm in study.arms.values())):
        refuse_own_settings(list(words), str(file))
    return study


def refuse_own_settings(overrides: list[str], where: str) -> None:
    """UserError if an override is of what a study sets for each run by itself."""
    if own := [word for word in overrides if word.partition("=")[0] in _OWN]:
        raise UserError(
            f"{where}: {own[0]} has no effect in a study, which sets {', '.join(_OWN)} of each run (`seeds`, --output)"
        )


def runs_of(study: Study, root: Path, overrides: list[str]) -> list[Run]:
    """Every run, all arms of the first seed first."""
    keep = [] if any(word.startswith("evaluate.keep=") for word in study.set) else [f"evaluate.keep={root / 'teacher'}"]
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
    """Run what is missing, and write STUDY_DIR/study.json, study.md and study.png of what is there.

    A run that fails is told, and the others go on.

    Args:
        path: the study's file.
        root: STUDY_DIR, by default runs/study/NAME.
        overrides: of all runs.
        arms: the arms to run; none: all.
        only: the number of one run, counted from 0 as a Slurm array counts; None: all.
        execute: runs an `scfm` command line, for `prepare`.

    Returns:
        the table.

    Raises:
        UserError: if the study or an arm is not valid, a run failed, or what is there was made with other settings.
    """
    if launched_size() > 1:
        raise UserError(
            "a study's runs are of one process each: start scfm study itself several times, without a launcher"
        )
    refuse_own_settings(overrides, "scfm study")
    study, root = load_study(path), (root or Path("runs/study") / Path(path).stem).absolute()
    if unknown := [name for name in arms if name not in study.arms]:
        raise UserError(f"{path} has no arm {', '.join(unknown)}; it has {', '.join(study.arms)}")
    every = runs_of(study, root, overrides)
    if only is not None and not 0 <= only < len(every):
        raise UserError(f"--only must be in 0..{len(every) - 1}: {path} has {len(every)} runs")
    chosen = [run for run in (every if only is None else [every[only]]) if not arms or run.arm in arms]
    for run in every:
        _check(study, run)  # every mistake is found before the first run
    root.mkdir(parents=True, exist_ok=True)
    for product, command in study.prepare.items():
        # Also where the product is there: the command refuses what was made from another model.
        with _claimed(root / ".prepare", wait=True), _alone():
            if execute(shlex.split(command)) or not Path(product).exists():
                raise UserError(f"{path}: what makes {product} failed: scfm {command}")
    failed = _run_missing(study, chosen)
    summary = write_summary(study, every, root)
    if failed:
        raise UserError(f"{len(failed)} runs failed; the same command tries them again:\n  " + "\n  ".join(failed))
    return summary


def _run_missing(study: Study, chosen: list[Run]) -> list[str]:
    """Train and evaluate what is not done and nobody else is at; what failed, and why."""
    failed: list[str] = []
    for number, run in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {run.arm}, seed {run.seed}", flush=True)
        run.folder.mkdir(parents=True, exist_ok=True)
        with _claimed(run.folder / ".study", wait=False) as mine:
            if not mine or run.result is not None:
                continue
            try:
                if code := train(study.recipe, run.overrides):
                    raise SystemExit(code)  # stopped by a signal; the run has said so
                evaluate(run.folder, [])
            except Exception as error:  # out of memory in one arm is no reason to lose the others
                if not isinstance(error, UserError):
                    traceback.print_exc()
                failed.append(f"{run.arm}, seed {run.seed}: {error or type(error).__name__}")
                print(failed[-1], file=sys.stderr, flush=True)
    return failed


def _check(study: Study, run: Run) -> None:
    """The run's settings are valid, give the study's figure, and are those of what is there of it."""
    wanted = load_config(study.recipe, run.overrides)
    if study.metric == "fid_teacher" and wanted.train.weights == "full" and not wanted.method.follows_teacher:
        raise UserError(f"arm {run.arm} has no teacher to be held against: set the study's metric to fid_data")
    how = run.folder / ("config.yaml" if run.result is None else "evaluation.yaml")
    if not how.is_file():
        return
    stored, now = (to_plain(with_absolute_paths(config)) for config in (load_config(how, stored=True), wanted))
    later = () if run.result is not None else ("sample", "evaluate")  # of no weight while it trains
    other = [
        f"{section}.{key}"
        for section in now if section not in later
        for key in now[section] if stored[section][key] != now[section][key]
    ]  # fmt: skip
    if other:
        raise UserError(
            f"{run.folder} was made with other settings ({', '.join(other)}). Delete it, or name another folder with --output"
        )
    newest = newest_complete(run.folder)
    if newest is not None:  # they may be deleted once a run is done
        refuse_other_model(load_checkpoint(newest, verify=False), build_family(wanted), run.folder)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """As one process, though this may be a task of an array: `scfm data` would make its share alone."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("SLURM_ARRAY_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process alone may go on; another `scfm study` may be at it."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def write_summary(study: Study, runs: list[Run], root: Path) -> str:
    """Table and plot of the runs that are done; returns the table."""
    done = [(run, result) for run in runs if (result := run.result) is not None]
    lines: dict[str, dict[int, list[float]]] = {}
    for run, result in done:
        for kind, name in (("base", _BASE), ("student", run.arm)):
            if name == _BASE and name in lines:
                continue  # the same model and noise in every run
            for steps, row in result.get(kind, {}).items():
                lines.setdefault(name, {}).setdefault(int(steps), []).append(row[study.metric])
    if not done:
        return "no run is done yet"
    columns = sorted({steps for rows in lines.values() for steps in rows})
    folders = {run.arm: run.folder for run, _ in done}
    passes = {arm: target_passes(load_config(folder / "config.yaml", stored=True)) for arm, folder in folders.items()}
    title = _TITLES[study.metric]
    table = [
        f"| {title} at steps | " + " | ".join(str(n) for n in columns) + " | seeds | passes for a target |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for name, rows in lines.items():
        cells = [_cell(rows[n]) if n in rows else "" for n in columns]
        seeds = len(next(iter(rows.values())))
        tail = ["", ""] if name == _BASE else [str(seeds), f"{passes[name]:.2f}"]
        table.append("| " + " | ".join([name, *cells, *tail]) + " |")
    legend = [f"- {name}: {study.arms[name].about}" for name in lines if name in study.arms]
    text = "\n".join([*table, "", "Mean ± standard deviation over seeds.", "", *legend]) + "\n"
    teachers = [row for _, result in done for row in result.get("teacher", {}).values()]
    floors = [row["fid_floor"] for row in teachers if "fid_floor" in row and study.metric == "fid_teacher"]
    if floors:
        text += f"\nTwo independent sets of the teacher's samples differ by {floors[0]:.3f}.\n"
    record = {"metric": study.metric, "values": lines, "passes": passes}
    _write(root / "study.md", text.encode())
    _write(root / "study.json", (json.dumps(record, indent=2) + "\n").encode())
    _write(root / "study.png", quality_plot(lines, title, floor=floors[0] if floors else None))
    return text


def _write(path: Path, content: bytes) -> None:
    """Whole, though several processes may end at once."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    aside.replace(path)


def _cell(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3g}" if len(values) == 1 else f"{mean:.3g} ± {statistics.stdev(values):.2g}"


def target_passes(config: RunConfig) -> float:
    """Network passes that a sample's target costs: near and far of a pair; a stored path is shared by all uses of it."""
    method, train = config.method, config.train
    guided = open_family(config.model.path).passes
    _, passes = method.passes(guided)
    if not method.has_stored_paths:
        return passes
    corpus = Corpus(config.data, with_paths=True)
    first = list(corpus.first_items().values())
    stored = sum(
        (end - start) * _steps_of(corpus, start) for start, end in zip(first, [*first[1:], len(corpus)], strict=True)
    )
    return passes + guided * stored / (train.steps * train.global_batch_size)


def _steps_of(corpus: Corpus, item: int) -> int:
    """The teacher's steps along a stored path; where that is not told, one an interval."""
    shard, at, _ = corpus.raw(item)
    with contextlib.suppress(ValueError):  # no JSON
        steps = None if shard is None else json_value(shard.read(at, "json") or b"{}", ["steps"])
        if isinstance(steps, int):
            return steps
    path = corpus.record(item).path
    assert path is not None
    return path["velocities"].shape[0]
