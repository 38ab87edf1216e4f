"""Checkpoints that are complete or not there: written aside by every rank, hashed, fsynced, renamed.

    checkpoints/step_00000250/   dcp/ (PyTorch's distributed checkpoint), under DeepSpeed also its own *_states.pt files,
                                 state.json (counters, cursor, fingerprints, configuration), manifest.json (sha256 of all)
    checkpoints/latest           the name of the newest, as DeepSpeed's tools expect it

A folder gets its name once it is complete on all ranks, and `latest` follows: neither ever names a partial one. The
frozen base is not stored.
"""

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from scfm_core.distributed.reader import Reader, open_reader
from scfm_core.distributed.world import World
from scfm_core.errors import UserError, agreed_error
from scfm_core.files import file_sha256, fsync_path

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 3
_FAILURES = (OSError, RuntimeError, CheckpointException)

Write = Callable[[Path, World], Callable[[], object]]
"""Begins to write tensors into a folder, on every rank; what it returns waits for the end."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its state, and a reader of its tensors."""

    path: Path
    state: dict[str, Any]

    @cached_property
    def reader(self) -> Reader:
        """Reads any range of any tensor from disk; UserError if the files are not what they should be."""
        return open_reader(self.path, self.state["kind"], self.state["shapes"])


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


class CheckpointWriter:
    """Writes the checkpoints of a run; every rank has one, and calls it at the same steps.

    Args:
        run_dir: the run's folder, seen by every rank.
        keep: how many complete checkpoints stay.
        world: the processes.
        on_thread: tensors are copied to host memory and written while the training goes on.
    """

    def __init__(self, run_dir: Path, keep: int, world: World | None = None, *, on_thread: bool = False) -> None:
        self._run_dir, self._keep = run_dir, keep
        world = world or World()
        self._world = world.second_group() if on_thread else world
        self._thread = ThreadPoolExecutor(1, "scfm checkpoint") if on_thread else None
        self._pending: Future[None] | None = None

    def save(self, step: int, write: Write, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint after `step` steps and drop the oldest beyond `keep`.

        Returns:
            the checkpoint's folder; with `on_thread` it appears there later, `wait` waits for it.

        Raises:
            UserError: on every rank, if this or the one before could not be written; earlier ones are untouched.
        """
        self.wait()
        final = checkpoint_path(self._run_dir, step)
        aside = final.with_name(f".{final.name}.tmp")
        with self._reported(aside):
            if self._world.is_main:
                for leftover in final.parent.glob(".step_*.tmp"):  # of a save that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                aside.mkdir(parents=True)
        try:
            written = write(aside, self._world)
        except _FAILURES as error:
            # Agreed upon in `_complete`: here the other ranks' threads may be talking over the same group already.
            written = _raising(error)
        if self._thread is None:
            self._complete(aside, written, state)
        else:
            self._pending = self._thread.submit(self._complete, aside, written, state)
        return final

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete; raises what `save` would have."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _complete(self, aside: Path, written: Callable[[], object], state: Mapping[str, Any]) -> None:
        final = aside.with_name(aside.name.removeprefix(".").removesuffix(".tmp"))
        world = self._world
        with self._reported(aside):
            written()
        with self._reported(aside):
            if world.is_main:
                (aside / "state.json").write_text(json.dumps(state, indent=2))
        files: dict[str, dict[str, Any]] = {}
        with self._reported(aside):
            for path in _files(aside)[world.rank :: world.size]:
                fsync_path(path)
                name = path.relative_to(aside).as_posix()
                files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        shares = world.gather(files)
        with self._reported(aside):
            if world.is_main:
                merged = {name: entry for share in shares for name, entry in sorted(share.items())}
                self._commit(aside, final, {"format": FORMAT, "step": state["step"], "files": merged})

    def _commit(self, aside: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for path in (aside / MANIFEST, *[p for p in aside.rglob("*") if p.is_dir()], aside):
            fsync_path(path)
        replaced = final.with_name(f".{final.name}.old.tmp")
        if final.exists():  # a damaged one that resuming has passed over, or one that the run went back behind
            final.with_name(LATEST).unlink(missing_ok=True)
            final.rename(replaced)
        aside.rename(final)
        point_to(final)
        shutil.rmtree(replaced, ignore_errors=True)
        _retain(self._run_dir, final, self._keep)

    @contextlib.contextmanager
    def _reported(self, aside: Path) -> Any:
        """A failure on one rank ends the save on every rank, with a message that names rank and cause."""
        failure = None
        try:
            yield
        except _FAILURES as error:
            failure = _cause(error)
            if not isinstance(failure, Exception):  # Ctrl-C, which DCP takes for a failed write
                raise failure from error
        explained = None if failure is None else _explained(failure, aside)
        try:
            self._world.agree(explained)
        except UserError as joint:
            if self._world.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            intact = self._world.from_main(_newest_intact(self._run_dir) if self._world.is_main else None)
            message = f"{joint}. " + (f"The last one, {intact.name}, is intact. " if intact else "")
            last = UserError(f"{message}Mend that and run the same command again")
            last.agreed = joint.agreed
            raise last from failure


def _raising(error: BaseException) -> Callable[[], object]:
    def again() -> None:
        raise error

    return again


def _cause(error: BaseException) -> BaseException:
    """The failure itself, out of DCP's summary of all ranks' failures."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _explained(error: BaseException, aside: Path) -> UserError:
    """What went wrong in a save, for a person."""
    text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    try:
        free: float = shutil.disk_usage(aside if aside.exists() else aside.parent).free
    except OSError:
        free = float("inf")
    # torch's own writer says "file write failed" of a full disk, without a number.
    full = (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or free < 2**20
    )
    step = aside.name.removeprefix(".").removesuffix(".tmp")
    reason = f"the disk is full ({text}); make room" if full else text
    return UserError(f"the checkpoint {step} could not be written to {aside.parent}: {reason}")


def find_checkpoint(run_dir: Path, warn: Callable[[str], None] = print, world: World | None = None) -> Path | None:
    """The newest checkpoint of a run that is complete and undamaged; each one passed over is named through `warn`.

    Returns:
        its folder, the same on every rank; None if the run has no checkpoint at all.

    Raises:
        UserError: if there are checkpoints, but every one is damaged.
    """
    world = world or World()
    folders: list[Path] = world.from_main(_folders(run_dir))
    for path in reversed(folders):
        try:
            verify_checkpoint(path, world)
        except UserError as error:
            if world.is_main:
                warn(f"{error}. Falling back to an earlier checkpoint")
            continue
        return path
    if folders:
        raise agreed_error(
            f"none of the {len(folders)} checkpoints in {run_dir / 'checkpoints'} is intact. Bring one back from a copy, "
            f"or start over with --resume never"
        )
    return None


def verify_checkpoint(path: Path, world: World | None = None) -> None:
    """Hold every file against the manifest; the ranks share the work.

    Raises:
        UserError: on every rank, naming the file that is missing or differs.
    """
    world = world or World()
    with world.together():
        for name, (size, digest) in sorted(read_manifest(path).items())[world.rank :: world.size]:
            file = path / name
            if not file.is_file():
                raise UserError(f"checkpoint {path} is damaged: {name} is missing")
            try:
                same = file.stat().st_size == size and file_sha256(file) == digest
            except OSError as error:
                raise UserError(f"checkpoint {path} is damaged: {name} cannot be read ({error.strerror})") from error
            if not same:
                raise UserError(f"checkpoint {path} is damaged: {name} differs from the manifest's sha256")


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 of each file that belongs to the checkpoint.

    Raises:
        UserError: if the folder is not a complete checkpoint of this version.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        written = manifest.get("format", 1)
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a complete checkpoint ({MANIFEST}: {error!r})") from error
    if written != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {written}; this version of scfm reads {FORMAT}. Go on with the version that "
            f"wrote it, or start over with --resume never"
        )
    if "state.json" not in entries:
        raise UserError(f"{path} is not a complete checkpoint ({MANIFEST} does not list state.json)")
    return entries


