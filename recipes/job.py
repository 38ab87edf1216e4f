"""`scfm job`: questions of a batch job in slurm/ about its run.

A run may have been submitted twice. The job that comes second ends, and writes nothing into the record of the run: the first
one counts its failures there.
"""

import os
from pathlib import Path
from typing import Literal

from scfm_core.train import run_dir as run_folder
from scfm_core.train.history import read_history, write_event
from scfm_core.train.run_dir import newest_complete

Verdict = Literal["finished", "requeue", "cancelled", "failed", "busy"]


def make_run_dir(config_path: str, overrides: list[str]) -> Path:
    """Check a run's configuration and create its folder; returns the folder's absolute path.

    Raises:
        UserError: if the configuration is invalid, or the folder cannot be created.
        RunBusy: if another job trains in the folder.
    """
    from scfm_core.train.parse import load_config  # it imports torch, which the verdict does not need

    folder = Path(load_config(config_path, overrides).run.dir).absolute()
    run_folder.make_run_dir(folder)
    if (other := other_job(folder)) is not None:
        run_folder.refuse_busy(folder, other)
    return folder


def other_job(run_dir: Path) -> run_folder.Holder | None:
    """Who trains in the folder now, if this process belongs to a Slurm job and that one to another or to none.

    An earlier start of the same job, on a node that Slurm has lost, is not another job: this start fails and is tried again.
    """
    own, holder = os.environ.get("SLURM_JOB_ID"), run_folder.holder(run_dir)
    return holder if own and holder is not None and holder.job != own else None


def verdict(run_dir: Path, *, exit_code: int, cancelled: bool, retries: int) -> tuple[Verdict, str]:
    """Decide what a batch job does after its processes have ended, and write the verdict to the run's history.

    The history decides, because torchrun's exit code is the same for a run that stopped on a signal and one that crashed.
    Only the events of this Slurm job count: a person who submits again has changed something.

    Args:
        run_dir: the run's folder.
        exit_code: exit code of the launcher.
        cancelled: whether the job was cancelled.
        retries: how many consecutive failures without a new checkpoint are tolerated.

    Returns:
        `finished`, `requeue`, `cancelled`, `failed` or `busy` (another job trains in the folder; nothing is written), and the
        reason.
    """
    if (other := other_job(run_dir)) is not None:
        return "busy", f"the run belongs to {other}. This job ends and is not requeued; it changes nothing of the run"
    own = os.environ.get("SLURM_JOB_ID")
    history = [row for row in read_history(run_dir) if row.get("job") == own]
    jobs = [number for number, row in enumerate(history) if row["event"] == "job"]
    ends = [row for row in history[jobs[-1] + 1 if jobs else 0 :] if row["event"] == "end"]
    how, reason = (ends[-1]["how"], ends[-1].get("reason")) if ends else (None, None)
    newest = newest_complete(run_dir)
    checkpoint = newest.name if newest else None
    if how == "finished":  # rank 0 records it last: a failure of another process after that does not matter
        found: tuple[Verdict, str] = "finished", "all steps are done"
    elif cancelled:
        found = "cancelled", "the job was cancelled"
    elif how == "stopped":
        found = "requeue", f"stopped by {reason}, to be resumed"
    elif how == "refused":
        found = "failed", f"the command is invalid: {reason}"
    else:
        why = reason or f"the processes ended with exit code {exit_code} and without a message"
        failures = 0
        for row in reversed([history[number] for number in jobs]):
            if not row["broke_off"] or row["checkpoint"] != checkpoint:
                break
            failures += 1
        if failures >= retries:
            found = "failed", f"it failed {failures + 1} times in a row without a new checkpoint: {why}"
        else:
            found = "requeue", f"it failed ({failures + 1} of at most {retries + 1} times in a row): {why}"
    try:
        write_event(
            run_dir,
            "job",
            verdict=found[0],
            reason=found[1],
            exit_code=exit_code,
            checkpoint=checkpoint,
            broke_off=found[0] in ("requeue", "failed") and how not in ("stopped", "refused"),
        )
    except OSError as error:  # the verdict stands; only the count of failures is not kept
        found = found[0], f"{found[1]} (it could not be recorded: {error})"
    return found
