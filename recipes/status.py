"""`scfm status`: the progress of a run, and its starts. It imports no torch, and so answers at once."""

import socket
import time
from pathlib import Path
from typing import Any

from scfm_core.errors import UserError
from scfm_core.train.history import read_history, read_metrics
from scfm_core.train.run_dir import is_locked, newest_complete
from scfm_core.wording import count, duration, number

_RECENT = 50
"""Number of last steps whose rate gives the remaining time."""


def status(run_dir: Path) -> str:
    """Step, rate, time left, last checkpoint, and every start with its end, as text.

    Raises:
        UserError: if no run was started in the folder.
    """
    history, rows = read_history(run_dir), read_metrics(run_dir / "metrics.jsonl")
    if not history:
        raise UserError(f"{run_dir} is not a run: it has no history.jsonl. Give the run.dir of a `scfm train`")
    starts = _starts(history)
    unfinished = _unfinished(starts[-1], is_locked(run_dir))
    done = rows[-1]["step"] if rows else 0
    steps = next((int(start["steps"]) for start in reversed(starts) if "steps" in start), None)
    lines = [f"{run_dir}: {_state(starts[-1], unfinished)}"]
    lines.append(f"  step        {done:,}" + (f" of {steps:,} ({done / steps:.1%})" if steps else ""))
    recent = rows[-_RECENT:]
    if len(recent) > 1 and recent[-1]["seconds"] > recent[0]["seconds"]:
        seconds = (recent[-1]["seconds"] - recent[0]["seconds"]) / (recent[-1]["step"] - recent[0]["step"])
        samples = (recent[-1]["samples"] - recent[0]["samples"]) / (recent[-1]["seconds"] - recent[0]["seconds"])
        lines.append(f"  rate        {samples:,.1f} samples/s, {seconds:,.2f} s a step")
        if steps and done < steps:
            lines.append(f"  left        {duration(seconds * (steps - done))} of training")
    if rows and rows[-1].get("loss") is not None:
        lines.append(f"  loss        {number(rows[-1]['loss'])}")
    checkpoint = newest_complete(run_dir)
    if checkpoint is None:
        lines.append("  checkpoint  none yet")
    else:
        lines.append(
            f"  checkpoint  {checkpoint.name}, {duration(max(0.0, time.time() - checkpoint.stat().st_mtime))} old"
        )
    lines.append(f"  starts      {len(starts)}")
    ends = ["killed without a message"] * (len(starts) - 1) + [unfinished]
    lines += [f"    {_line(start, end)}" for start, end in list(zip(starts, ends, strict=True))[-10:]]
    return "\n".join(lines)


def _starts(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each start with its end, if it has one. A refused run has only an end."""
    starts: list[dict[str, Any]] = []
    for row in history:
        if row["event"] == "start":
            starts.append(dict(row))
        elif row["event"] == "end":
            if not starts or "how" in starts[-1] or row["how"] == "refused":
                starts.append({"time": row["time"], "job": row.get("job")})
            starts[-1] |= {"how": row["how"], "reason": row.get("reason"), "ended": row["time"], "at": row.get("step")}
        elif row["event"] == "job" and (not starts or "how" not in starts[-1]):
            if not starts:  # its processes did not come as far as a start
                starts.append({"time": row["time"], "job": row.get("job")})
            starts[-1] |= {"how": "lost", "reason": row["reason"], "ended": row["time"]}
    return starts


def _unfinished(last: dict[str, Any], is_locked: bool | None) -> str:
    """What a last start without an end does now. A running `scfm train` holds the folder's lock."""
    if is_locked:
        return "running"
    host = last.get("host")
    if is_locked is None:
        return f"running, or killed without a message: {host}'s processes can tell"
    if host == socket.gethostname():
        return "killed without a message"
    return f"killed without a message, or running on {host}: some file systems do not show locks to other machines"


def _state(last: dict[str, Any], unfinished: str) -> str:
    if "how" not in last:
        return unfinished
    if unfinished == "running":
        return "starting"
    return {
        "finished": "finished",
        "stopped": "stopped, to be resumed",
        "refused": "refused",
        "lost": "lost: it ended without a message",
    }.get(last["how"], "failed")


def _line(start: dict[str, Any], unfinished: str) -> str:
    job = f"job {start['job']}, " if start.get("job") else ""
    where = (
        f"{count(start['processes'], 'process', 'processes')} on {start['host']}, from step {start['step']:,}"
        if "step" in start
        else "did not start"
    )
    end = unfinished
    if "how" in start:
        at = f" at step {start['at']:,}" if start.get("at") is not None else ""
        reason = f": {str(start['reason']).splitlines()[0]}" if start.get("reason") else ""
        end = f"{start['how']}{at} {start['ended']}{reason}"
    return f"{start['time']}  {job}{where}; {end}"
