"""The figures of an evaluation: their names, and tables of them by step count."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scfm_core.errors import UserError
from scfm_core.wording import count, number

Result = dict[str, dict[str, dict[str, float]]]
"""`evaluation.json`: kind of weights -> step count -> figure -> value."""
FLOOR = "_floor"
"""Ending of the figures of two sets of the teacher's images."""
SINGULAR = (
    "there are no more samples than features, so the covariance is singular: these Frechet distances can be compared with each "
    "other, not with published ones"
)


@dataclass(frozen=True)
class Figure:
    """One figure of a set of images."""

    title: str
    needs: str | None = None
    """The key of `evaluate` without which it is not measured."""
    is_distance: bool = False
    """Positive and spread over decades; a small one is good. The others are shares and scores; a large one is good."""


FIGURES = {
    "fid_teacher": Figure("Fréchet distance to the teacher", is_distance=True),
    "mse_teacher": Figure("MSE to the teacher's images", is_distance=True),
    "cmmd_teacher": Figure("CMMD to the teacher", "cmmd_path"),
    "precision_teacher": Figure("precision against the teacher"),
    "recall_teacher": Figure("recall against the teacher"),
    "diversity": Figure("diversity, relative to the teacher's"),
    "fid_data": Figure("Fréchet distance to the data", is_distance=True),
    "cmmd_data": Figure("CMMD to the data", "cmmd_path"),
    "precision_data": Figure("precision against the data"),
    "recall_data": Figure("recall against the data"),
    "prompt_following": Figure("prompt following"),
    "clip_score": Figure("CLIP score", "clip_path"),
    "pick_score": Figure("PickScore", "pick_score_path"),
}
"""By name in `evaluation.json`, in the order of tables."""
_MORE = {
    "fid_floor": "noise floor: Fréchet distance",
    "cmmd_floor": "noise floor: CMMD",
    "precision_floor": "noise floor: precision",
    "recall_floor": "noise floor: recall",
    "seconds_per_image": "seconds an image",
}
"""Figures that are no metric of a study."""


def title(name: str) -> str:
    """What a figure is called in tables and plots."""
    return FIGURES[name].title if name in FIGURES else _MORE[name]


def needs_teacher(name: str) -> bool:
    """Whether the figure compares with the teacher."""
    return name == "diversity" or name.endswith("_teacher")


def check_metrics(names: Sequence[str], where: str) -> None:
    """UserError unless all are names of figures."""
    for name in names:
        if name not in FIGURES:
            near = difflib.get_close_matches(name, FIGURES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(FIGURES)}"
            raise UserError(f"{where}: {name!r} is not a metric; {hint}")


@contextmanager
def intact(path: Path, advice: str = "Run `scfm evaluate` again, or delete it") -> Iterator[None]:
    """Within `with`, a file of a run is read: a UserError if it is not what `scfm` wrote."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}). {advice}") from error


def read_evaluation(path: Path) -> Result | None:
    """The figures of an `evaluation.json`; None if there is no such file.

    Raises:
        UserError: if it is damaged.
    """
    if not path.is_file():
        return None
    with intact(path):
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        cells = [(n, value) for rows in result.values() for n, row in rows.items() for value in row.values()]
        if not result["student"] or not all(n.isdecimal() and isinstance(value, int | float) for n, value in cells):
            raise ValueError("it is not a table of numbers with a row for the student")
    return result


def step_counts(result: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All step counts, in order."""
    return sorted({steps for rows in result.values() for steps in rows}, key=int)


def figure_rows(result: Result, names: Sequence[str] | None = None) -> Iterator[tuple[str, str, list[str]]]:
    """The lines of a table: name of the figure, kind of weights, and a cell for each of `step_counts`.

    Args:
        result: of an evaluation.
        names: the figures; None: all that were measured.
    """
    columns = step_counts(result)
    for name in [*FIGURES, *_MORE] if names is None else names:
        for kind, rows in result.items():
            values = [rows.get(steps, {}).get(name) for steps in columns]
            if any(value is not None for value in values):
                yield name, kind, ["" if value is None else number(value) for value in values]


def format_evaluation(result: Result) -> str:
    """The result as a table for a terminal."""
    columns = step_counts(result)
    width = 1 + max(8, *(len(cell) for _, _, cells in figure_rows(result) for cell in cells))
    names = max(len(title(name)) for name, _, _ in figure_rows(result)) + 2
    lines, last = ["steps".ljust(names + 9) + "".join(steps.rjust(width) for steps in columns)], None
    for name, kind, cells in figure_rows(result):
        head = "" if name == last else title(name)
        lines.append(head.ljust(names) + kind.ljust(9) + "".join(cell.rjust(width) for cell in cells))
        last = name
    return "\n".join(line.rstrip() for line in lines)


def images_note(row: Mapping[str, float]) -> str:
    """How many images and features a row was measured with."""
    return (
        f"{count(int(row['samples']), 'image')} in each set; {count(int(row['data_samples']), 'image')} of the data; "
        f"{count(int(row['features']), 'feature')} of an image"
    )


def is_singular(samples: int, features: int) -> bool:
    """Whether the covariance of so many samples is singular."""
    return samples <= features
