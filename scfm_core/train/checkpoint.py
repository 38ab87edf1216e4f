"""Atomic checkpoints: all ranks write and hash files in a hidden folder, which is fsynced and then renamed.

    checkpoints/step_00000250/   dcp/ (PyTorch's distributed checkpoint), under DeepSpeed also its own *_states.pt files,
                                 state.json (counters, cursor, fingerprints, configuration), manifest.json (sha256 of all)
    checkpoints/latest           the name of the newest checkpoint, as DeepSpeed's tools expect it

A folder gets its final name when it is complete on all ranks, and `latest` is updated after that. So neither of them ever
names a partial checkpoint. The frozen base is not stored.
"""

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from scfm_core.distributed.dcp import files_of_dcp
from scfm_core.distributed.reader import DCP_FOLDER, Reader, open_reader
from scfm_core.distributed.world import World
from scfm_core.errors import UserError, agreed_error
from scfm_core.files import FileEntry, HashedFile, Written, disk_problem, file_sha256, fsync_path, is_disk_failure
from scfm_core.train.run_dir import (
    LATEST,
    MANIFEST,
    checkpoint_folders,
    checkpoint_path,
    copies,
    leftovers,
    saved_step,
    step_of,
)
from scfm_core.train.run_dir import (
    newest_complete as newest_complete,
)

FORMAT = 3
_FAILURES = (OSError, RuntimeError, CheckpointException)

_said: set[tuple[Path | str, ...]] = set()
"""Which copies of checkpoints were named already."""

Write = Callable[[Path, World], Callable[[], Written]]
"""Starts to write tensors into a folder, on every rank. It returns a function that waits, and returns this rank's files."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its state, and a reader of its tensors."""

    path: Path
    state: dict[str, Any]

    @cached_property
    def reader(self) -> Reader:
        """Reads any range of any tensor from disk; UserError if a file is invalid."""
        return open_reader(self.path, self.state["kind"], self.state["shapes"])


