"""The order of samples: a pure function of the recipe, the seed, and the place in the stream.

1. Each source has an endless stream, which goes through all of its samples in passes. Each pass permutes the shards,
   and then the samples within blocks of consecutive shards.
2. An epoch takes a fixed number of samples (draws) from the stream of every source, and spreads them evenly.
3. Each size (bucket) has a stream of its own: the draws of that size in all epochs. It is cut into global batches. A
   batch takes the place of its last sample.
4. Samples that do not fill a batch wait for the next epoch. Nothing is dropped, and at the end of an epoch less than one
   batch of each size is waiting.

Every random number is a word of a Philox counter stream with the key (seed, purpose, pass), so there is no state to
save. numpy keeps the words of its bit generators the same between releases (NEP 19); it does not promise this for
`permutation`.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm_core.data.machine import Arrays, MachineFiles
from scfm_core.progress import beat

Items = NDArray[Any]

_VERSION = 1
"""Of the files with the batches of an epoch."""
_PART = 1 << 18
"""Samples that are ordered at a time, in some 10 MB. A shuffle block may be larger, and is ordered in one piece."""
LARGE = 1_000_000
"""Samples whose order is worth a file that the machine shares. A smaller order is made in some 100 ms, and takes 4 MB."""


def _generator(key: tuple[object, ...]) -> np.random.Philox:
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def _random_words(count: int, *key: object) -> NDArray[np.uint64]:
    """Uniform 64-bit words [count], a function of `key`."""
    return _generator(key).random_raw(count)


def _words_at(starts: NDArray[np.int64], counts: NDArray[np.int64], *key: object) -> NDArray[np.uint64]:
    """Some ranges of the words of `key`, concatenated: those of range i are `_random_words(...)[starts[i]:][:counts[i]]`."""
    generator, drawn, at = _generator(key), 0, 0
    words = np.empty(int(counts.sum()), np.uint64)
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        block, skip = divmod(start, 4)  # the counter counts blocks of four words
        generator.advance(block - drawn)
        words[at : at + count] = generator.random_raw(skip + count)[skip:]
        drawn = block - (-(skip + count) // 4)
        at += count
    return words


def _counts(buckets: NDArray[np.int16], number: int) -> NDArray[np.int64]:
    """Number of samples of each bucket, int64 [number]."""
    parts = [buckets[at : at + _PART] for at in range(0, len(buckets), _PART)]  # bincount makes a copy in int64
    return sum((np.bincount(part, minlength=number) for part in parts), np.zeros(number, np.int64))


def choose(weights: Sequence[float], *key: object) -> int:
    """An index into `weights`, drawn in proportion to them; a function of `key`."""
    word = int(_random_words(1, "choose", *key)[0]) / 2.0**64
    sums = np.cumsum(weights)
    return int(np.searchsorted(sums, word * sums[-1], side="right"))


@dataclass(frozen=True)
class SourceOrder:
    """What the order needs to know of a source.

    Args:
        name: part of the random key.
        start: number of its first sample; the others follow.
        shards: number of samples in each shard.
        draws: samples that an epoch takes from it.
    """

    name: str
    start: int
    shards: tuple[int, ...]
    draws: int

    @property
    def samples(self) -> int:
        """Number of samples in one pass."""
        return sum(self.shards)


@dataclass(frozen=True)
class Epoch:
    """The global batches of one epoch."""

    first: int
    """Number of global batches in all earlier epochs."""
    items: Items
    """Sample numbers, int32 [batches, global_batch_size]; int64 if there are more than 2^31 samples."""
    buckets: NDArray[np.int16]
    """The bucket of each batch, [batches]."""
    file: Arrays | None = None
    """The file that holds the arrays, if they are shared by the processes of the machine."""

    @cached_property
    def places_by_bucket(self) -> list[NDArray[np.int64]]:
        """For each bucket, the places of its batches in the epoch."""
        count = int(self.buckets.max()) + 1 if len(self.buckets) else 0
        return [np.flatnonzero(self.buckets == bucket) for bucket in range(count)]


class Order:
    """The endless stream of global batches.

    The batches of a large epoch are in a file of the machine (4 bytes a sample), which all its processes map.

    Args:
        sources: to be mixed.
        buckets: the bucket of every sample, int16 [samples of all sources].
        global_batch_size: samples in a batch, all of one bucket.
        seed: part of every random key.
        shuffle: False: shards and samples come in the order of the manifest.
        block: number of consecutive samples that are shuffled together (shuffle block).
        partitions: parts of an epoch. Each batch takes equal shares of them, so they must divide the batch.
        files: of the machine. None: every epoch is in the memory of this process.
    """

    def __init__(
        self,
        sources: Sequence[SourceOrder],
        buckets: NDArray[np.int16],
        global_batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        block: int = 20_000,
        partitions: int = 1,
        files: MachineFiles | None = None,
    ) -> None:
        assert global_batch_size % partitions == 0
        self.sources, self.buckets, self.batch_size = tuple(sources), buckets, global_batch_size
        self.seed, self.shuffle, self.block, self.partitions = seed, shuffle, block, partitions
        self._num_buckets = int(buckets.max()) + 1
        self._bucket_counts = [
            _counts(buckets[source.start : source.start + source.samples], self._num_buckets) for source in self.sources
        ]
        self._files = files
        self._kind = np.int32 if len(buckets) < 1 << 31 else np.int64
        self._part_size = block * max(1, _PART // block)
        # A part of the epoch is of up to two parts of a pass of each source.
        self._part = lru_cache(2 * len(self.sources))(self._make_part)
        self._shards = lru_cache(2 * len(self.sources))(self._shuffled_shards)
        # Of each source the last count that was asked for. The next epoch counts from there.
        self._counted = [(0, np.zeros(self._num_buckets, np.int64)) for _ in self.sources]
        self.epoch = lru_cache(2)(self._open_epoch)

    @property
    def epoch_size(self) -> int:
        """Number of samples in an epoch."""
        return sum(source.draws for source in self.sources)

    def locate(self, batch: int) -> tuple[int, int]:
        """The epoch of a global batch, and the place of the batch in it."""
        number = batch * self.batch_size // self.epoch_size
        while (epoch := self.epoch(number)).first + len(epoch.items) <= batch:  # samples wait for the next epoch
            number += 1
        return number, batch - epoch.first

    def spares(self, epoch: Epoch, place: int, row: int) -> tuple[int, ...]:
        """Substitutes for an invalid sample: the numbers of other samples of its bucket, at growing distances."""
        places = epoch.places_by_bucket[int(epoch.buckets[place])]
        at, count = int(np.searchsorted(places, place)), len(places)
        steps = [1 << power for power in range(12) if 1 << power < count]
        other_batches = [
            int(epoch.items[places[at - step], row]) for step in steps
        ]  # a negative place counts from the end
        same_batch = [int(epoch.items[place, (row + step) % self.batch_size]) for step in (1, 2, 3)]
        item = int(epoch.items[place, row])
        return tuple(dict.fromkeys(spare for spare in other_batches + same_batch if spare != item))

    def _shuffled_shards(self, number: int, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The number of the first sample and the number of samples of each shard, in the order of pass `index`."""
        source = self.sources[number]
        sizes = np.asarray(source.shards, dtype=np.int64)
        shards = np.argsort(_random_words(len(sizes), self.seed, "shards", source.name, index), kind="stable")
        return (np.cumsum(sizes) - sizes)[shards], sizes[shards]

    def _make_part(self, number: int, index: int, part: int) -> Items:
        """Part `part` of the samples of source `number` in the order of pass `index`: some whole blocks."""
        source, begin = self.sources[number], part * self._part_size
        end = min(begin + self._part_size, source.samples)
        if not self.shuffle:
            return np.arange(source.start + begin, source.start + end, dtype=self._kind)
        starts, sizes = self._shards(number, index)
        ends = np.cumsum(sizes)
        first, last = np.searchsorted(ends, [begin, end - 1], side="right")
        starts, sizes, ends = (values[first : last + 1] for values in (starts, sizes, ends))
        # The samples of each shard that are in this part.
        skipped = np.maximum(begin - (ends - sizes), 0)
        starts, counts = starts + skipped, np.minimum(end - (ends - sizes), sizes) - skipped
        # Each sample keeps its random word, so that the order within a block does not depend on the cut into shards.
        words = _words_at(starts, counts, self.seed, "samples", source.name, index)
        items = np.repeat(source.start + starts - (np.cumsum(counts) - counts), counts) + np.arange(end - begin)
        block = np.arange(end - begin, dtype=np.uint64) // np.uint64(self.block)
        order = np.argsort((block << np.uint64(40)) | (words >> np.uint64(24)), kind="stable")
        return items[order].astype(self._kind)

    def _stream(self, number: int, start: int, stop: int) -> Iterator[Items]:
        """The samples from `start` to `stop - 1` of a source's endless stream, in pieces."""
        while start < stop:
            index, at = divmod(start, self.sources[number].samples)
            part, skipped = divmod(at, self._part_size)
            piece = self._part(number, index, part)[skipped : skipped + stop - start]
            yield piece
            start += len(piece)

    def _draws(self, epoch: int, *, backwards: bool = False) -> Iterator[Items]:
        """The samples of an epoch before they are cut into batches, in blocks; `backwards`: the last block first."""
        blocks = -(-self.epoch_size // _PART)
        for block in reversed(range(blocks)) if backwards else range(blocks):
            parts, places = [], []
            for number, source in enumerate(self.sources):
                first, last = (self._cut(number, epoch, end, blocks) for end in (block, block + 1))
                stream = self._stream(number, epoch * source.draws + first, epoch * source.draws + last)
                parts += [np.zeros(0, self._kind), *stream]
                if len(self.sources) > 1:
                    places.append(self._places(number, epoch, first, last))
            draws = np.concatenate(parts)
            yield draws[np.argsort(np.concatenate(places), kind="stable")] if places else draws

    def _places(self, number: int, epoch: int, first: int, last: int) -> NDArray[np.float64]:
        """The places in the epoch, from 0 to 1, of the draws from `first` to `last - 1` of a source. They increase."""
        source, counts = self.sources[number], np.array([last - first])
        jitter = _words_at(np.array([first]), counts, self.seed, "mixture", source.name, epoch) >> np.uint64(11)
        # Draw i of n gets a random place in [i / n, (i + 1) / n) of the epoch.
        return (np.arange(first, last) + jitter / 2.0**53) / source.draws

    def _cut(self, number: int, epoch: int, block: int, blocks: int) -> int:
        """The first draw of a source in block `block` of an epoch: the first one whose place is in the block."""
        draws = self.sources[number].draws
        if block in (0, blocks) or len(self.sources) == 1:
            return draws * block // blocks
        near = int(draws * block / blocks)
        first, last = max(0, near - 2), min(draws, near + 3)
        return first + int((self._places(number, epoch, first, last) < block / blocks).sum())

    def counts_before(self, epoch: int) -> NDArray[np.int64]:
        """Number of draws of each bucket in all epochs before `epoch`, int64 [buckets]."""
        counts = [self._counts_of(number, epoch * source.draws) for number, source in enumerate(self.sources)]
        return np.sum(counts, axis=0)

    def _counts_of(self, number: int, stop: int) -> NDArray[np.int64]:
        """Number of samples of each bucket among the first `stop` of a source's endless stream."""
        samples, (start, counts) = self.sources[number].samples, self._counted[number]
        if not stop // samples * samples <= start <= stop:  # the last count is of no use
            start = stop // samples * samples
            counts = stop // samples * self._bucket_counts[number]
        if self._num_buckets == 1:
            return np.array([stop])
        for piece in self._stream(number, start, stop):
            counts = counts + np.bincount(self.buckets[piece], minlength=self._num_buckets)
        self._counted[number] = stop, counts
        return counts

    def _waiting(self, epoch: int) -> list[Items]:
        """For each bucket, the samples of earlier epochs that wait for a batch, oldest first."""
        missing = self.counts_before(epoch) % self.batch_size
        waiting: list[list[Items]] = [[np.zeros(0, self._kind)] for _ in range(self._num_buckets)]
        while missing.any():
            epoch -= 1
            for draws in self._draws(epoch, backwards=True):
                buckets = self.buckets[draws]
                for bucket in np.flatnonzero(missing):
                    last = draws[buckets == bucket][-missing[bucket] :]
                    waiting[bucket].insert(0, last)
                    missing[bucket] -= len(last)
                if not missing.any():
                    break
        return [np.concatenate(parts) for parts in waiting]

    def _open_epoch(self, number: int) -> Epoch:
        """The batches of an epoch, from a file of the machine if they are many."""
        if self._files is None or self.epoch_size < LARGE:
            return self._make_epoch(number, lambda: beat("order of the samples"))

        def make(step: Callable[[], None]) -> Arrays:
            epoch = self._make_epoch(number, step)
            self._part.cache_clear()
            self._shards.cache_clear()
            return Arrays({"items": epoch.items, "buckets": epoch.buckets}, {"first": str(epoch.first)})

        found = self._files.get("order", f"{self._key}-{number}", make)
        return Epoch(int(found.texts["first"]), found["items"], found["buckets"], found)

    @cached_property
    def _key(self) -> str:
        """Hash of everything that the order depends on."""
        settings = (self.sources, self.batch_size, self.seed, self.shuffle, self.block, self.partitions)
        digest = hashlib.sha256(repr((_VERSION, *settings)).encode())
        for at in range(0, len(self.buckets), _PART):
            digest.update(np.ascontiguousarray(self.buckets[at : at + _PART]).data)
        return digest.hexdigest()[:32]

    def _make_epoch(self, epoch: int, step: Callable[[], None]) -> Epoch:
        size, share = self.batch_size, self.batch_size // self.partitions
        waiting, at = self._waiting(epoch), 0
        queues = [[queue] for queue in waiting]
        lengths = [len(queue) for queue in waiting]
        # The place in the epoch of every last sample of a share.
        ends = [[np.arange(-len(queue), 0)[share - 1 :: share]] for queue in waiting]
        for draws in self._draws(epoch):
            buckets = self.buckets[draws]
            places = np.argsort(buckets, kind="stable")
            first = 0
            for bucket, count in enumerate(np.bincount(buckets, minlength=self._num_buckets).tolist()):
                own = places[first : first + count]
                queues[bucket].append(draws[own])
                ends[bucket].append(at + own[(share - 1 - lengths[bucket]) % share :: share])
                lengths[bucket] += count
                first += count
            at += len(draws)
            step()
        counts = [length // size for length in lengths]
        # A batch takes the place of the last sample of its first share.
        last = [np.concatenate(parts)[:count] for parts, count in zip(ends, counts, strict=True)]
        order = np.argsort(np.concatenate(last), kind="stable")
        rows = np.empty_like(order)
        rows[order] = np.arange(len(order))
        items = np.empty((len(order), size), self._kind)
        for bucket, own in enumerate(np.split(rows, np.cumsum(counts)[:-1])):
            queue = np.concatenate(queues[bucket])
            queues[bucket].clear()  # so that not all samples are in memory three times
            shares = queue[: len(own) * size].reshape(self.partitions, len(own), share)
            for part in range(self.partitions):
                items[own, part * share : (part + 1) * share] = shares[part]
        first_batch = int((self.counts_before(epoch) // size).sum())
        return Epoch(first_batch, items, np.repeat(np.arange(self._num_buckets, dtype=np.int16), counts)[order])
