"""`history.jsonl`: every start of a run and how it ended, so that whoever looks later (a batch job, `scfm status`) knows."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from scfm_core.errors import UserError
from scfm_core.secrets import scrub

HISTORY = "history.jsonl"

End = Literal["finished", "stopped", "refused", "failed"]
"""All steps done; asked to stop, to be continued; the command cannot work as it is; broke off."""


def write_event(run_dir: Path, event: str, **values: Any) -> None:
    """Append one event, with the time and, within Slurm, the job."""
    row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **values}
    if job := os.environ.get("SLURM_JOB_ID"):
        row |= {"job": job, "requeued": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
    with (run_dir / HISTORY).open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """All events, oldest first; a line that a kill cut off is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / HISTORY).read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "event" in row]


class Start:
    """One start of a run in its history. A start without an end was killed, or its machine was.

    Args:
        run_dir: of the run; None on ranks that write nothing.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self._run_dir = run_dir
        self._training = False

    def begin(self, step: int, steps: int, processes: int) -> None:
        """The steps begin."""
        self._training = True
        if self._run_dir is not None:
            host = socket.gethostname()
            write_event(self._run_dir, "start", step=step, steps=steps, processes=processes, host=host)

    def end(self, how: End, step: int | None = None, reason: str | None = None) -> None:
        """It is over."""
        if self._run_dir is not None:
            write_event(self._run_dir, "end", how=how, step=step, reason=reason)

    @contextlib.contextmanager
    def recorded(self) -> Iterator["Start"]:
        """Whatever is raised within is an end too: `refused` for a user's mistake before the steps begin, else `failed`."""
        try:
            yield self
        except BaseException as error:
            refused = isinstance(error, UserError) and not self._training
            words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):  # the disk may be what has failed
                self.end("refused" if refused else "failed", reason=scrub(words)[:2000])
            raise
