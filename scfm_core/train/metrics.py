"""Logging of a run: `metrics.jsonl`, `incidents.jsonl`, W&B, the progress bar."""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scfm_core.distributed.world import World
from scfm_core.files import append_line
from scfm_core.train.config import RunConfig
from scfm_core.train.history import read_metrics
from scfm_core.train.parse import to_plain
from scfm_core.train.wandb_log import WandbLog
from scfm_core.wording import number


class MetricsFile:
    """Appends one JSON object for each step. On resuming it drops the steps after the checkpoint, so that none occurs twice."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        """Append `row`; it reaches the operating system before this returns. Numbers that are not finite become null."""
        self._file.write(json.dumps(_finite(row)) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class IncidentsFile:
    """`incidents.jsonl`: skipped steps, invalid samples, rollbacks. Rows are only appended, also when a run goes back."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, incident: dict[str, Any]) -> None:
        """Append one incident, with the time."""
        append_line(self._path, json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **_finite(incident)}))


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


class _Lines(tqdm):  # type: ignore[type-arg]
    """A progress bar for a log file: one line a minute."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write a new line, where a terminal would redraw the bar."""
        self.fp.write(f"{msg or self}\n")
        self.fp.flush()
        return True


def progress_bar(description: str, total: int, initial: int = 0, unit: str = "step") -> "tqdm[Any]":
    """A tqdm bar; in a log file, one line a minute."""
    if sys.stderr.isatty():
        has_size = min(os.get_terminal_size(sys.stderr.fileno())) > 0  # serial consoles and some containers say 0
        return tqdm(
            desc=description,
            total=total,
            initial=initial,
            unit=unit,
            dynamic_ncols=has_size,
            ncols=None if has_size else 80,
            nrows=None if has_size else 24,
            mininterval=0.2,
            smoothing=0.1,
        )
    lines = "{desc}: {unit} {n_fmt}/{total_fmt}, {elapsed} < {remaining}, {rate_fmt}{postfix}"
    return _Lines(
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        mininterval=60,
        maxinterval=120,
        smoothing=0.1,
        bar_format=lines,
    )


class RunLog:
    """The log of a run on rank 0: files, W&B and the progress bar. The other ranks log nothing.

    Args:
        config: the run.
        step: last step of the run so far; later steps in `metrics.jsonl` are dropped.
        world: the processes. A failure on rank 0 at the start is raised on every rank.
    """

    def __init__(self, config: RunConfig, step: int, world: World) -> None:
        self._config, self._step, self._world = config, step, world
        self._folder = Path(config.run.dir)
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> "RunLog":
        with self._world.together():
            if self._world.is_main:
                self._open()
        return self

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._metrics = MetricsFile(self._folder / "metrics.jsonl", self._step)
        self._exits.callback(lambda: self._metrics.close())
        self._incidents = IncidentsFile(self._folder / "incidents.jsonl")
        self._wandb = WandbLog(self._config.wandb, self._folder, to_plain(self._config))
        self._exits.callback(self._wandb.close)
        self._bar = self._exits.enter_context(progress_bar(self._folder.name, self._config.train.steps, self._step))

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def step(self, row: dict[str, Any]) -> None:
        """Log the row of a step."""
        if not self._world.is_main:
            return
        if "skipped" in row:
            self._incidents.write({"event": "skip", **row})
            self._bar.write(f"step {row['step']} skipped: {row['skipped']}; samples to look at: {row['suspects']}")
        if "bad_samples" in row:
            bad = row["bad_samples"]
            self._incidents.write({"event": "bad_samples", "step": row["step"], "samples": bad})
            self._bar.write(f"step {row['step']}: {len(bad)} invalid samples were replaced, the first: {bad[0]}")
            row = {**row, "bad_samples": len(bad)}
        self._metrics.write(row)
        self._wandb.log(row)
        self._bar.set_postfix(loss=number(row["loss"]), samples_per_s=number(row["samples_per_second"]), refresh=False)
        self._bar.update()

    def incident(self, incident: dict[str, Any]) -> None:
        """Log an event that a reader of the run's folder should know."""
        if self._world.is_main:
            self._incidents.write(incident)
            self._bar.write("; ".join(f"{key}: {value}" for key, value in incident.items()))

    def picture(self, path: Path, step: int) -> None:
        """Log a validation grid and the distances stored beside it."""
        if self._world.is_main:
            self._wandb.image("samples", path, step)
            if (file := path.with_suffix(".json")).is_file():
                distances = json.loads(file.read_text(encoding="utf-8"))["mse_teacher"]
                self._wandb.log(
                    {"step": step, **{f"validation/mse_teacher_{n}": value for n, value in distances.items()}}
                )

    def rolled_back(self, incident: dict[str, Any]) -> None:
        """Log a rollback. The steps after its target are dropped: they will be repeated."""
        if not self._world.is_main:
            return
        self._incidents.write(incident)
        self._metrics.close()
        self._metrics = MetricsFile(self._folder / "metrics.jsonl", incident["to_step"])
        self._bar.write(
            f"{incident['reason']}: back to step {incident['to_step']}; the data continue after the skipped samples"
        )
        self._bar.n = incident["to_step"]
