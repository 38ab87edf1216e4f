"""The shards of a manifest, as arrays: the index of a data set.

`manifest.json` is for people and other tools. Its text grows with the samples: of ten million images of sizes of their own
it has 200 MB, and as Python objects 2 GB. So the first process of a machine parses it and writes the arrays to `data.cache.dir`,
under the hash of the text (`manifest.py`); all processes map that file (`machine.py`).

To add arrays: `ShardIndex.collect` makes them, and `VERSION`, which is part of the file's name, is raised. An array with a row for
each shard is read as `index.arrays[name][number]`. One with several rows for each shard belongs to a group: `GROUPS` names its
arrays, `<group>_ends` [shards] has the end of each shard's rows, and `index.rows(name, number)` are the rows of one shard. The
places of the members of tars are not here but in `members.py`.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from scfm_core.data.machine import Array, Arrays

VERSION = 2
_HASH = re.compile("[0-9a-f]{64}")
GROUPS = {"names": ("name",), "runs": ("run_size", "run_samples")}
"""Arrays with several rows for each shard, by group."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard in a manifest."""

    name: str
    """Path relative to the data set's folder."""
    samples: int
    bytes: int
    sha256: str | None
    """In hex. None: the index of another tool does not have it, and only the size is compared."""
    sizes: tuple[tuple[int, int, int], ...] = ()
    """Runs of (height, width, samples), in pixels, in the order of the samples; empty if they are unknown."""

    def checked(self) -> "ShardEntry":
        """The entry itself; raises ValueError or TypeError if a value is invalid."""
        for value, kind in ((self.name, str), (self.samples, int), (self.bytes, int)):
            if type(value) is not kind:
                raise TypeError(f"{value!r} of shard {self.name!r} is not of type {kind.__name__}")
        if self.sha256 is not None and (type(self.sha256) is not str or not _HASH.fullmatch(self.sha256)):
            raise ValueError(f"the sha256 of shard {self.name} is {self.sha256!r}")
        if not 0 <= self.samples <= self.bytes:  # a sample has at least one byte
            raise ValueError(f"shard {self.name} has {self.samples} samples in {self.bytes} bytes")
        runs = [type(number) is int and number > 0 for run in self.sizes for number in run]
        if self.sizes and (not all(runs) or sum(count for _, _, count in self.sizes) != self.samples):
            raise ValueError(f"the sizes of shard {self.name} do not add up to {self.samples} samples")
        return self


class ShardIndex(Sequence[ShardEntry]):
    """The shards of a manifest. An item is a `ShardEntry`, which is made when it is asked for.

    The arrays: `samples`, `bytes` int64 [shards]; `sha256` uint8 [shards, 32] and `has_sha256` uint8 [shards]; `name` uint8, UTF-8;
    `sizes` int32 [distinct sizes, 2] in pixels; of each run of samples of one size `run_size` int32 (a row of `sizes`) and
    `run_samples` int32.
    """

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self.samples: Array = arrays["samples"]
        self.bytes: Array = arrays["bytes"]

    @classmethod
    def of(cls, entries: Iterable[ShardEntry]) -> "ShardIndex":
        """The index of some entries."""
        if isinstance(entries, ShardIndex):
            return entries
        return cls.collect((entry, np.array(entry.sizes, np.int64).reshape(-1, 3)) for entry in entries)

    @classmethod
    def collect(cls, entries: Iterable[tuple[ShardEntry, Array]]) -> "ShardIndex":
        """The index of entries that are read one by one: of each the entry, and its runs of sizes, int64 [runs, 3].

        Raises:
            OverflowError: if a number is too large.
        """
        numbers: list[tuple[int, int]] = []
        digests, names, codes, counts = [], [], [], []
        for entry, runs in entries:
            if runs.size and runs.max() > np.iinfo(np.int32).max:
                raise OverflowError(f"a size of shard {entry.name} is {runs.max()}")
            numbers.append((entry.samples, entry.bytes))
            digests.append(entry.sha256)
            names.append(entry.name.encode(errors="surrogatepass"))
            codes.append((runs[:, 0] << 32) | runs[:, 1])
            counts.append(runs[:, 2].astype(np.int32))
        distinct = np.unique(np.concatenate(codes or [np.zeros(0, np.int64)]))
        values = {
            "samples": np.array([samples for samples, _ in numbers], np.int64),
            "bytes": np.array([size for _, size in numbers], np.int64),
            "sha256": np.frombuffer(b"".join(bytes.fromhex(d or "0" * 64) for d in digests), np.uint8).reshape(-1, 32),
            "has_sha256": np.array([digest is not None for digest in digests], np.uint8),
            "name": np.frombuffer(b"".join(names), np.uint8),
            "names_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
            "sizes": np.stack([distinct >> 32, distinct & 0xFFFFFFFF], 1).astype(np.int32),
            "run_size": _concatenated([np.searchsorted(distinct, part).astype(np.int32) for part in codes]),
            "run_samples": _concatenated(counts),
            "runs_ends": np.cumsum([len(part) for part in codes], dtype=np.int64),
        }
        return cls(Arrays(values))

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[ShardEntry]:
        return (self[number] for number in range(len(self)))

    @overload
    def __getitem__(self, number: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, number: slice) -> list[ShardEntry]: ...
    def __getitem__(self, number: int | slice) -> ShardEntry | list[ShardEntry]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # negative ones count from the end; IndexError beyond it
        sizes = self.arrays["sizes"][self.rows("run_size", number)]
        runs = np.column_stack([sizes, self.rows("run_samples", number)]).tolist()
        return replace(self.file(number), sizes=tuple(map(tuple, runs)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def file(self, number: int) -> ShardEntry:
        """The entry of a shard without the sizes of its samples."""
        return ShardEntry(
            name=self.rows("name", number).tobytes().decode(errors="surrogatepass"),
            samples=int(self.samples[number]),
            bytes=int(self.bytes[number]),
            sha256=self.arrays["sha256"][number].tobytes().hex() if self.arrays["has_sha256"][number] else None,
        )

    def files(self) -> Iterator[ShardEntry]:
        """The entries of all shards without the sizes of their samples."""
        return map(self.file, range(len(self)))

    def rows(self, name: str, number: int) -> Array:
        """The rows of shard `number` in an array of a group."""
        group = next(group for group, names in GROUPS.items() if name in names)
        ends = self.arrays[f"{group}_ends"]
        return self.arrays[name][ends[number - 1] if number else 0 : ends[number]]

    @property
    def sizes(self) -> set[tuple[int, int]]:
        """Every height and width that occurs, in pixels."""
        return {(height, width) for height, width in self.arrays["sizes"].tolist()}

    @cached_property
    def has_sizes(self) -> bool:
        """Whether the sizes of all samples are known."""
        return int(self.arrays["run_samples"].sum(dtype=np.int64)) == int(self.samples.sum())

    @cached_property
    def key(self) -> str:
        """Hash of the whole content, in hex. Of a file it is the file's name, which has the hash of the manifest."""
        if self.arrays.file is not None:
            return Path(self.arrays.file.name).stem
        digest = hashlib.sha256()
        for name, value in sorted(self.arrays.values.items()):
            digest.update(f"{name}:{value.shape}".encode() + value.tobytes())
        return digest.hexdigest()[:32]

    def select(self, numbers: Sequence[int]) -> "ShardIndex":
        """The index of some of the shards, in this order."""
        return ShardIndex.of(self[number] for number in numbers)


def _concatenated(parts: list[Array]) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
