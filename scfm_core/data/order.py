"""Which sample comes when: a pure function of the recipe, the seed, and the place in the stream.

A source's endless stream goes through all of its samples pass by pass; in each pass its shards are permuted, and then the
samples within blocks of consecutive shards. An epoch takes a fixed number of draws from every source's stream and spreads
them evenly over its length. Each size (bucket) then has a stream of its own, of the draws of that size over all epochs,
and is cut into global batches: a batch stands where its last sample does. Samples that do not fill a batch wait for the
next epoch, so nothing is ever dropped, and at an epoch's end less than one batch of each size is outstanding.

Every random number is a word of a Philox counter stream keyed by (seed, what it is for, pass), so no state is kept; numpy
keeps the words of its bit generators the same between releases (NEP 19), which it does not promise of `permutation`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Items = NDArray[np.int64]


def _words(count: int, *key: object) -> NDArray[np.uint64]:
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def choose(weights: Sequence[float], *key: object) -> int:
    """A place in `weights`, drawn in proportion to them by the counter `key`."""
    word = int(_words(1, "choose", *key)[0]) / 2.0**64
    sums = np.cumsum(weights)
    return int(np.searchsorted(sums, word * sums[-1], side="right"))


@dataclass(frozen=True)
class SourceOrder:
    """One source as the order sees it.

    Args:
        name: enters the randomness.
        start: its first sample's number; the others follow.
        shards: samples in each of its shards.
        draws: samples that an epoch takes from it.
    """

    name: str
    start: int
    shards: tuple[int, ...]
    draws: int

    @property
    def samples(self) -> int:
        """In one pass."""
        return sum(self.shards)


@dataclass(frozen=True)
class Epoch:
    """The global batches of one epoch."""

    first: int
    """Global batches before it."""
    items: Items
    """Sample numbers [batches, global_batch_size]."""
    buckets: NDArray[np.int16]
    """Size of each batch, as a number."""

    @cached_property
    def alike(self) -> list[NDArray[np.int64]]:
        """The places of the batches of each size."""
        kinds = int(self.buckets.max()) + 1 if len(self.buckets) else 0
        return [np.flatnonzero(self.buckets == kind) for kind in range(kinds)]


class Order:
    """The endless stream of global batches.

    Args:
        sources: what is mixed.
        buckets: the size of every sample as a number, int16 [samples of all sources].
        global_batch_size: samples in a batch, all of one size.
        seed: of every draw.
        shuffle: off: shards and samples as they are listed.
        block: samples that are shuffled together.
        partitions: parts of an epoch of which each batch takes equal shares; divides the batch.
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
        self._kinds = int(buckets.max()) + 1
        self._totals = [
            np.bincount(buckets[source.start : source.start + source.samples], minlength=self._kinds)
            for source in self.sources
        ]
        # Two passes of each source straddle an epoch.
        self._pass = lru_cache(2 * len(self.sources))(self._make_pass)
        self._draws = lru_cache(2)(self._make_draws)
        self.epoch = lru_cache(2)(self._make_epoch)

    @property
    def epoch_size(self) -> int:
        """Draws in an epoch."""
        return sum(source.draws for source in self.sources)

    def locate(self, batch: int) -> tuple[int, int]:
        """Epoch of a global batch, and its place there."""
        epoch = batch * self.batch_size // self.epoch_size
        while self._batches_before(epoch + 1) <= batch:
            epoch += 1
        return epoch, batch - self._batches_before(epoch)

    def spares(self, epoch: Epoch, place: int, row: int) -> tuple[int, ...]:
        """What may stand in for a sample that cannot be used: others of its size, ever farther away."""
        same = epoch.alike[int(epoch.buckets[place])]
        at, count = int(np.searchsorted(same, place)), len(same)
        steps = [1 << power for power in range(12) if 1 << power < count]
        earlier = [int(epoch.items[same[at - step], row]) for step in steps]  # a negative place counts from the end
        beside = [int(epoch.items[place, (row + step) % self.batch_size]) for step in (1, 2, 3)]
        item = int(epoch.items[place, row])
        return tuple(dict.fromkeys(spare for spare in earlier + beside if spare != item))

    def _make_pass(self, number: int, index: int) -> Items:
        """All samples of source `number` in the order of its pass `index`."""
        source = self.sources[number]
        sizes = np.asarray(source.shards, dtype=np.int64)
        starts = source.start + np.cumsum(sizes) - sizes
        if not self.shuffle:
            return source.start + np.arange(source.samples, dtype=np.int64)
        shards = np.argsort(_words(len(sizes), self.seed, "shards", source.name, index), kind="stable")
        sizes, starts = sizes[shards], starts[shards]
        items = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(source.samples)
        # A sample's word is its own, so that within one block the cut into shards does not matter.
        words = _words(source.samples, self.seed, "samples", source.name, index)[items - source.start]
        block = np.arange(source.samples, dtype=np.uint64) // np.uint64(self.block)
        return items[np.argsort((block << np.uint64(40)) | (words >> np.uint64(24)), kind="stable")]

    def _stream(self, number: int, start: int, stop: int) -> Items:
        """Part of a source's endless stream."""
        samples, parts = self.sources[number].samples, []
        while start < stop:
            index, at = divmod(start, samples)
            part = self._pass(number, index)[at : at + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _make_draws(self, epoch: int) -> Items:
        """The samples of an epoch before they are cut into batches."""
        parts = [
            self._stream(number, epoch * source.draws, (epoch + 1) * source.draws)
            for number, source in enumerate(self.sources)
        ]
        if len(parts) == 1:
            return parts[0]
        places = []
        for source, part in zip(self.sources, parts, strict=True):
            # Draw i of n lies somewhere in the i-th n-th of the epoch.
            jitter = _words(len(part), self.seed, "mixture", source.name, epoch) >> np.uint64(11)
            places.append((np.arange(len(part)) + jitter / 2.0**53) / max(1, len(part)))
        return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]

    def counts_before(self, epoch: int) -> NDArray[np.int64]:
        """Draws of each size in all earlier epochs."""
        counts = np.zeros(self._kinds, np.int64)
        for number, source in enumerate(self.sources):
            passes, rest = divmod(epoch * source.draws, source.samples)
            counts += passes * self._totals[number]
            if rest:
                counts += np.bincount(self.buckets[self._pass(number, passes)[:rest]], minlength=self._kinds)
        return counts

    def _batches_before(self, epoch: int) -> int:
        return int((self.counts_before(epoch) // self.batch_size).sum())

    def _carried(self, epoch: int) -> list[Items]:
        """Of each size, the samples of earlier epochs that did not fill a batch, oldest first."""
        missing = self.counts_before(epoch) % self.batch_size
        carried: list[list[Items]] = [[] for _ in range(self._kinds)]
        while missing.any():
            epoch -= 1
            draws = self._draws(epoch)
            kinds = self.buckets[draws]
            for kind in np.flatnonzero(missing):
                last = draws[kinds == kind][-missing[kind] :]
                carried[kind].insert(0, last)
                missing[kind] -= len(last)
        return [np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in carried]

    def _make_epoch(self, epoch: int) -> Epoch:
        draws, carried = self._draws(epoch), self._carried(epoch)
        kinds, size, parts = self.buckets[draws], self.batch_size, self.partitions
        items, ends, buckets = [], [], []
        for kind in range(self._kinds):
            here = np.flatnonzero(kinds == kind)
            queue = np.concatenate([carried[kind], draws[here]])
            place = np.concatenate([np.arange(-len(carried[kind]), 0), here])
            count = len(queue) // size
            shares = (parts, count, size // parts)
            items.append(queue[: count * size].reshape(shares).swapaxes(0, 1).reshape(count, size))
            ends.append(place[: count * size].reshape(shares)[0, :, -1])
            buckets.append(np.full(count, kind, np.int16))
        order = np.argsort(np.concatenate(ends), kind="stable")
        return Epoch(self._batches_before(epoch), np.concatenate(items)[order], np.concatenate(buckets)[order])
