"""The folder of a run: the names of its checkpoints, and its lock. It imports no torch: `scfm status` answers at once.

Only `checkpoints/step_XXXXXXXX` is a checkpoint, and only if its manifest names the same step. People keep copies beside
the checkpoints (`step_best`, `step_00000004 (copy)`). A run never resumes from such a folder, and never deletes one.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from scfm_core.errors import RunBusy
from scfm_core.files import check_writable, lock_file

MANIFEST = "manifest.json"
LATEST = "latest"
_CHECKPOINT = re.compile(r"step_(\d{8})")
_LEFTOVER = re.compile(r"\.step_\d{8}(\.old)?\.tmp")
_TRIES = 10
"""How often a run tries to lock its folder: `scfm status` holds the lock for a moment."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    found = _CHECKPOINT.fullmatch(checkpoint.name)
    assert found is not None, checkpoint
    return int(found[1])


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The folders of a run's checkpoints, complete or not, oldest first; without other folders and renamed copies."""
    return sorted(
        path
        for path in _entries(run_dir)
        if _CHECKPOINT.fullmatch(path.name) and path.is_dir() and saved_step(path) in (None, step_of(path))
    )


def copies(run_dir: Path) -> list[Path]:
    """Complete checkpoints under other names, which somebody keeps beside the run's own ones."""
    own = {*checkpoint_folders(run_dir), *leftovers(run_dir)}
    return sorted(path for path in _entries(run_dir) if path not in own and (path / MANIFEST).is_file())


def leftovers(run_dir: Path) -> list[Path]:
    """The folders that killed saves left."""
    return [path for path in _entries(run_dir) if _LEFTOVER.fullmatch(path.name)]


def _entries(run_dir: Path) -> list[Path]:
    folder = run_dir / "checkpoints"
    return list(folder.iterdir()) if folder.is_dir() else []


def saved_step(folder: Path) -> int | None:
    """The step in the manifest of a checkpoint; None if there is no such manifest."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        step = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("step")
        return step if type(step) is int else None
    return None


def newest_complete(run_dir: Path, before: int | None = None) -> Path | None:
    """The newest folder with a manifest, not verified; with `before`, the newest of an earlier step than this."""
    complete = [path for path in checkpoint_folders(run_dir) if (path / MANIFEST).is_file()]
    return next((path for path in reversed(complete) if before is None or step_of(path) < before), None)


def make_run_dir(run_dir: Path) -> None:
    """Create the run's folder, and check that it can be written.

    Raises:
        UserError: if it is a file, or its disk is full or read-only.
    """
    check_writable(run_dir, "run.dir", "Choose another with run.dir=PATH")


@dataclass(frozen=True)
class Holder:
    """The process that trains in a folder, as it has written itself into the lock."""

    host: str
    process: int
    since: str
    job: str | None = None
    """Number of its Slurm job."""

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return (
            f"{job}process {self.process} on {self.host}, since {self.since}"
            if self.host
            else "a process that is unknown"
        )


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Lock the folder, because two runs would overwrite each other's files. The lock ends with the process in any case.

    Raises:
        RunBusy: if another process has the lock; it names the holder.
    """
    with (run_dir / ".lock").open("a", encoding="utf-8") as lock:
        os.register_at_fork(after_in_child=lock.close)  # a data worker runs some seconds longer than a killed rank
        for left in reversed(range(_TRIES)):
            if lock_file(lock) is not False:
                break
            if not left:
                refuse_busy(run_dir, _read_holder(run_dir))
            time.sleep(0.02)
        with contextlib.suppress(OSError):  # the lock holds also without its text
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            own = Holder(socket.gethostname(), os.getpid(), now, os.environ.get("SLURM_JOB_ID"))
            lock.truncate(0)
            lock.write(json.dumps(asdict(own)))
            lock.flush()
            os.fsync(lock.fileno())  # else another machine would not see it on NFS
        yield


def refuse_busy(run_dir: Path, holder: Holder) -> None:
    """Raise that this folder is in use.

    Raises:
        RunBusy: always.
    """
    after = f"afterany:{holder.job}" if holder.job else "singleton"
    raise RunBusy(
        f"another scfm train is running in {run_dir}: {holder}. Wait for it, or use another run.dir. A batch job waits for it "
        f"if you submit with --dependency={after}"
    )


def holder(run_dir: Path) -> Holder | None:
    """Who trains in the folder now; None if nobody, or if that is unknown."""
    return _read_holder(run_dir) if is_locked(run_dir) else None


def _read_holder(run_dir: Path) -> Holder:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Holder(**json.loads((run_dir / ".lock").read_text(encoding="utf-8")))
    return Holder("", 0, "")


def is_locked(run_dir: Path) -> bool | None:
    """Whether a process trains in the folder now; None if the file system has no locks, or the lock cannot be read."""
    try:
        with (run_dir / ".lock").open("rb") as lock:
            free = lock_file(lock, shared=True)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return None if free is None else not free
