"""Shards written by several processes, resumable: what `encode` and `generate` have in common.

The plan of shards is fixed beforehand; process r of n writes every n-th. A finished shard leaves a note of its manifest
entry in `.job/`; a job that is started again skips what has one. Whoever finds the last note writes the manifest, and
`job.json`, by which a process that comes late sees that its job is done.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scfm_core.data.schema import MANIFEST, Manifest, ShardEntry
from scfm_core.data.webdataset import TarWriter
from scfm_core.errors import UserError

_JOB, _PARAMETERS, _DONE = ".job", "parameters.json", "job.json"


@dataclass(frozen=True)
class Piece:
    """One shard to be written."""

    name: str
    items: Sequence[int]


def cut(groups: Iterable[Sequence[int]], samples_per_shard: int) -> list[Piece]:
    """Shards of at most so many items, none of which mixes two groups."""
    parts = [group[at : at + samples_per_shard] for group in groups for at in range(0, len(group), samples_per_shard)]
    return [Piece(f"shard-{number:06d}.tar", part) for number, part in enumerate(parts)]


def processes() -> tuple[int, int]:
    """Number of this process and of all: a launcher's RANK and WORLD_SIZE, or those of a Slurm array."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        task, first, last, step, count = (
            int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", "0"), ("MIN", "0"), ("MAX", "0"), ("STEP", "1"), ("COUNT", "1"))
        )
        if (last - first) // step + 1 != count:
            raise UserError("a Slurm array must be a range, such as --array=0-15, to share the shards among its tasks")
        return (task - first) // step, count
    return 0, 1


class Job:
    """A folder of shards in the making.

    Args:
        output: the folder; made if missing.
        parameters: what decides the content; a job is gone on with only if they are the same.

    Raises:
        UserError: if the folder holds another finished data set, or the shards of another job, or cannot be written.
    """

    finished: Manifest | None = None
    """The manifest, if this very job was done before."""

    def __init__(self, output: Path, parameters: dict[str, Any]) -> None:
        self.output, self.notes = output, output / _JOB
        plain = json.loads(json.dumps(parameters))
        if (output / MANIFEST).exists():
            done = output / _DONE
            if not done.is_file() or json.loads(done.read_text()) != plain:
                raise UserError(f"{output} already holds a finished cache; choose another folder, or delete it")
            self.finished = self._manifest()
            return
        try:
            self.notes.mkdir(parents=True, exist_ok=True)
            path = self.notes / _PARAMETERS
            if not path.exists():
                aside = path.with_suffix(f".{os.getpid()}.tmp")
                aside.write_text(json.dumps(plain, indent=2))
                aside.replace(path)
            there = json.loads(path.read_text())
        except OSError as error:
            raise UserError(
                f"the cache could not be written to {output}: {error.strerror}. Choose another folder"
            ) from error
        different = [
            f"{key}: {there.get(key)!r} there, {plain.get(key)!r} now"
            for key in sorted({*there, *plain})
            if there.get(key) != plain.get(key)
        ]
        if different:
            raise UserError(
                f"{output} holds unfinished shards of another job:\n  "
                + "\n  ".join(different)
                + "\nStart with the same arguments, choose another folder, or delete it"
            )

    def run(
        self,
        pieces: Sequence[Piece],
        write: Callable[[Piece, TarWriter], list[str]],
        draft: Manifest,
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
    ) -> Manifest | None:
        """Write this process's share of the shards.

        Args:
            pieces: all shards, the same on every process.
            write: fills one shard; returns the samples that it left out, and why.
            draft: the manifest but for its shards.
            rank, world_size: this process, of how many.
            progress: wraps the shards to show a bar; called with (shards, their number).

        Returns:
            the manifest, if all shards are there now; None while other processes are at work.

        Raises:
            UserError: if the disk is full; the shards written so far are kept.
        """
        mine = [piece for piece in pieces[rank::world_size] if not self._is_done(piece)]
        try:
            for piece in progress(mine, len(mine)):
                writer = TarWriter(self.output / piece.name)
                with writer:
                    left_out = write(piece, writer)
                self._write(self._note(piece), {"entry": asdict(writer.entry), "left_out": left_out})
            return self._finish(pieces, draft)
        except OSError as error:
            raise UserError(
                f"the cache could not be written to {self.output}: {error.strerror or error}. Mend that and run again: "
                f"finished shards are kept"
            ) from error

    def _note(self, piece: Piece) -> Path:
        return self.notes / f"{piece.name}.json"

    def _is_done(self, piece: Piece) -> bool:
        try:
            entry = json.loads(self._note(piece).read_text())["entry"]
            return bool((self.output / piece.name).stat().st_size == entry["bytes"])
        except FileNotFoundError:
            return False

    def _manifest(self) -> Manifest:
        path = self.output / MANIFEST
        return Manifest.parse(path.read_bytes(), str(path))

    def _write(self, path: Path, content: Any) -> None:
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(json.dumps(content))
        aside.replace(path)

    def _finish(self, pieces: Sequence[Piece], draft: Manifest) -> Manifest | None:
        try:
            notes = [json.loads(self._note(piece).read_text()) for piece in pieces]
        except FileNotFoundError:
            if (self.output / MANIFEST).exists():  # another process was faster
                return self._manifest()
            return None
        entries = tuple(
            ShardEntry(**{**note["entry"], "sizes": tuple(map(tuple, note["entry"]["sizes"]))}) for note in notes
        )
        left_out = [line for note in notes for line in note["left_out"]]
        if left_out:
            aside = self.output / f"left_out.{os.getpid()}.tmp"
            aside.write_text("\n".join(left_out) + "\n")
            aside.replace(self.output / "left_out.txt")
        manifest = Manifest(**{**draft.__dict__, "shards": tuple(entry for entry in entries if entry.samples)})
        if not manifest.samples:
            raise UserError(f"{self.output}: no sample could be used; {self.output / 'left_out.txt'} says why")
        with contextlib.suppress(FileNotFoundError):  # another process did all three
            self._write(self.output / _DONE, json.loads((self.notes / _PARAMETERS).read_text()))
        manifest.write(self.output / MANIFEST)
        shutil.rmtree(self.notes, ignore_errors=True)
        return manifest
