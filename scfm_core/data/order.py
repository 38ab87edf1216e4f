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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Items = NDArray[np.int64]


def _random_words(count: int, *key: object) -> NDArray[np.uint64]:
    """Uniform 64-bit words [count], a function of `key`."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


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
    """Sample numbers, int64 [batches, global_batch_size]."""
    buckets: NDArray[np.int16]
    """The bucket of each batch, [batches]."""

    @cached_property
    def places_by_bucket(self) -> list[NDArray[np.int64]]:
        """For each bucket, the places of its batches in the epoch."""
        count = int(self.buckets.max()) + 1 if len(self.buckets) else 0
        return [np.flatnonzero(self.buckets == bucket) for bucket in range(count)]


class Order:
    """The endless stream of global batches.

    Args:
        sources: to be mixed.
        buckets: the bucket of every sample, int16 [samples of all sources].
        global_batch_size: samples in a batch, all of one bucket.
        seed: part of every random key.
        shuffle: False: shards and samples come in the order of the manifest.
        block: number of consecutive samples that are shuffled together (shuffle block).
        partitions: parts of an epoch. Each batch takes equal shares of them, so they must divide the batch.
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
    ) -> None:
        assert global_batch_size % partitions == 0
        self.sources, self.buckets, self.batch_size = tuple(sources), buckets, global_batch_size
        self.seed, self.shuffle, self.block, self.partitions = seed, shuffle, block, partitions
        self._num_buckets = int(buckets.max()) + 1
        self._bucket_counts = [
            np.bincount(buckets[source.start : source.start + source.samples], minlength=self._num_buckets)
            for source in self.sources
        ]
        # An epoch uses up to two passes of each source.
        self._pass = lru_cache(2 * len(self.sources))(self._make_pass)
        self._draws = lru_cache(2)(self._make_draws)
        self.epoch = lru_cache(2)(self._make_epoch)

    @property
    def epoch_size(self) -> int:
        """Number of samples in an epoch."""
        return sum(source.draws for source in self.sources)

    def locate(self, batch: int) -> tuple[int, int]:
        """The epoch of a global batch, and the place of the batch in it."""
        epoch = batch * self.batch_size // self.epoch_size
        while self._batches_before(epoch + 1) <= batch:
            epoch += 1
        return epoch, batch - self._batches_before(epoch)

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

    def _make_pass(self, number: int, index: int) -> Items:
        """All samples of source `number`, in the order of pass `index`."""
        source = self.sources[number]
        sizes = np.asarray(source.shards, dtype=np.int64)
        starts = source.start + np.cumsum(sizes) - sizes
        if not self.shuffle:
            return source.start + np.arange(source.samples, dtype=np.int64)
        shards = np.argsort(_random_words(len(sizes), self.seed, "shards", source.name, index), kind="stable")
        sizes, starts = sizes[shards], starts[shards]
        items = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(source.samples)
        # Each sample keeps its random word, so that the order within a block does not depend on the cut into shards.
        words = _random_words(source.samples, self.seed, "samples", source.name, index)[items - source.start]
        block = np.arange(source.samples, dtype=np.uint64) // np.uint64(self.block)
        return items[np.argsort((block << np.uint64(40)) | (words >> np.uint64(24)), kind="stable")]

    def _stream(self, number: int, start: int, stop: int) -> Items:
        """The part from `start` to `stop - 1` of a source's endless stream."""
        samples, parts = self.sources[number].samples, []
        while start < stop:
            index, at = divmod(start, samples)
            part = self._pass(number, index)[at : at + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _make_draws(self, epoch: int) -> Items:
        """The samples of an epoch, before they are cut into batches."""
        parts = [
            self._stream(number, epoch * source.draws, (epoch + 1) * source.draws)
            for number, source in enumerate(self.sources)
        ]
        if len(parts) == 1:
            return parts[0]
        places = []
        for source, part in zip(self.sources, parts, strict=True):
            # Draw i of n gets a random place in [i / n, (i + 1) / n) of the epoch.
            jitter = _random_words(len(part), self.seed, "mixture", source.name, epoch) >> np.uint64(11)
            places.append((np.arange(len(part)) + jitter / 2.0**53) / max(1, len(part)))
        return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]

    def counts_before(self, epoch: int) -> NDArray[np.int64]:
        """Number of draws of each bucket in all epochs before `epoch`, int64 [buckets]."""
        counts = np.zeros(self._num_buckets, np.int64)
        for number, source in enumerate(self.sources):
            passes, rest = divmod(epoch * source.draws, source.samples)
            counts += passes * self._bucket_counts[number]
            if rest:
                counts += np.bincount(self.buckets[self._pass(number, passes)[:rest]], minlength=self._num_buckets)
        return counts

    def _batches_before(self, epoch: int) -> int:
        return int((self.counts_before(epoch) // self.batch_size).sum())

    def _waiting(self, epoch: int) -> list[Items]:
        """For each bucket, the samples of earlier epochs that wait for a batch, oldest first."""
        missing = self.counts_before(epoch) % self.batch_size
        waiting: list[list[Items]] = [[] for _ in range(self._num_buckets)]
        while missing.any():
            epoch -= 1
            draws = self._draws(epoch)
            buckets = self.buckets[draws]
            for bucket in np.flatnonzero(missing):
                last = draws[buckets == bucket][-missing[bucket] :]
                waiting[bucket].insert(0, last)
                missing[bucket] -= len(last)
        return [np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in waiting]

    def _make_epoch(self, epoch: int) -> Epoch:
        draws, waiting = self._draws(epoch), self._waiting(epoch)
        draw_buckets, size, parts = self.buckets[draws], self.batch_size, self.partitions
        items, ends, buckets = [], [], []
        for bucket in range(self._num_buckets):
            places = np.flatnonzero(draw_buckets == bucket)
            queue = np.concatenate([waiting[bucket], draws[places]])
            queue_places = np.concatenate([np.arange(-len(waiting[bucket]), 0), places])
            count = len(queue) // size
            shares = (parts, count, size // parts)
            items.append(queue[: count * size].reshape(shares).swapaxes(0, 1).reshape(count, size))
            ends.append(queue_places[: count * size].reshape(shares)[0, :, -1])
            buckets.append(np.full(count, bucket, np.int16))
        order = np.argsort(np.concatenate(ends), kind="stable")
        return Epoch(self._batches_before(epoch), np.concatenate(items)[order], np.concatenate(buckets)[order])
