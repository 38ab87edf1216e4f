"""`scfm status`: the progress of a run, and its starts."""

import time
from pathlib import Path
from typing import Any

from scfm_core.errors import UserError
from scfm_core.text import duration, number
from scfm_core.train.checkpoint import newest_complete
from scfm_core.train.history import read_history
from scfm_core.train.metrics import read_metrics

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
    done = rows[-1]["step"] if rows else 0
    steps = next((int(start["steps"]) for start in reversed(starts) if "steps" in start), None)
    lines = [f"{run_dir}: {_state(starts)}"]
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
        lines.append(f"  checkpoint  {checkpoint.name}, {duration(time.time() - checkpoint.stat().st_mtime)} old")
    lines.append(f"  starts      {len(starts)}")
    lines += [f"    {_line(start)}" for start in starts[-10:]]
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
        elif starts and row["event"] == "job" and "how" not in starts[-1]:
            starts[-1] |= {"how": "lost", "reason": row["reason"], "ended": row["time"]}
    return starts


def _state(starts: list[dict[str, Any]]) -> str:
    how = starts[-1].get("how")
    if how is None:
        return "running, or killed without a message"
    return {
        "finished": "finished",
        "stopped": "stopped, to be resumed",
        "refused": "refused",
        "lost": "lost: it ended without a message",
    }.get(how, "failed")


def _line(start: dict[str, Any]) -> str:
    job = f"job {start['job']}, " if start.get("job") else ""
    where = (
        f"{start['processes']} processes on {start['host']}, from step {start['step']:,}"
        if "step" in start
        else "refused"
    )
    end = "still running, or killed without a message"
    if "how" in start:
        at = f" at step {start['at']:,}" if start.get("at") is not None else ""
        reason = f": {str(start['reason']).splitlines()[0]}" if start.get("reason") else ""
        end = f"{start['how']}{at} {start['ended']}{reason}"
    return f"{start['time']}  {job}{where}; {end}"
