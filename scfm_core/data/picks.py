"""Which samples a rank reads, in which micro-batch; and from when to when it needs each shard."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from scfm_core.data.corpus import Corpus
from scfm_core.data.order import Epoch, Order


@dataclass(frozen=True)
class Pick:
    """One sample to read."""

    sample_id: int
    """Global sample index: its place in the stream of the run."""
    item: int
    """Its number in the corpus."""
    spares: tuple[int, ...] = ()
    """Numbers of the samples that replace it if it is invalid, in this order."""


@dataclass(frozen=True)
class ShardUse:
    """When a shard is needed in an epoch, in micro-batches from the first one that is read."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True)
class Picks:
    """The samples of one rank's micro-batches.

    A global batch is cut into consecutive parts, one for each rank, and a rank's part into micro-batches. So a global
    batch is the same for every number of ranks, and the samples of a partition are read on one machine.

    Args:
        order: of the global batches.
        start: the first global batch.
        stop: the first global batch that is not read.
        micro_batch_size: samples of each micro-batch.
        rank, world_size: of this process.
        sample_offset: added to the places in the stream.
        with_spares: also choose substitutes for invalid samples.
    """

    order: Order
    start: int
    stop: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    sample_offset: int = 0
    with_spares: bool = False

    @property
    def share(self) -> int:
        """Samples of this rank in a global batch."""
        return self.order.batch_size // self.world_size

    @property
    def per_step(self) -> int:
        """Number of micro-batches of this rank in a global batch."""
        return self.share // self.micro_batch_size

    def __len__(self) -> int:
        return (self.stop - self.start) * self.per_step

    def __iter__(self) -> Iterator[list[Pick]]:
        for epoch, place, batches in self._epochs():
            for at, batch in enumerate(batches, place):
                items, first = epoch.items[at].tolist(), self.sample_offset + batch * self.order.batch_size
                for begin in range(self.rank * self.share, (self.rank + 1) * self.share, self.micro_batch_size):
                    yield [
                        Pick(first + row, items[row], self.order.spares(epoch, at, row) if self.with_spares else ())
                        for row in range(begin, begin + self.micro_batch_size)
                    ]

    def shard_uses(self, corpus: Corpus) -> Iterator[list[ShardUse]]:
        """For each epoch, its shards, in the order in which they are first needed."""
        for epoch, place, batches in self._epochs():
            rows = epoch.items[place : place + len(batches), self.rank * self.share : (self.rank + 1) * self.share]
            shards = corpus.shards_of(rows.ravel())
            numbers = np.arange(len(shards))
            first, last = (np.full(corpus.num_shards, -1) for _ in range(2))
            first[shards[::-1]] = numbers[::-1]  # of repeated indices the last one is assigned
            last[shards] = numbers
            used = np.flatnonzero(last >= 0)
            used = used[np.argsort(first[used])]
            begin = (batches.start - self.start) * self.per_step
            columns = (used, begin + first[used] // self.micro_batch_size, begin + last[used] // self.micro_batch_size)
            yield [ShardUse(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def _epochs(self) -> Iterator[tuple[Epoch, int, range]]:
        """Each epoch, with the numbers of its global batches that are read, and the place of the first of them in it."""
        batch = self.start
        number, place = self.order.locate(batch) if batch < self.stop else (0, 0)
        while batch < self.stop:
            epoch = self.order.epoch(number)
            batches = range(batch, min(self.stop, batch + len(epoch.items) - place))
            yield epoch, place, batches
            number, place, batch = number + 1, 0, batches.stop
