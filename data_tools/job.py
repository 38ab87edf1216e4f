"""A job that writes shards with several processes and can be resumed; `encode` and `generate` use it.

All shards are planned first; process r of n writes every n-th one. A finished shard has a note in `.job/` with its
manifest entry, an unfinished one has a note of its last complete batch. So a job that is started again loses at most a
batch. The process that finds all shards finished writes the manifest, and `job.json`, by which a late process sees that
the job is finished.
"""

import contextlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scfm_core.data.members import table_of, write_members
from scfm_core.data.schema import JOB, MANIFEST, Manifest, ShardEntry, Size
from scfm_core.data.webdataset import TarProgress, TarWriter
from scfm_core.errors import UserError
from scfm_core.files import fsync_path, renamed_at_end
from scfm_core.launched import launched_rank, launched_size
from scfm_core.models.fingerprint import differing_files

Progress = Callable[[Iterable[Any], int], Iterable[Any]]

_PARAMETERS, _DONE = "parameters.json", "job.json"
LEFT_OUT = "left_out.txt"
"""Has a line for each image that was left out."""


@dataclass(frozen=True)
class PlannedShard:
    """One shard to be written."""

    name: str
    items: Sequence[int]
    """Numbers of its samples."""


@dataclass
class Made:
    """The samples of one batch."""

    samples: list[tuple[str, dict[str, bytes], Size]] = field(default_factory=list)
    """Key, fields, and height and width in pixels."""
    left_out: list[str] = field(default_factory=list)
    """A line for each item that is not valid."""
    counts: Counter[str] = field(default_factory=Counter)
    """What was changed in the samples, in words, and how often."""


def plan_shards(groups: Iterable[Sequence[int]], samples_per_shard: int) -> list[PlannedShard]:
    """Cut groups of samples into shards of at most `samples_per_shard`; no shard mixes two groups."""
    parts = [group[at : at + samples_per_shard] for group in groups for at in range(0, len(group), samples_per_shard)]
    return [PlannedShard(f"shard-{number:06d}.tar", part) for number, part in enumerate(parts)]