def load_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint; its tensors are read when asked for.

    Args:
        path: its folder.
        verify: hash every file first; off for a path that `find_checkpoint` has just verified.

    Raises:
        UserError: if `path` is not a complete, undamaged checkpoint.
    """
    if verify:
        verify_checkpoint(path)
    else:
        read_manifest(path)
    return Checkpoint(path, json.loads((path / "state.json").read_text(encoding="utf-8")))


def newest_complete(run_dir: Path, before: int | None = None) -> Path | None:
    """The newest folder with a manifest, unverified; with `before`, of a step below it."""
    complete = [path for path in _folders(run_dir) if (path / MANIFEST).is_file()]
    return next((path for path in reversed(complete) if before is None or path.name < f"step_{before:08d}"), None)


def point_to(checkpoint: Path) -> None:
    """Make `checkpoints/latest` name this complete checkpoint."""
    pointer = checkpoint.with_name(f".{LATEST}.tmp")
    pointer.write_text(checkpoint.name)
    fsync_path(pointer)
    pointer.replace(checkpoint.with_name(LATEST))
    fsync_path(checkpoint.parent)


def _newest_intact(run_dir: Path) -> Path | None:
    with contextlib.suppress(UserError, OSError):
        return find_checkpoint(run_dir, warn=lambda message: None)
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _folders(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / "checkpoints").glob("step_*") if path.is_dir())


def _retain(run_dir: Path, newest: Path, keep: int) -> None:
    """Drop the oldest complete checkpoints, and those of later steps than `newest`: the run went back behind them.

    Folders without a manifest do not count as kept, nor save an older one.
    """
    complete = [path for path in _folders(run_dir) if (path / MANIFEST).is_file()]
    later = [path for path in _folders(run_dir) if path.name > newest.name]
    for path in [*later, *[path for path in complete if path not in later][:-keep]]:
        shutil.rmtree(path, ignore_errors=True)