class CheckpointWriter:
    """Writes the checkpoints of a run; every rank has a writer, and calls it at the same steps.

    Args:
        run_dir: the run's folder, on a file system that all ranks share.
        keep: how many complete checkpoints are kept.
        world: the processes.
        on_thread: copy tensors to host memory and write them while training continues.
    """

    def __init__(self, run_dir: Path, keep: int, world: World | None = None, *, on_thread: bool = False) -> None:
        self._run_dir, self._keep = run_dir, keep
        self._steps_world = world or World()
        """The group that the steps use."""
        self._world = self._steps_world.second_group() if on_thread else self._steps_world
        self._thread = ThreadPoolExecutor(1, "scfm checkpoint") if on_thread else None
        self._pending: Future[None] | None = None

    def save(self, step: int, write: Write, state: Mapping[str, Any], *, needed_before: int | None = None) -> Path:
        """Write the checkpoint after `step` steps, and delete the oldest ones beyond `keep`.

        Args:
            step: the number of steps.
            write: writes its files.
            state: for `state.json`.
            needed_before: the newest checkpoint of an earlier step than this is not deleted.

        Returns:
            the checkpoint's folder; with `on_thread` it appears later, `wait` waits for it.

        Raises:
            UserError: on every rank, if this checkpoint or the previous one could not be written; earlier ones remain.
        """
        self.wait()
        final = checkpoint_path(self._run_dir, step)
        partial = final.with_name(f".{final.name}.tmp")
        with self._failing_together(partial):
            if self._world.is_main:
                for leftover in leftovers(self._run_dir):
                    shutil.rmtree(leftover, ignore_errors=True)
                partial.mkdir(parents=True)
        # Not over the group of the writing, which the other ranks' threads may already use.
        with self._failing_together(partial, self._steps_world):
            written = write(partial, self._world)
        if self._thread is None:
            self._complete(partial, written, state, needed_before)
        else:
            self._pending = self._thread.submit(self._complete, partial, written, state, needed_before)
        return final

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete; raises the errors of `save`."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _complete(
        self, partial: Path, written: Callable[[], Written], state: Mapping[str, Any], needed_before: int | None
    ) -> None:
        final = partial.with_name(partial.name.removeprefix(".").removesuffix(".tmp"))
        files: Written = {}
        with self._failing_together(partial):
            files = written()
        by_rank = self._world.gather(files)
        with self._failing_together(partial):
            if self._world.is_main:
                merged = {path: entry for part in by_rank for path, entry in part.items()}
                merged[partial / "state.json"] = _write_state(partial / "state.json", state)
                _check_complete(partial, merged, by_rank, state["kind"])
                needed = None if needed_before is None else newest_complete(self._run_dir, before=needed_before)
                self._commit(partial, final, _manifest(partial, state["step"], merged))
                _delete_superseded(self._run_dir, final, self._keep, needed)

    def _commit(self, partial: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in (partial / MANIFEST, *[p for p in partial.rglob("*") if p.is_dir()], partial):
            fsync_path(path)
        replaced = final.with_name(f".{final.name}.old.tmp")
        if final.is_symlink() or saved_step(final) not in (None, step_of(final)):  # not of this run
            final.rename(_free_name(final))
        elif final.exists():  # damaged and skipped at resuming, or later than the step that the run went back to
            final.with_name(LATEST).unlink(missing_ok=True)
            final.rename(replaced)
        partial.rename(final)
        set_latest(final)
        shutil.rmtree(replaced, ignore_errors=True)

    @contextlib.contextmanager
    def _failing_together(self, partial: Path, world: World | None = None) -> Any:
        """Raise a failure of one rank on all ranks, with a message that names the rank and the cause."""
        failure, world = None, world or self._world
        try:
            yield
        except _FAILURES as error:
            failure = _cause(error)
            if not isinstance(failure, Exception):  # Ctrl-C, which DCP reports as a failed write
                raise failure from error
        try:
            world.agree(None if failure is None else _explain(failure, partial))
        except UserError as joint:
            if world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            intact = world.from_main(_newest_intact(self._run_dir) if world.is_main else None)
            message = f"{joint}. " + (f"The last one, {intact.name}, is intact. " if intact else "")
            last = UserError(f"{message}Fix this and run the same command again")
            last.agreed = joint.agreed
            raise last from failure


def _write_state(path: Path, state: Mapping[str, Any]) -> FileEntry:
    with HashedFile(path) as file:
        file.write(json.dumps(state, indent=2).encode())
    return file.entry


def _check_complete(partial: Path, files: Written, by_rank: Sequence[Written], kind: str) -> None:
    """Every file that the checkpoint needs was written by some rank.

    The folder is not listed: on NFS a rank may not see yet what another machine has written.
    """
    missing = sorted(path.name for path in files_of_dcp(partial / DCP_FOLDER) - files.keys())
    if kind == "zero":
        missing += [
            f"the files of rank {rank}"
            for rank, own in enumerate(by_rank)
            if not any(path.parent == partial for path in own)
        ]
    if missing:
        raise RuntimeError(f"{', '.join(missing)}: not written")


def _manifest(partial: Path, step: int, files: Written) -> dict[str, Any]:
    entries = {
        path.relative_to(partial).as_posix(): {"bytes": size, "sha256": digest}
        for path, (size, digest) in sorted(files.items())
    }
    return {"format": FORMAT, "step": step, "files": entries}


def _cause(error: BaseException) -> BaseException:
    """The failure itself, taken from DCP's summary of all ranks' failures."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _explain(error: BaseException, partial: Path) -> UserError:
    """Why a save failed, as a message for the user."""
    text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    try:
        free: float = shutil.disk_usage(partial if partial.exists() else partial.parent).free
    except OSError:
        free = float("inf")
    # torch's own writer reports a full disk as "file write failed", without an errno.
    full = (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or free < 2**20
    )
    step = partial.name.removeprefix(".").removesuffix(".tmp")
    reason = f"{disk_problem(error)} ({text})" if is_disk_failure(error) else text
    if full:
        reason = f"the disk is full ({text}); make room"
    return UserError(f"the checkpoint {step} could not be written to {partial.parent}: {reason}")


def find_checkpoint(run_dir: Path, warn: Callable[[str], None] = print, world: World | None = None) -> Path | None:
    """The newest checkpoint of a run that is complete and undamaged; `warn` is called for each checkpoint that is skipped.

    Returns:
        its folder, the same on every rank; None if the run has no checkpoint.

    Raises:
        UserError: if there are checkpoints, but all are damaged, or only copies under other names.
    """
    world = world or World()
    folders, others = world.from_main((checkpoint_folders(run_dir), [path.name for path in copies(run_dir)]))
    if others and world.is_main and (said := (run_dir.absolute(), *others)) not in _said:
        _said.add(said)
        warn(f"not used: {', '.join(others)} (copies of checkpoints: runs neither resume from them nor delete them)")
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
            f"none of the {len(folders)} checkpoints in {run_dir / 'checkpoints'} is intact. Restore one from a backup, "
            f"or start over with --resume never"
        )
    if others:
        raise agreed_error(
            f"{run_dir / 'checkpoints'} has only copies of checkpoints ({', '.join(others)}), none named step_XXXXXXXX as its "
            f"manifest says. Choose one with --resume PATH, or start over with --resume never"
        )
    return None


def verify_checkpoint(path: Path, world: World | None = None) -> None:
    """Compare every file with the manifest; the ranks share the work.

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
            f"{path} has checkpoint format {written}; this version of scfm reads {FORMAT}. Continue with the version that "
            f"wrote it, or start over with --resume never"
        )
    if "state.json" not in entries:
        raise UserError(f"{path} is not a complete checkpoint ({MANIFEST} does not list state.json)")
    return entries


