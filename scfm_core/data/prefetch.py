"""Shards are downloaded and hashed before they are needed; and how large the cache must be for this."""

import contextlib
import mmap
import multiprocessing
import os
import struct
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from scfm_core.data.corpus import Corpus
from scfm_core.data.picks import Picks, ShardUse
from scfm_core.data.workers import frozen_garbage, ignore_signals
from scfm_core.errors import UserError
from scfm_core.launched import local_size

_DOWNLOAD_THREADS = 4
"""Concurrent downloads of one rank."""
_FILL = 0.9
"""Share of the cache's limit for shards that are needed now or soon; the rest is for ranks that are a little ahead."""


class Prefetcher:
    """A process that downloads and hashes shards before the workers need them.

    It is at most two shuffle blocks ahead of the training, and downloads no more than the cache can hold beside the shards
    in use. One block would not be enough: the first batch of a block needs nearly all of its shards.

    Args:
        corpus: of the recipe.
        picks: those of the workers.
    """

    def __init__(self, corpus: Corpus, picks: Picks) -> None:
        self.corpus, self.picks = corpus, picks
        self._counter = mmap.mmap(-1, 8)
        self._parent = os.getpid()
        self._process = multiprocessing.get_context("fork").Process(target=self._run, daemon=True)

    def __enter__(self) -> "Prefetcher":
        with frozen_garbage():
            self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def count_micro_batch(self) -> None:
        """Tell the process that the training took another micro-batch."""
        self._counter[:] = struct.pack("<q", self._consumed + 1)

    @property
    def _consumed(self) -> int:
        return int(struct.unpack("<q", self._counter[:])[0])

    def _run(self) -> None:
        ignore_signals()
        corpus = self.corpus
        ahead = 2 * max(16, block_length(self.picks, corpus.config.shuffle_block))
        room, in_use = _room(corpus, self.picks), dict[int, int]()  # shards in use or ahead, and their last micro-batch

        def must_wait(use: ShardUse) -> bool:
            if os.getppid() != self._parent:
                os._exit(0)  # the training process was killed
            consumed = self._consumed
            for shard in [shard for shard, last in in_use.items() if last < consumed]:
                del in_use[shard]
            if use.shard in in_use or use.first <= consumed or not in_use:
                return use.first > consumed + ahead
            return use.first > consumed + ahead or sum(map(corpus.shard_bytes, (use.shard, *in_use))) > room

        with ThreadPoolExecutor(_DOWNLOAD_THREADS) as pool:
            for use in (use for epoch in self.picks.shard_uses(corpus) for use in epoch):
                while must_wait(use):
                    time.sleep(0.05)
                is_new = use.shard not in in_use and use.first >= self._consumed  # else a worker has downloaded it
                in_use[use.shard] = max(use.last, in_use.get(use.shard, 0))
                if is_new:
                    pool.submit(self._prefetch, use.shard, in_use)
        os._exit(0)

    def _prefetch(self, shard: int, in_use: Mapping[int, int]) -> None:
        """Download a shard, unless the training is past it: then a worker has done so, and the copy may be gone again.

        Args:
            shard: its number.
            in_use: as in `_run`, which changes it meanwhile.
        """

        def is_needed(number: int) -> bool:
            return in_use.get(number, -1) >= self._consumed

        # The worker that needs the shard will get the same error, and report it.
        with contextlib.suppress(UserError, OSError):
            # A late mark of a shard that is no longer needed would evict one that is: each is asked for at its turn.
            for number in filter(is_needed, tuple(in_use)):
                self.corpus.mark_used(number)
            if is_needed(shard):
                self.corpus.prefetch(shard)


def block_length(picks: Picks, block: int) -> int:
    """Micro-batches of a rank in which a shuffle block of `block` samples is used up.

    Each of P partitions gives 1/P of every batch, so that its blocks last P times as long.
    """
    return block * picks.order.partitions // picks.world_size // picks.micro_batch_size


def warn_of_small_cache(corpus: Corpus, picks: Picks, queued: int) -> None:
    """On rank 0: say if the cache is smaller than the shards that a machine uses at the same time, and which size is needed.

    Args:
        corpus: of the recipe.
        picks: of this rank.
        queued: micro-batches that the workers of a rank are ahead of the training.
    """
    limit = corpus.config.cache.limit_gb
    if limit is None or picks.rank:
        return
    needed = cache_needed(corpus, picks, queued) / 1e9
    if limit < needed:
        print(
            f"warning: data.cache.limit_gb={limit:.6g} is less than the shards that a machine uses at the same time: some "
            f"may be downloaded again and again. Set it to {needed * 1.001:.4g} or more, lower data.shuffle_block, or set "
            f"data.partitions to the number of machines",
            flush=True,
        )


def cache_needed(corpus: Corpus, picks: Picks, queued: int) -> int:
    """Bytes of the cache of the first machine with which each shard is downloaded once in an epoch; arguments as above."""
    ranks = local_size() if picks.world_size % local_size() == 0 else 1
    machine = replace(picks, world_size=picks.world_size // ranks, rank=0, micro_batch_size=picks.share * ranks)
    uses = next(machine.shard_uses(corpus), [])
    ahead = -(-queued // picks.per_step) + 1
    steps = np.zeros(machine.stop - machine.start + 1, np.int64)  # change of the bytes in use
    for use in uses:
        steps[max(0, use.first - ahead)] += corpus.shard_bytes(use.shard)
        steps[use.last + 1] -= corpus.shard_bytes(use.shard)
    return int(np.cumsum(steps).max() / _FILL)


def _room(corpus: Corpus, picks: Picks) -> float:
    """Bytes of the cache for the shards of one rank; ranks that read the same partitions use the same shards."""
    limit, ranks = corpus.config.cache.limit_gb, local_size()
    if limit is None:
        return float("inf")
    groups = min(ranks, max(1, -(-ranks * picks.order.partitions // picks.world_size)))
    return _FILL * limit * 1e9 / groups
