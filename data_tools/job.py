"""A job that writes shards with several processes and can be resumed; `encode` and `generate` use it.

All shards are planned first; process r of n writes every n-th one. For a finished shard there is a note in `.job/`,
with its manifest entry; a job that is started again skips it. The process that finds all notes writes the manifest, and
`job.json`, by which a late process sees that the job is finished.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scfm_core.data.schema import MANIFEST, Manifest, ShardEntry
from scfm_core.data.webdataset import TarWriter
from scfm_core.errors import UserError
from scfm_core.launched import launched_rank, launched_size

_JOB, _PARAMETERS, _DONE = ".job", "parameters.json", "job.json"


@dataclass(frozen=True)
class PlannedShard:
    """One shard to be written."""

    name: str
    items: Sequence[int]
    """Numbers of its samples."""


def plan_shards(groups: Iterable[Sequence[int]], samples_per_shard: int) -> list[PlannedShard]:
    """Cut groups of samples into shards of at most `samples_per_shard`; no shard mixes two groups."""
    parts = [group[at : at + samples_per_shard] for group in groups for at in range(0, len(group), samples_per_shard)]
    return [PlannedShard(f"shard-{number:06d}.tar", part) for number, part in enumerate(parts)]


def processes() -> tuple[int, int]:
    """Rank and world size: RANK and WORLD_SIZE of a launcher, or those of a Slurm array; else 0 and 1. A share is said."""
    if launched_size() > 1:
        _say_share("launch", launched_rank(), launched_size(), "RANK -u WORLD_SIZE")
        return launched_rank(), launched_size()
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        task, first, last, step, count = (
            int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", "0"), ("MIN", "0"), ("MAX", "0"), ("STEP", "1"), ("COUNT", "1"))
        )
        if (last - first) // step + 1 != count:
            raise UserError(
                "the tasks of a Slurm array share the shards only if the array is a range, for example --array=0-15"
            )
        if count > 1:
            _say_share("Slurm array", (task - first) // step, count, "SLURM_ARRAY_TASK_ID")
        return (task - first) // step, count
    return 0, 1


def _say_share(what: str, rank: int, count: int, variables: str) -> None:
    print(
        f"process {rank + 1} of {count} of a {what}: it makes 1/{count} of the shards, and all {count} need the same "
        f"arguments and output folder. To make everything in this process: env -u {variables} scfm ...",
        file=sys.stderr,
    )


class Job:
    """A folder of unfinished shards.

    Args:
        output: the folder; made if missing.
        parameters: everything that determines the content, as JSON values. A job is resumed only if they are the same.

    Raises:
        UserError: if the folder has another finished data set, or the shards of another job, or cannot be written.
    """

    finished: Manifest | None = None
    """The manifest, if this same job is finished already."""

    def __init__(self, output: Path, parameters: dict[str, Any]) -> None:
        self.output, self.notes = output, output / _JOB
        plain = json.loads(json.dumps(parameters))
        if (output / MANIFEST).exists():
            done = output / _DONE
            if not done.is_file() or json.loads(done.read_text()) != plain:
                raise UserError(f"{output} already holds a finished cache; choose another folder, or delete it")
            self.finished = self._read_manifest()
            return
        try:
            self.notes.mkdir(parents=True, exist_ok=True)
            path = self.notes / _PARAMETERS
            if not path.exists():
                temporary = path.with_suffix(f".{os.getpid()}.tmp")
                temporary.write_text(json.dumps(plain, indent=2))
                temporary.replace(path)
            existing = json.loads(path.read_text())
        except OSError as error:
            raise UserError(
                f"the cache could not be written to {output}: {error.strerror}. Choose another folder"
            ) from error
        different = [
            f"{key}: {existing.get(key)!r} before, {plain.get(key)!r} now"
            for key in sorted({*existing, *plain})
            if existing.get(key) != plain.get(key)
        ]
        if different:
            raise UserError(
                f"{output} has unfinished shards of another job:\n  "
                + "\n  ".join(different)
                + "\nStart with the same arguments, choose another folder, or delete it"
            )

    def run(
        self,
        shards: Sequence[PlannedShard],
        write: Callable[[PlannedShard, TarWriter], list[str]],
        draft: Manifest,
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
    ) -> Manifest | None:
        """Write this process's share of the shards.

        Args:
            shards: all shards, the same on every process.
            write: writes the samples of one shard; returns a line for each sample that it left out.
            draft: the manifest without its shards.
            rank, world_size: of this process.
            progress: shows a progress bar; called with (shards, their number), it returns the shards.

        Returns:
            the manifest, if all shards are finished now; None while other processes are working.

        Raises:
            UserError: if the disk is full; the shards written so far are kept.
        """
        mine = [shard for shard in shards[rank::world_size] if not self._is_done(shard)]
        try:
            for shard in progress(mine, len(mine)):
                writer = TarWriter(self.output / shard.name)
                with writer:
                    left_out = write(shard, writer)
                self._write(self._note(shard), {"entry": asdict(writer.entry), "left_out": left_out})
            return self._finish(shards, draft)
        except OSError as error:
            raise UserError(
                f"the cache could not be written to {self.output}: {error.strerror or error}. Fix this and run again: "
                f"finished shards are kept"
            ) from error

    def _note(self, shard: PlannedShard) -> Path:
        return self.notes / f"{shard.name}.json"

    def _is_done(self, shard: PlannedShard) -> bool:
        try:
            entry = json.loads(self._note(shard).read_text())["entry"]
            return bool((self.output / shard.name).stat().st_size == entry["bytes"])
        except FileNotFoundError:
            return False

    def _read_manifest(self) -> Manifest:
        path = self.output / MANIFEST
        return Manifest.parse(path.read_bytes(), str(path))

    def _write(self, path: Path, content: Any) -> None:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content))
        temporary.replace(path)

    def _finish(self, shards: Sequence[PlannedShard], draft: Manifest) -> Manifest | None:
        try:
            notes = [json.loads(self._note(shard).read_text()) for shard in shards]
        except FileNotFoundError:
            if (self.output / MANIFEST).exists():  # another process has finished the job
                return self._read_manifest()
            return None
        entries = tuple(
            ShardEntry(**{**note["entry"], "sizes": tuple(map(tuple, note["entry"]["sizes"]))}) for note in notes
        )
        left_out = [line for note in notes for line in note["left_out"]]
        if left_out:
            temporary = self.output / f"left_out.{os.getpid()}.tmp"
            temporary.write_text("\n".join(left_out) + "\n")
            temporary.replace(self.output / "left_out.txt")
        manifest = Manifest(**{**draft.__dict__, "shards": tuple(entry for entry in entries if entry.samples)})
        if not manifest.samples:
            raise UserError(f"{self.output}: no sample is valid; {self.output / 'left_out.txt'} has the reasons")
        with contextlib.suppress(FileNotFoundError):  # another process has done the following already
            self._write(self.output / _DONE, json.loads((self.notes / _PARAMETERS).read_text()))
        manifest.write(self.output / MANIFEST)
        shutil.rmtree(self.notes, ignore_errors=True)
        return manifest
