"""Checkpoints that are complete or not there: written aside, hashed, fsynced, renamed.

    checkpoints/step_00000250/{student,ema_fast,ema_slow,optimizer}.safetensors, state.json, manifest.json

There is no pointer file: the newest folder whose manifest checks out is the latest. Nothing in it is a pickle, and
the frozen base is not stored.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scfm_core.data.webdataset import file_sha256
from scfm_core.errors import UserError

MANIFEST = "manifest.json"
Groups = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read into memory."""

    path: Path
    tensors: Groups
    state: dict[str, Any]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def save_checkpoint(
    run_dir: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write one checkpoint and drop the oldest beyond `keep`.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done.
        tensors: groups of tensors by name; one safetensors file each.
        state: everything else, as JSON.
        keep: how many complete checkpoints stay.

    Returns:
        the checkpoint's folder.

    Raises:
        UserError: if it cannot be written; earlier checkpoints are untouched.
    """
    final = checkpoint_path(run_dir, step)
    aside = final.with_name(f".{final.name}.tmp")
    try:
        for leftover in final.parent.glob(".step_*.tmp"):  # of a save that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)
        for group, members in tensors.items():
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in members.items()}
            save_file(contiguous, aside / f"{group}.safetensors")
        (aside / "state.json").write_text(json.dumps(state, indent=2))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(aside.iterdir())
        }
        (aside / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2))
        for path in (*aside.iterdir(), aside):
            _fsync(path)
        if final.exists():  # a damaged one that resuming has passed over
            shutil.rmtree(final)
        aside.rename(final)
        _fsync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        intact = None
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        with contextlib.suppress(UserError):
            intact = find_checkpoint(run_dir, warn=lambda message: None)
        raise UserError(
            f"the checkpoint of step {step} could not be written to {final.parent}: "
            f"{'the disk is full' if full else error}. "
            + (f"The last one, {intact.name}, is intact. " if intact else "")
            + f"{'Make room' if full else 'Mend that'} and run the same command again"
        ) from error
    _retain(run_dir, final, keep)
    return final


def find_checkpoint(run_dir: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint of a run that is complete and undamaged; each one passed over is named through `warn`.

    Returns:
        its folder; None if the run has no checkpoint at all.

    Raises:
        UserError: if there are checkpoints, but every one is damaged.
    """
    folders = _folders(run_dir)
    for path in reversed(folders):
        try:
            verify_checkpoint(path)
        except UserError as error:
            warn(f"{error}. Falling back to an earlier checkpoint")
            continue
        return path
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {run_dir / 'checkpoints'} is intact. Bring one back from a copy, "
            f"or start over with --resume never"
        )
    return None


def verify_checkpoint(path: Path) -> None:
    """Hold every file against the manifest.

    Raises:
        UserError: naming the file that is missing or differs.
    """
    for name, (size, digest) in _manifest(path).items():
        file = path / name
        if not file.is_file():
            raise UserError(f"checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != size or file_sha256(file) != digest:
            raise UserError(f"checkpoint {path} is damaged: {name} differs from the manifest's sha256")


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 of each file that belongs to the checkpoint."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a complete checkpoint ({MANIFEST}: {error!r})") from error
    if "state.json" not in entries:
        raise UserError(f"{path} is not a complete checkpoint ({MANIFEST} does not list state.json)")
    return entries


def load_checkpoint(path: Path, groups: Collection[str] | None = None, *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: its folder.
        groups: read these groups of tensors alone; None: all.
        verify: hash every file first; off for a path that `find_checkpoint` has just verified.

    Raises:
        UserError: if `path` is not a complete, undamaged checkpoint.
    """
    if verify:
        verify_checkpoint(path)
    names = [name for name in _manifest(path) if name.endswith(".safetensors")]
    if groups is not None:
        names = [name for name in names if name.removesuffix(".safetensors") in groups]
    tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in names}
    return Checkpoint(path, tensors, json.loads((path / "state.json").read_text()))


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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
