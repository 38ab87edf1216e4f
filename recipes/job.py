"""`scfm job`: what a batch job in slurm/ asks about its run."""

from pathlib import Path
from typing import Literal

from scfm_core.errors import UserError
from scfm_core.train.checkpoint import newest_complete
from scfm_core.train.history import read_history, write_event
from scfm_core.train.parse import load_config

Verdict = Literal["finished", "requeue", "cancelled", "failed"]


def make_run_dir(config_path: str, overrides: list[str]) -> Path:
    """Check a run's configuration and make its folder; the folder's absolute path.

    Raises:
        UserError: if the configuration is invalid, or the folder cannot be made.
    """
    folder = Path(load_config(config_path, overrides).run.dir).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir: {folder} cannot be made ({error.strerror}). Choose another with run.dir=PATH"
        ) from error
    return folder


def verdict(run_dir: Path, *, exit_code: int, cancelled: bool, retries: int) -> tuple[Verdict, str]:
    """What a batch job does next, after its processes have ended. The verdict is written to the run's history.

    The history decides, because torchrun's exit code does not tell a run that stopped as asked from one that crashed.

    Args:
        run_dir: of the run.
        exit_code: of the processes' launcher.
        cancelled: whether the job was cancelled.
        retries: how often in a row the run may break off without a new checkpoint in between.

    Returns:
        `finished`, `requeue`, `cancelled` or `failed`, and why.
    """
    history = read_history(run_dir)
    jobs = [number for number, row in enumerate(history) if row["event"] == "job"]
    ends = [row for row in history[jobs[-1] + 1 if jobs else 0 :] if row["event"] == "end"]
    how, reason = (ends[-1]["how"], ends[-1].get("reason")) if ends else (None, None)
    newest = newest_complete(run_dir)
    checkpoint = newest.name if newest else None
    if how == "finished":  # rank 0 writes it last: a process that fails afterwards has no work left
        found: tuple[Verdict, str] = "finished", "all steps are done"
    elif cancelled:
        found = "cancelled", "the job was cancelled"
    elif how == "stopped":
        found = "requeue", f"stopped by {reason}, to be continued"
    elif how == "refused":
        found = "failed", f"it cannot work as it is: {reason}"
    else:
        why = reason or f"the processes ended with exit code {exit_code}, and said nothing"
        broken = 0
        for row in reversed([history[number] for number in jobs]):
            if not row["broke_off"] or row["checkpoint"] != checkpoint:
                break
            broken += 1
        if broken >= retries:
            found = "failed", f"it broke off {broken + 1} times in a row without a new checkpoint: {why}"
        else:
            found = "requeue", f"it broke off ({broken + 1} of at most {retries + 1} times in a row): {why}"
    write_event(
        run_dir,
        "job",
        verdict=found[0],
        reason=found[1],
        exit_code=exit_code,
        checkpoint=checkpoint,
        broke_off=found[0] in ("requeue", "failed") and how not in ("stopped", "refused"),
    )
    return found
