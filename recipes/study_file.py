"""The definition of a study: a YAML file with a recipe, settings that all runs share, and arms with settings of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import yaml
from pydantic import TypeAdapter, ValidationError

from recipes.figures import Result, check_metrics, read_evaluation
from scfm_core.errors import UserError
from scfm_core.train.parse import find_recipe

BASE = "undistilled"
"""The original model in the tables."""
_RESERVED = ("run.seed", "run.dir")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    about: str
    """Description, for the legend of the table."""
    set: tuple[str, ...] = ()
    """Overrides of the recipe: `section.key=value`."""
    start: str | None = None
    """Arm from whose run of the same seed each run starts (`lora.start`). Its updates and passes count as this arm's too."""
    equal_passes: str | None = None
    """Arm whose passes of the network this arm gets: `train.steps` is computed from them (`recipes/study_cost.py`)."""


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
    first: dict[str, str] = field(default_factory=dict)
    """File or folder -> the command that a person runs once to make it."""
    prepare: dict[str, str] = field(default_factory=dict)
    """Output file -> the `scfm` command that makes it, which runs before the first run."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The figures of the tables."""
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    def chain(self, arm: str) -> list[str]:
        """The arm, the one from which it starts, the one from which that starts, and so on."""
        chain = [arm]
        while (start := self.arms[chain[-1]].start) is not None:
            chain.append(start)
        return chain


@dataclass(frozen=True)
class Run:
    """One arm at one seed."""

    arm: str
    seed: int
    folder: Path
    overrides: list[str]
    start: "Run | None" = None
    """The run from which it starts."""

    @property
    def stages(self) -> list["Run"]:
        """The runs that lead to this one, in the order of training, and itself."""
        return [*(self.start.stages if self.start else []), self]

    @property
    def result(self) -> Result | None:
        """Its evaluation; None until it is done. UserError if it is damaged."""
        return read_evaluation(self.folder / "evaluation.json")

    def missing(self, metrics: Sequence[str]) -> list[str]:
        """The figures that its evaluation lacks."""
        rows = (self.result or {"student": {"": {}}})["student"].values()
        return [name for name in metrics if any(name not in row for row in rows)]

    def has_base(self, metrics: Sequence[str]) -> bool:
        """Whether its evaluation has these figures of the undistilled model."""
        rows = (self.result or {}).get("base", {}).values()
        return bool(rows) and all(name in row for name in metrics for row in rows)


def load_study(path: str, equal_passes: str | None = None) -> Study:
    """Read a study; a bare name is looked up among the shipped ones.

    Args:
        path: the file or the name.
        equal_passes: as the setting of an arm, for all arms but this one, those that lead to it, and those from which others start.

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
    if BASE in study.arms:
        raise UserError(
            f"{file}: {BASE!r} is the name of the original model in the table. Use another name for the arm"
        )
    for overrides in (study.set, *(arm.set for arm in study.arms.values())):
        check_reserved_settings(list(overrides), str(file))
    _check_starts(study, str(file))
    for name, arm in study.arms.items():
        for key, setting in (("start", "lora.start"), ("equal_passes", "train.steps")):
            if getattr(arm, key) is not None and any(override.startswith(f"{setting}=") for override in arm.set):
                raise UserError(f"{file}: arm {name} has {key}, which sets {setting}. Remove one of them")
    if equal_passes is not None:
        study = _with_equal_passes(study, equal_passes, str(file))
    _check_equal_passes(study, str(file))
    return study


def check_reserved_settings(overrides: list[str], where: str) -> None:
    """UserError if an override sets a key that the study sets for each run."""
    if reserved := [override for override in overrides if override.partition("=")[0] in _RESERVED]:
        raise UserError(
            f"{where}: {reserved[0]} has no effect in a study, which sets {', '.join(_RESERVED)} of each run (`seeds`, --output)"
        )


def _check_starts(study: Study, where: str) -> None:
    """UserError if an arm starts from an arm that does not exist, or from itself in the end."""
    for name, arm in study.arms.items():
        if arm.start is not None:
            _check_name(study, arm.start, f"{where}: arms.{name}.start")
    for name in study.arms:
        chain, at = [name], study.arms[name].start
        while at is not None:
            chain.append(at)
            if at == name:
                raise UserError(
                    f"{where}: a circle of starts: {' starts from '.join(chain)}. One arm must have no `start`"
                )
            if at in chain[:-1]:  # a circle that this arm is not in, but leads to
                break
            at = study.arms[at].start


def _with_equal_passes(study: Study, reference: str, where: str) -> Study:
    _check_name(study, reference, f"{where}: --equal-passes")
    fixed = {*study.chain(reference), *(arm.start for arm in study.arms.values())}
    arms = {name: replace(arm, equal_passes=None if name in fixed else reference) for name, arm in study.arms.items()}
    return replace(study, arms=arms)


def _check_equal_passes(study: Study, where: str) -> None:
    for name, arm in study.arms.items():
        if arm.equal_passes is None:
            continue
        _check_name(study, arm.equal_passes, f"{where}: arms.{name}.equal_passes")
        if open_ends := [each for each in study.chain(arm.equal_passes) if study.arms[each].equal_passes is not None]:
            raise UserError(
                f"{where}: arm {name} is to have the passes of {arm.equal_passes}, but those of {open_ends[0]} are computed too. Name an "
                f"arm whose train.steps is given"
            )


def _check_name(study: Study, name: str, where: str) -> None:
    if name not in study.arms:
        raise UserError(f"{where}: there is no arm {name!r}; the arms are {', '.join(study.arms)}")


def runs_of(study: Study, root: Path, overrides: list[str], steps: Mapping[str, int] | None = None) -> list[Run]:
    """All runs, ordered by seed and then by arm.

    Args:
        study: the definition.
        root: STUDY_DIR.
        overrides: of all runs.
        steps: `train.steps` of the arms with equal passes, where they are known.
    """
    has_keep = any(override.startswith("evaluate.keep=") for override in study.set)
    keep = [] if has_keep else [f"evaluate.keep={root / 'teacher'}"]
    runs: dict[tuple[int, str], Run] = {}

    def add(seed: int, name: str) -> Run:
        if (seed, name) in runs:
            return runs[seed, name]
        arm, folder = study.arms[name], root / name / f"seed-{seed}"
        start = None if arm.start is None else add(seed, arm.start)
        own = [f"train.steps={steps[name]}"] if steps and name in steps else []
        own += [] if start is None else [f"lora.start={start.folder}"]
        words = [*study.set, *keep, *arm.set, *overrides, *own, f"run.seed={seed}", f"run.dir={folder}"]
        runs[seed, name] = Run(name, seed, folder, words, start)
        return runs[seed, name]

    return [add(seed, name) for seed in study.seeds for name in study.arms]