def load_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint; its tensors are read on demand.

    Args:
        path: its folder.
        verify: hash every file first; False for a path that `find_checkpoint` has just verified.

    Raises:
        UserError: if `path` is not a complete, undamaged checkpoint.
    """
    if verify:
        verify_checkpoint(path)
    else:
        read_manifest(path)
    return Checkpoint(path, json.loads((path / "state.json").read_text(encoding="utf-8")))


def set_latest(checkpoint: Path) -> None:
    """Write the name of this complete checkpoint to `checkpoints/latest`."""
    pointer = checkpoint.with_name(f".{LATEST}.tmp")
    pointer.write_text(checkpoint.name, encoding="utf-8")
    fsync_path(pointer)
    pointer.replace(checkpoint.with_name(LATEST))
    fsync_path(checkpoint.parent)


def _newest_intact(run_dir: Path) -> Path | None:
    with contextlib.suppress(UserError, OSError):
        return find_checkpoint(run_dir, warn=lambda message: None)
    return None


def _free_name(path: Path) -> Path:
    """A name beside `path` that no file has."""
    number = 1
    while (free := path.with_name(f"{path.name}_copy{number}")).exists():
        number += 1
    return free


def _delete_superseded(run_dir: Path, newest: Path, keep: int, needed: Path | None) -> None:
    """Delete the oldest complete checkpoints beyond `keep`, but not `needed`, and those of later steps than `newest`.

    Checkpoints of later steps are from before the run went back to an earlier step. Folders without a manifest do not count.
    """
    complete = [path for path in checkpoint_folders(run_dir) if (path / MANIFEST).is_file()]
    later = [path for path in checkpoint_folders(run_dir) if step_of(path) > step_of(newest)]
    for path in [*later, *[path for path in complete if path not in later][:-keep]]:
        if path != needed:
            shutil.rmtree(path, ignore_errors=True)
