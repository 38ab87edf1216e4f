"""`scfm report`: one self-contained HTML page about a run, optionally compared with others."""

import base64
import html
import json
from pathlib import Path

import yaml
from pydantic import TypeAdapter

from recipes.figures import (
    FIGURES,
    SINGULAR,
    Result,
    figure_rows,
    images_note,
    intact,
    is_singular,
    read_evaluation,
    step_counts,
    title,
)
from recipes.plots import Panel, figure_style, quality_plot, to_png
from scfm_core.errors import UserError
from scfm_core.files import check_writable, written_whole
from scfm_core.scfm.ema import EMAConfig
from scfm_core.scfm.restart import threshold
from scfm_core.train.history import read_metrics
from scfm_core.wording import count, duration

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #eee }
th:first-child, td:first-child { text-align: left; white-space: nowrap } img { max-width: 100% } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
.note { color: #555 }
"""


class _Run:
    """The content of a run's folder."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder} is not a run: it has no config.yaml")
        self.folder = folder
        self.name = folder.name
        self.config = (folder / "config.yaml").read_text(encoding="utf-8")
        self.metrics = read_metrics(folder / "metrics.jsonl")
        if not self.metrics:
            raise UserError(f"{folder} has no metrics yet; train first")
        self.evaluation: Result = read_evaluation(folder / "evaluation.json") or {}
        self.grids = sorted((folder / "samples").glob(f"step_{'[0-9]' * 8}.png"))


def report(run_dir: Path, compare: list[Path]) -> Path:
    """Write `RUN_DIR/report.html`, which needs no other file.

    Raises:
        UserError: if a folder is not a run or has no metrics.
    """
    advice = "Make room there, or report on a copy of the run in another folder"
    check_writable(run_dir, "RUN_DIR", advice) if run_dir.is_dir() else None
    run, others = _Run(run_dir), [_Run(folder) for folder in compare]
    runs = [run, *others]
    for each in runs:
        if sum(other.folder.name == each.folder.name for other in runs) > 1:  # seeds of different arms of a study
            each.name = f"{each.folder.absolute().parent.name}/{each.folder.name}"
    body = [_title(run, others)]
    if run.evaluation:
        body.append("<h2>Quality over steps</h2>" + _image(_quality_over_steps(runs)))
        body += [_evaluation_table(each) for each in runs if each.evaluation]
        body.append("<p class=note>All figures start from the same noise.")
        if "teacher" in run.evaluation:
            body.append(
                " <b>base</b> is the undistilled model at few steps; <b>teacher</b>, the reference, is the same model at many steps."
            )
        body.append("</p>")
    else:
        body.append(
            f"<p class=note>Not evaluated yet: <code>scfm evaluate {html.escape(str(run_dir))}</code> compares student, undistilled "
            f"model and teacher; then write the report again.</p>"
        )
    for each in runs:
        evaluated = each.folder / "samples" / "evaluation.png"
        if evaluated.is_file():
            body.append(f"<h2>Samples: {html.escape(each.name)}</h2>" + _image(evaluated.read_bytes()))
    body.append("<h2>Training</h2>" + _image(_training_plot(runs)))
    if any("ema_lag_ratio" in row for each in runs for row in each.metrics):
        body.append(
            "<h2>Averages</h2><p class=note>Distance of the student from its fast average, divided by its distance from the slow one. "
            "Below the dashed line the slow average only lags behind: both averages restart from the student (a dot).</p>"
            + _image(_averages_plot(runs))
        )
    if any(path.with_suffix(".json").is_file() for each in runs for path in each.grids):
        body.append(
            "<h2>Distance to the teacher on the grid's prompts</h2>"
            "<p class=note>Mean squared distance between latents from the same noise. If it rises while the loss falls, the "
            "student overfits.</p>" + _image(_validation_plot(runs))
        )
    if run.grids:
        shown = [run.grids[i] for i in sorted({0, len(run.grids) // 2, len(run.grids) - 1})]
        body += [f"<h3>step {int(path.stem.split('_')[1]):,}</h3>" + _image(path.read_bytes()) for path in shown]
    body.append(f"<h2>Configuration</h2><pre>{html.escape(run.config)}</pre>")
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(run.name)} · scfm</title>"
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>"
    )
    path = run_dir / "report.html"
    with written_whole(path, "RUN_DIR", advice) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def _title(run: _Run, others: list[_Run]) -> str:
    last, skipped = run.metrics[-1], sum("skipped" in row for row in run.metrics)
    facts = [count(last["step"], "step"), count(last["samples"], "sample"), f"{duration(last['seconds'])} of training"]
    facts += [f"{count(skipped, 'skipped step')} (incidents.jsonl)"] if skipped else []
    compared = f"; compared with: {', '.join(other.name for other in others)}" if others else ""
    return f"<h1>{html.escape(run.name)}</h1><p class=note>{html.escape(', '.join(facts) + compared)}</p>"


def _image(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _evaluation_table(run: _Run) -> str:
    head = "".join(f"<th>{steps}</th>" for steps in step_counts(run.evaluation))
    lines, last = [], None
    for name, kind, cells in figure_rows(run.evaluation):
        row = ["" if name == last else html.escape(title(name)), kind, *cells]
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>")
        last = name
    first = next(row for rows in run.evaluation.values() for row in rows.values())
    note = ""
    if "samples" in first:
        few = int(min(first["samples"], first["data_samples"]))
        more = f" <b>Note</b>: {SINGULAR}." if is_singular(few, int(first["features"])) else ""
        note = f"<p class=note>{images_note(first)}.{more}</p>"
    return (
        f"<h3>{html.escape(run.name)}</h3><table><tr><th>steps</th><th></th>{head}</tr>{''.join(lines)}</table>{note}"
    )


def _quality_over_steps(runs: list[_Run]) -> bytes:
    """Some figures: a line for each run, and one for the undistilled base, which one run of a study has. A run from scratch is
    compared with the data."""
    reference = "teacher" if "teacher" in runs[0].evaluation else "data"
    named = {"undistilled": next((run.evaluation["base"] for run in runs if "base" in run.evaluation), {})}
    named |= {run.name: run.evaluation["student"] for run in runs if run.evaluation}
    panels = {}
    for metric in (f"fid_{reference}", "recall_data", "diversity", "prompt_following"):
        lines = {
            name: {int(steps): [row[metric]] for steps, row in rows.items() if metric in row}
            for name, rows in named.items()
        }
        if lines := {name: rows for name, rows in lines.items() if rows}:
            panels[metric] = Panel(title(metric), lines, is_log=FIGURES[metric].is_distance)
    return quality_plot(list(panels.values()))


def _training_plot(runs: list[_Run]) -> bytes:
    plt, style = figure_style()
    with style:
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
        for run in runs:
            applied = [row for row in run.metrics if "skipped" not in row]
            steps = [row["step"] for row in applied]
            left.plot(steps, _smooth([row["loss"] for row in applied]), label=run.name)
            right.plot(steps, _smooth([row["grad_norm"] for row in applied]), label=run.name)
        for name in ("teacher", "self"):
            rows = [
                (row["step"], row[f"loss/{name}"]) for row in runs[0].metrics if row.get(f"loss/{name}") is not None
            ]
            if rows:
                left.plot(
                    [s for s, _ in rows], _smooth([v for _, v in rows]), label=f"{runs[0].name}: {name} slice", lw=0.8
                )
        left.set(xlabel="step of the training", ylabel="loss (smoothed)", yscale="log")
        right.set(xlabel="step of the training", ylabel="gradient norm (smoothed)", yscale="log")
        left.legend(frameon=False, fontsize=8)
        figure.tight_layout(w_pad=2)
        return to_png(plt, figure)


def _averages_plot(runs: list[_Run]) -> bytes:
    plt, style = figure_style()
    with style:
        figure, axes = plt.subplots(figsize=(8, 3))
        for run in runs:
            rows = [row for row in run.metrics if row.get("ema_lag_ratio") is not None]
            if not rows:
                continue
            [line] = axes.plot([row["step"] for row in rows], [row["ema_lag_ratio"] for row in rows], label=run.name)
            restarts = [row for row in rows if row.get("ema_restart")]
            axes.plot(
                [r["step"] for r in restarts], [r["ema_lag_ratio"] for r in restarts], "o", ms=4, color=line.get_color()
            )
        axes.axhline(
            threshold(TypeAdapter(EMAConfig).validate_python(yaml.safe_load(runs[0].config)["ema"])),
            color="black",
            ls="--",
            lw=0.8,
        )
        axes.set(xlabel="step of the training", ylabel="distance to fast / to slow")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return to_png(plt, figure)


def _distances(path: Path) -> dict[str, float]:
    """Of a grid, by step count; empty if they were not measured."""
    if not path.is_file():
        return {}
    with intact(path, "Delete it"):
        distances: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["mse_teacher"]
        if not all(isinstance(value, int | float) for value in distances.values()):
            raise ValueError("it is not a table of numbers")
    return distances


def _validation_plot(runs: list[_Run]) -> bytes:
    plt, style = figure_style()
    with style:
        figure, axes = plt.subplots(figsize=(8, 3.6))
        for run in runs:
            found = {int(path.stem.split("_")[1]): _distances(path.with_suffix(".json")) for path in run.grids}
            found = {step: distances for step, distances in found.items() if distances}
            for steps in next(iter(found.values()), {}):
                known = {step: distances[steps] for step, distances in found.items() if steps in distances}
                axes.plot(
                    known.keys(), known.values(), marker="o", ms=3, label=f"{run.name}: {count(int(steps), 'step')}"
                )
        axes.set(xlabel="step of the training", ylabel="mean squared distance", yscale="log")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return to_png(plt, figure)


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about 2% of the run, bias-corrected."""
    decay = 1 - 1 / max(1.0, 0.02 * len(values))
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed
