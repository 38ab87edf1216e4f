"""Tables and plot of a study, from the runs that are done."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.figures import FIGURES, FLOOR, title
from recipes.plots import Panel, quality_plot
from recipes.study_cost import BACKWARD, Cost, cost_of_stages
from recipes.study_file import BASE, Run, Study
from recipes.study_origin import read_origins
from scfm_core.files import renamed_at_end

NOTE = (
    "Mean ± standard deviation over seeds. Updates and passes are those of the training, with the arms from which an arm starts. A pass "
    f"is a forward pass for one sample; a backward pass counts as {BACKWARD}, and passes for stored paths count once."
)


def write_summary(study: Study, runs: Sequence[Run], root: Path, command: str) -> str:
    """Write STUDY_DIR/study.json, study.md and study.png for the runs that are done; returns the tables.

    Args:
        study: the definition.
        runs: all runs.
        root: STUDY_DIR.
        command: how the study was started, for `study.json`.
    """
    done = [(run, result) for run in runs if (result := run.result) is not None]
    if not done:
        return "no run is done yet"
    record = _record(study, done, command)
    text = markdown(record)
    panels = [
        Panel(title(metric), _by_steps(lines), record["floors"].get(metric), FIGURES[metric].is_distance)
        for metric, lines in record["values"].items()
        if lines
    ]
    _write(root / "study.md", text.encode())
    _write(root / "study.json", (json.dumps(record, indent=2) + "\n").encode())
    _write(root / "study.png", quality_plot(panels))
    return text


def _record(study: Study, done: list[tuple[Run, dict[str, Any]]], command: str) -> dict[str, Any]:
    """`study.json`: everything that the tables say."""
    first = {run.arm: run for run, _ in reversed(done)}
    costs: dict[str, Cost] = {arm: cost_of_stages(study, run) for arm, run in first.items()}
    floors = {metric: _floor(metric, done) for metric in study.metrics}
    return {
        "metric": study.metrics,
        "values": {metric: _values(metric, done) for metric in study.metrics},
        "floors": {metric: floor for metric, floor in floors.items() if floor is not None},
        "arms": {name: _about(study, name) for name in study.arms if name in first},
        "updates": {arm: found.updates for arm, found in costs.items()},
        "passes_for_target": {arm: found.for_target for arm, found in costs.items()},
        "passes": {arm: found.passes for arm, found in costs.items()},
        "command": command,
        "origins": read_origins([run.folder for run, _ in done]),
    }


def _about(study: Study, name: str) -> str:
    arm = study.arms[name]
    start = f"; starts from {arm.start}" if arm.start else ""
    return arm.about + start + (f"; as many passes as {arm.equal_passes}" if arm.equal_passes else "")


def markdown(record: Mapping[str, Any]) -> str:
    """The tables of a `study.json`, with their legend."""
    measured = [metric for metric, lines in record["values"].items() if lines]
    tables = [_table(record, metric, with_cost=metric == measured[0]) for metric in measured]
    legend = [f"- `{name}`: {about}" for name, about in record["arms"].items()]
    text = "\n\n".join([*tables, NOTE, "\n".join(legend)]) + "\n"
    for metric, floor in record["floors"].items():
        text += f"\nTwo independent sets of the teacher's samples: {title(metric)} {floor:.3f}.\n"
    return text


def _table(record: Mapping[str, Any], metric: str, *, with_cost: bool) -> str:
    lines = {name: _by_steps({name: rows})[name] for name, rows in record["values"][metric].items()}
    columns = sorted({steps for rows in lines.values() for steps in rows})
    heads = [*map(str, columns), "seeds", *(["updates", "passes for a target", "passes"] if with_cost else [])]
    table = [f"| {title(metric)} at steps | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, rows in lines.items():
        tail = ["" if name == BASE else str(len(next(iter(rows.values()))))]
        if with_cost and name == BASE:
            tail += ["", "", ""]
        elif with_cost:
            costs = (f"{record['updates'][name]:,}", f"{record['passes_for_target'][name]:.2f}")
            tail += [*costs, f"{record['passes'][name]:,.0f}"]
        cells = [_cell(rows[n]) if n in rows else "" for n in columns]
        table.append("| " + " | ".join([name if name == BASE else f"`{name}`", *cells, *tail]) + " |")
    return "\n".join(table)


def _by_steps(lines: Mapping[str, Mapping[Any, list[float]]]) -> dict[str, dict[int, list[float]]]:
    """The step counts as numbers, which are texts in JSON."""
    return {name: {int(steps): values for steps, values in rows.items()} for name, rows in lines.items()}


def _values(metric: str, done: list[tuple[Run, dict[str, Any]]]) -> dict[str, dict[int, list[float]]]:
    """Arm -> step count -> a value for each seed. The base is the same in every run."""
    lines: dict[str, dict[int, list[float]]] = {}
    for run, result in done:
        for kind, name in (("base", BASE), ("student", run.arm)):
            if name == BASE and name in lines:
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


def _cell(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3g}" if len(values) == 1 else f"{mean:.3g} ± {statistics.stdev(values):.2g}"


def _write(path: Path, content: bytes) -> None:
    """Write atomically: several processes may write the same file."""
    with renamed_at_end(path) as temporary:
        temporary.write_bytes(content)
