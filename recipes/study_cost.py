"""What the arms of a study cost: updates, and passes of the network.

One convention counts all arms. A pass is one forward pass of the network for one sample. A backward pass counts as two (it has two
matrix products for each of the forward pass), so the student's forward and backward are three. A pass for a target or along a stored
path is one; stored paths are counted once, however often a run uses them. Two-pass guidance takes both passes, one of them backward.
"""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from recipes.study_file import Run, Study
from scfm_core.data.corpus import Corpus
from scfm_core.data.source import json_value
from scfm_core.errors import UserError
from scfm_core.models.families import open_family
from scfm_core.train.config import RunConfig
from scfm_core.train.parse import load_config

BACKWARD = 2
"""Passes that a backward pass counts as."""


@dataclass(frozen=True)
class Cost:
    """The cost of one run, or of the runs of several stages."""

    updates: int
    """Optimizer steps."""
    samples: int
    """Samples of all updates."""
    for_targets: float
    """Passes for targets and stored paths."""
    passes: float
    """All passes."""

    @property
    def for_target(self) -> float:
        """Passes for the target of one sample."""
        return self.for_targets / self.samples

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.updates + other.updates,
            self.samples + other.samples,
            self.for_targets + other.for_targets,
            self.passes + other.passes,
        )


def cost(config: RunConfig) -> Cost:
    """The cost of one run, without a run from which it starts.

    Raises:
        UserError: if its stored paths cannot be read.
    """
    student, target = _passes_of_a_sample(config)
    samples = config.train.steps * config.train.global_batch_size
    for_targets = target * samples + _stored_passes(config)
    return Cost(config.train.steps, samples, for_targets, student * samples + for_targets)


def cost_of_stages(study: Study, run: Run) -> Cost:
    """The cost of a run and of those from which it starts: by the settings with which they were made, else by those of the study."""

    def config(stage: Run) -> RunConfig:
        path = stage.folder / "config.yaml"
        return load_config(path, stored=True) if path.is_file() else load_config(study.recipe, stage.overrides)

    *earlier, last = (cost(config(stage)) for stage in run.stages)
    return sum(earlier, start=last)


def equal_steps(study: Study, runs: Sequence[Run], arms: Collection[str]) -> dict[str, int]:
    """`train.steps` of the arms with `equal_passes`, to the nearest update.

    Args:
        study: the definition.
        runs: of one seed, without the steps that are wanted.
        arms: those whose steps are wanted, with the arms from which they start.

    Raises:
        UserError: if an arm would have no update, or if stored paths cannot be read.
    """
    by_arm: Mapping[str, Run] = {run.arm: run for run in runs}
    steps: dict[str, int] = {}
    for name in sorted(arms, key=lambda arm: len(study.chain(arm))):  # a start before what starts from it
        reference = study.arms[name].equal_passes
        if reference is None:
            continue
        config = load_config(study.recipe, by_arm[name].overrides)
        spent = 0.0
        for stage in study.chain(name)[1:]:
            own = [f"train.steps={steps[stage]}"] if stage in steps else []
            spent += cost(load_config(study.recipe, [*by_arm[stage].overrides, *own])).passes
        left = cost_of_stages(study, by_arm[reference]).passes - spent - _stored_passes(config)
        steps[name] = round(left / config.train.global_batch_size / sum(_passes_of_a_sample(config)))
        if steps[name] < 1:
            raise UserError(
                f"arm {name} has no pass left for an update: its stored paths and the arms from which it starts take all passes of "
                f"{reference}. Name another arm in equal_passes, or make fewer paths"
            )
    return steps


def _passes_of_a_sample(config: RunConfig) -> tuple[float, float]:
    """The passes of student and fake score, forward and backward, and those for a target without the passes of stored paths."""
    student, target = config.method.passes(open_family(config.model.path).passes)
    fake = config.method.matching_fraction * (1 + BACKWARD)
    return student + BACKWARD + fake, target


def _stored_passes(config: RunConfig) -> float:
    """Passes for all stored paths of the run's data; 0 if it uses none."""
    if not config.method.has_stored_paths:
        return 0.0
    corpus = Corpus(config.data, with_paths=True)
    first = list(corpus.first_items().values())
    steps = sum(
        (end - start) * _steps_of(corpus, start) for start, end in zip(first, [*first[1:], len(corpus)], strict=True)
    )
    return float(open_family(config.model.path).passes * steps)


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