def processes(work: str = "shards") -> tuple[int, int]:
    """Rank and world size: RANK and WORLD_SIZE of a launcher, or those of a Slurm array; else 0 and 1. It prints its share of `work`."""
    if launched_size() > 1:
        _say_share("launch", work, launched_rank(), launched_size(), "RANK -u WORLD_SIZE")
        return launched_rank(), launched_size()
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        task, first, last, step, count = (
            int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", "0"), ("MIN", "0"), ("MAX", "0"), ("STEP", "1"), ("COUNT", "1"))
        )
        if (last - first) // step + 1 != count:
            raise UserError(
                f"the tasks of a Slurm array share the {work} only if the array is a range, for example --array=0-15"
            )
        if count > 1:
            _say_share("Slurm array", work, (task - first) // step, count, "SLURM_ARRAY_TASK_ID")
        return (task - first) // step, count
    return 0, 1


def _say_share(what: str, work: str, rank: int, count: int, variables: str) -> None:
    print(
        f"process {rank + 1} of {count} of a {what}: it makes 1/{count} of the {work}, and all {count} need the same "
        f"arguments and output folder. To make everything in this process: env -u {variables} scfm ...",
        file=sys.stderr,
    )


def shard_size_of(output: Path) -> int | None:
    """`samples_per_shard` of the job that was begun or finished in a folder; None if there is none, or it cannot be read."""
    with contextlib.suppress(OSError):  # which `Job` reports
        begun = _read_json(output / JOB / _PARAMETERS)
        found = (_read_json(output / _DONE) or {}).get("parameters") if begun is None else begun
        size = found.get("samples_per_shard") if isinstance(found, dict) else None
        return size if isinstance(size, int) and size > 0 else None
    return None


class Job:
    """A folder of unfinished shards.

    Args:
        output: the folder; made if missing.
        parameters: everything that determines the content beside the data, as JSON values. A job is resumed only if they
            are the same.
        data: fingerprint of the data. An unfinished job may be resumed with other data: `run` compares each shard's.

    Raises:
        UserError: if the folder has another finished data set, or the shards of another job, or cannot be written.
    """

    finished: Manifest | None = None
    """The manifest, if this same job is finished already."""

    def __init__(self, output: Path, parameters: dict[str, Any], data: str = "") -> None:
        self.output, self.notes, self.data = output, output / JOB, data
        self.counts: Counter[str] = Counter()
        """`Made.counts` of all samples, once the job is finished."""
        plain = json.loads(json.dumps(parameters))
        if (output / MANIFEST).exists():
            done = _read_json(output / _DONE) or {}
            _refuse_others(done.get("parameters"), plain, f"{output} already holds a finished cache")
            if done.get("data") != data:
                raise UserError(
                    f"{output} already holds a finished cache of other images or captions: they have changed since. Choose another "
                    f"folder, or delete it"
                )
            self.finished, self.counts = self._read_manifest(), Counter(done.get("counts", {}))
            return
        if not self.notes.exists() and (others := next(output.glob("shard-*.tar"), None)) is not None:
            raise UserError(f"{output} holds shards of another tool, such as {others.name}; choose another folder")
        try:
            self.notes.mkdir(parents=True, exist_ok=True)
            path = self.notes / _PARAMETERS
            if not path.exists():
                self._write(path, plain)
        except OSError as error:
            raise UserError(
                f"the cache could not be written to {output}: {error.strerror}. Choose another folder"
            ) from error
        _refuse_others(_read_json(path), plain, f"{output} has unfinished shards of another job")

    def run(
        self,
        shards: Sequence[PlannedShard],
        make: Callable[[Sequence[int]], Made],
        draft: Manifest,
        *,
        batch_size: int,
        mark: Callable[[Sequence[int]], str] = lambda items: "",
        max_left_out: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        progress: Progress = lambda items, total: items,
    ) -> Manifest | None:
        """Write this process's share of the shards.

        Args:
            shards: all shards, the same on every process.
            make: makes the samples of a batch of items.
            draft: the manifest without its shards.
            batch_size: items of a batch.
            mark: hash of the data of items. What is written of other data, which were changed since, is written again.
            max_left_out: tolerated share of items that are left out.
            rank, world_size: of this process.
            progress: shows a progress bar; called with (items, their number), it returns the items.

        Returns:
            the manifest, if all shards are finished now; None while other processes are working.

        Raises:
            UserError: if the disk is full, or too many items are left out; the batches written so far are kept.
        """
        self._mark = mark
        mine = [shard for shard in shards[rank::world_size] if not self._is_done(shard)]
        total = sum(len(shard.items) for shard in shards)
        try:
            remaining = sum(len(shard.items) - self._started(shard)[1] for shard in mine)
            left_out: list[str] = []
            with contextlib.closing(self._work(mine, make, batch_size)) as work:
                for invalid in progress(work, remaining):
                    left_out += invalid
                    self._check_left_out(left_out, max_left_out, total)
            return self._finish(shards, draft, max_left_out)
        except OSError as error:
            raise UserError(
                f"the cache could not be written to {self.output}: {error.strerror or error}. Fix this and run again: "
                f"what is finished is kept"
            ) from error

    def _work(
        self, shards: Sequence[PlannedShard], make: Callable[[Sequence[int]], Made], batch_size: int
    ) -> Generator[list[str]]:
        """Write the shards; yields once for each item: a list of the lines of those of its batch that are left out."""
        for shard in shards:
            before, done, so_far = self._started(shard)
            with TarWriter(self.output / shard.name, before) as writer:
                if not writer.resumed:
                    done, so_far = 0, Made()
                while done < len(shard.items):
                    batch = shard.items[done : done + batch_size]
                    made = make(batch)
                    for sample in made.samples:
                        writer.write(*sample)
                    done += len(batch)
                    so_far.left_out += made.left_out
                    so_far.counts += made.counts
                    if done < len(shard.items):
                        # Not flushed to the disk, which takes long on a network: a kill loses nothing, and after a
                        # power failure the hash shows whether the samples are there.
                        note = {"tar": asdict(writer.progress()), "items": done, **_plain(so_far)}
                        self._write(
                            self._note(shard, "part"), note | {"mark": self._mark(shard.items[:done])}, flush=False
                        )
                    yield made.left_out
                    yield from ([] for _ in batch[1:])
            note = {"entry": asdict(writer.entry), **_plain(so_far), "mark": self._mark(shard.items)}
            if writer.entry.samples:
                self._note(shard, "members").write_bytes(table_of(writer.path))
            self._write(self._note(shard), note)
            self._note(shard, "part").unlink(missing_ok=True)

    def _started(self, shard: PlannedShard) -> tuple[TarProgress | None, int, Made]:
        """Of a shard that a killed process began: what is written, of how many items, and what is to be said of them."""
        note = _read_json(self._note(shard, "part"))
        if note is None or note["mark"] != self._mark(shard.items[: note["items"]]):
            return None, 0, Made()
        tar = TarProgress(**{**note["tar"], "sizes": tuple(map(tuple, note["tar"]["sizes"]))})
        return tar, note["items"], Made([], note["left_out"], Counter(note["counts"]))

    def _note(self, shard: PlannedShard, kind: str = "json") -> Path:
        return self.notes / f"{shard.name}.{kind}"

    def _finished_note(self, shard: PlannedShard) -> Any:
        note = _read_json(self._note(shard))
        return note if note is not None and note["mark"] == self._mark(shard.items) else None

    def _is_done(self, shard: PlannedShard) -> bool:
        note, path = self._finished_note(shard), self.output / shard.name
        return note is not None and path.is_file() and bool(path.stat().st_size == note["entry"]["bytes"])

    def _read_manifest(self) -> Manifest:
        path = self.output / MANIFEST
        return Manifest.parse(path.read_bytes(), str(path))

    def _write(self, path: Path, content: Any, *, flush: bool = True) -> None:
        with renamed_at_end(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
            if flush:
                fsync_path(temporary)

    def _finish(self, shards: Sequence[PlannedShard], draft: Manifest, max_left_out: float) -> Manifest | None:
        notes = [note for shard in shards if (note := self._finished_note(shard)) is not None]
        if len(notes) < len(shards):
            if (self.output / MANIFEST).exists():  # another process has finished the job
                self.counts = Counter((_read_json(self.output / _DONE) or {}).get("counts", {}))
                return self._read_manifest()
            return None
        entries = tuple(
            ShardEntry(**{**note["entry"], "sizes": tuple(map(tuple, note["entry"]["sizes"]))}) for note in notes
        )
        self.counts = sum((Counter(note["counts"]) for note in notes), Counter())
        left_out = [line for note in notes for line in note["left_out"]]
        self._check_left_out(left_out, max_left_out, sum(len(shard.items) for shard in shards))
        self._list_left_out(left_out)
        manifest = Manifest(**{**draft.__dict__, "shards": tuple(entry for entry in entries if entry.samples)})
        parameters = _read_json(self.notes / _PARAMETERS)
        if parameters is not None:  # else another process has done the following already
            self._write(self.output / _DONE, {"parameters": parameters, "data": self.data, "counts": self.counts})
        self._write_members(manifest)
        manifest.write(self.output / MANIFEST)
        written = {path.name.removesuffix(".json") for path in self.notes.glob("*.tar.json")}
        for name in written - {shard.name for shard in manifest.shards}:  # of data that are gone, or without a sample
            (self.output / name).unlink(missing_ok=True)
        shutil.rmtree(self.notes, ignore_errors=True)
        return manifest

    def _write_members(self, manifest: Manifest) -> None:
        """Record where the members of the tars are, from the notes."""
        tables = {}
        for entry in manifest.shards:
            try:
                tables[str(entry.sha256)] = (self.notes / f"{entry.name}.members").read_bytes()
            except FileNotFoundError:  # another process has finished the job; or the note is of an earlier release
                return
        write_members(self.output / MANIFEST, tables)

    def _check_left_out(self, lines: list[str], tolerated: float, total: int) -> None:
        """UserError if more samples are left out than are tolerated."""
        if len(lines) > tolerated * total:
            self._list_left_out(lines)
            raise UserError(
                f"{len(lines)} of {total} samples are invalid, data.max_bad_fraction tolerates {tolerated:g}. "
                f"{self.output / LEFT_OUT} has the reasons, for example: {lines[0].removeprefix('data: ')}"
            )

    def _list_left_out(self, lines: list[str]) -> None:
        if not lines:
            (self.output / LEFT_OUT).unlink(missing_ok=True)  # of an earlier start, before the images were mended
            return
        with renamed_at_end(self.output / LEFT_OUT) as temporary:
            # The names of files may have bytes that are not UTF-8.
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


def _plain(made: Made) -> dict[str, Any]:
    return {"left_out": made.left_out, "counts": made.counts}


def _read_json(path: Path) -> Any:
    """The content of a small JSON file; None if it is missing, or a power failure left it damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _refuse_others(existing: Any, wanted: dict[str, Any], what: str) -> None:
    """UserError unless the parameters of a job are the wanted ones; it names those that differ."""
    if existing == wanted:
        return
    if not isinstance(existing, dict):
        raise UserError(f"{what}, and its parameters are unknown; choose another folder, or delete it")
    different = []
    for key in sorted({*existing, *wanted}):
        before, now = existing.get(key), wanted.get(key)
        if before != now:
            is_model = key in ("encoder", "network")  # fingerprints
            different.append(
                f"{key}: {differing_files(before, now) if is_model else f'{before!r} before, {now!r} now'}"
            )
    lines = "\n  ".join(different)
    raise UserError(f"{what}:\n  {lines}\nStart with the same arguments, choose another folder, or delete it")
