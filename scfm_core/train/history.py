"""What a run wrote: `history.jsonl`, its starts and how each ended, for `scfm status` and batch jobs; and its metrics."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from scfm_core.errors import UserError
from scfm_core.files import append_line
from scfm_core.secrets import scrub

HISTORY = "history.jsonl"

End = Literal["finished", "stopped", "refused", "failed"]
"""All steps are done; stopped by a signal, to be resumed; the command is invalid; stopped by an error."""


def write_event(run_dir: Path, event: str, **values: Any) -> None:
    """Append one event, with the time and, under Slurm, the job."""
    row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **values}
    if job := os.environ.get("SLURM_JOB_ID"):
        row |= {
            "job": job,
            "requeued": int(count) if (count := os.environ.get("SLURM_RESTART_COUNT", "")).isdigit() else 0,
        }
    append_line(run_dir / HISTORY, json.dumps(row))


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """All events, oldest first; an incomplete line, left by a killed process, is ignored."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / HISTORY).read_text(errors="replace", encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "event" in row]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`. Invalid lines, such as a last one that a kill cut off, are ignored."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


class Start:
    """One start of a run, recorded in its history. A start without an end was killed, or its machine failed.

    Args:
        run_dir: the run's folder; None on ranks other than 0, which write nothing.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self._run_dir = run_dir
        self._training = False

    def begin(self, step: int, steps: int, processes: int, changed: dict[str, Any] | None = None) -> None:
        """Record that training begins, and which keys of the configuration have changed since the last start."""
        self._training = True
        if self._run_dir is not None:
            host = socket.gethostname()
            changes = {"changed": changed} if changed else {}
            write_event(self._run_dir, "start", step=step, steps=steps, processes=processes, host=host, **changes)

    def end(self, how: End, step: int | None = None, reason: str | None = None) -> None:
        """Record the end."""
        if self._run_dir is not None:
            write_event(self._run_dir, "end", how=how, step=step, reason=reason)

    @contextlib.contextmanager
    def recorded(self) -> Iterator["Start"]:
        """Record an exception as an end: `refused` for a UserError before training begins, else `failed`."""
        try:
            yield self
        except BaseException as error:
            refused = isinstance(error, UserError) and not self._training
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):  # the disk itself may have failed
                self.end("refused" if refused else "failed", reason=scrub(message)[:2000])
            raise
