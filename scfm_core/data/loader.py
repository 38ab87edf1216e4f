"""The data loader: batches in an exact order. A run can resume at any step, with any number of ranks and workers."""

import contextlib
import mmap
import multiprocessing
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from scfm_core.data.corpus import Corpus
from scfm_core.data.order import Order
from scfm_core.data.remote import close_connections
from scfm_core.data.schema import BadData, Batch, Record, collate
from scfm_core.data.workers import POLL, WorkerGroup, batches_of_workers, frozen_garbage, ignore_signals
from scfm_core.errors import UserError
from scfm_core.launched import local_size

_DOWNLOAD_THREADS = 4
"""Concurrent downloads of one rank."""


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
    def per_step(self) -> int:
        """Number of micro-batches of this rank in a global batch."""
        return self.order.batch_size // self.world_size // self.micro_batch_size

    def __len__(self) -> int:
        return (self.stop - self.start) * self.per_step

    def __iter__(self) -> Iterator[list[Pick]]:
        if self.start >= self.stop:
            return
        number, place = self.order.locate(self.start)
        epoch = self.order.epoch(number)
        for batch in range(self.start, self.stop):
            while place == len(epoch.items):
                number, place = number + 1, 0
                epoch = self.order.epoch(number)
            items = epoch.items[place].tolist()
            share = len(items) // self.world_size
            for at in range(self.rank * share, (self.rank + 1) * share, self.micro_batch_size):
                first = self.sample_offset + batch * len(items)
                yield [
                    Pick(first + row, items[row], self.order.spares(epoch, place, row) if self.with_spares else ())
                    for row in range(at, at + self.micro_batch_size)
                ]
            place += 1


class _Samples(TorchDataset):  # type: ignore[type-arg]
    """Reads the record of a pick, or of a substitute; also returns what is wrong with the samples that it replaced.

    A UserError is returned in place of the record. Raised in a worker, it would arrive with the worker's traceback in
    its message.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def __getitem__(self, pick: Pick) -> tuple[Pick, Record | UserError, list[str]]:
        bad: list[str] = []
        for item in (pick.item, *pick.spares):
            try:
                return pick, self.corpus.record(item, pick.sample_id, padded=False), bad
            except BadData as error:
                bad.append(str(error))
            except UserError as error:
                return pick, UserError(str(error)), bad
        return pick, UserError(bad[0]), bad


def batches(
    corpus: Corpus,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    start: int,
    stop: int,
    rank: int = 0,
    world_size: int = 1,
    sample_offset: int = 0,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Generator[Batch]:
    """One rank's micro-batches of the samples `start` to `stop - 1` of the stream, in order.

    Args:
        corpus: of the recipe.
        seed: of the order, if the recipe has none.
        global_batch_size: samples of all ranks in a step, all of one size.
        micro_batch_size: samples; `world_size` times it must divide the global batch.
        start: the data cursor: number of samples consumed so far, a multiple of the global batch. It is the whole
            state.
        stop: the first sample of the stream that is not read, a multiple of the global batch.
        rank, world_size: of this process.
        sample_offset: added to the places in the stream, to get global sample indices.
        is_stopping: whether the run was asked to stop; it is called while the next batch is not there yet.

    Raises:
        UserError: if a shard is unavailable, or a sample is invalid and the recipe tolerates none; the message names
            it. If a worker was killed, or shared memory is too small.
        Stopped: in place of a batch that is not there yet, if `is_stopping` is true.
    """
    assert start % global_batch_size == stop % global_batch_size == 0
    assert global_batch_size % (micro_batch_size * world_size) == 0
    config = corpus.config
    picks = Picks(
        corpus.order(global_batch_size, seed),
        start // global_batch_size,
        stop // global_batch_size,
        micro_batch_size,
        rank,
        world_size,
        sample_offset,
        config.max_bad_fraction > 0,
    )
    close_connections()
    if not config.num_workers:
        samples = _Samples(corpus)
        for rows in picks:
            yield _checked(_collate([samples[pick] for pick in rows]))
        return
    with _Prefetcher(corpus, picks) as prefetcher, contextlib.closing(_read(corpus, picks, is_stopping)) as read:
        for batch in read:
            prefetcher.count_micro_batch()
            yield _checked(batch)


def _checked(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch


def _read(corpus: Corpus, picks: Picks, is_stopping: Callable[[], bool]) -> Generator[Batch | UserError]:
    """The micro-batches, read by `data.num_workers` processes."""
    workers = corpus.config.num_workers
    prefetch = max(2, -(-4 * picks.per_step // workers))
    waiting = workers * local_size()  # the workers of all processes of this machine
    group = WorkerGroup(queued=prefetch * waiting, least=2 * waiting)

    def collate_shared(rows: list[tuple[Pick, Record | UserError, list[str]]]) -> Batch | UserError:
        batch = _collate(rows)
        return batch if isinstance(batch, UserError) else group.has_room(batch) or batch

    loader = DataLoader(
        _Samples(corpus),
        batch_sampler=picks,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate_shared,
        prefetch_factor=prefetch,
        worker_init_fn=group.start,
        timeout=POLL,
        # Forked, so that the workers share the table of verified shards.
        multiprocessing_context="fork",
    )
    return batches_of_workers(loader, group, is_stopping)


class _Prefetcher:
    """A process that downloads and hashes shards before the workers need them.

    It goes through the same picks as the workers. It stays at most two shuffle blocks, and half of the cache's limit,
    ahead of the training. One block would not be enough: the first batch of a block needs nearly all of its shards.
    """

    def __init__(self, corpus: Corpus, picks: Picks) -> None:
        self.corpus, self.picks = corpus, picks
        self._counter = mmap.mmap(-1, 8)
        self._parent = os.getpid()
        self._process = multiprocessing.get_context("fork").Process(target=self._run, daemon=True)

    def __enter__(self) -> "_Prefetcher":
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
        corpus, limit = self.corpus, self.corpus.config.cache.limit_gb
        max_bytes = float("inf") if limit is None else limit * 1e9 / 2
        block = corpus.config.shuffle_block // self.picks.world_size
        # In micro-batches: a shard is used for about the length of a block after its first sample.
        in_use = max(16, block // self.picks.micro_batch_size)
        # (first micro-batch that needs it, shard) of the shards in use or ahead.
        window: deque[tuple[int, int]] = deque()

        def must_wait(number: int, is_new: bool) -> bool:
            """Whether micro-batch `number`, or a new shard of it, is too far ahead of the training."""
            if os.getppid() != self._parent:
                os._exit(0)  # the training process was killed
            consumed = self._consumed
            while window and window[0][0] + in_use < consumed:
                window.popleft()
            window_bytes = sum(corpus.shard_bytes(known) for _, known in window)
            return number > consumed + 2 * in_use or (is_new and bool(window) and window_bytes >= max_bytes)

        with ThreadPoolExecutor(_DOWNLOAD_THREADS) as pool:
            for number, micro_batch in enumerate(self.picks):
                for shard in dict.fromkeys(corpus.shard_of(pick.item) for pick in micro_batch):
                    known = any(shard == each for _, each in window)
                    while must_wait(number, not known):
                        time.sleep(0.05)
                    if not known:
                        window.append((number, shard))
                        if number >= self._consumed:  # otherwise a worker has downloaded it already
                            pool.submit(self._prefetch, shard)
        os._exit(0)

    def _prefetch(self, shard: int) -> None:
        # The worker that needs the shard will get the same error, and report it.
        with contextlib.suppress(UserError, OSError):
            self.corpus.prefetch(shard)


def _collate(rows: list[tuple[Pick, Record | UserError, list[str]]]) -> Batch | UserError:
    records, bad = [], []
    for pick, record, replaced in rows:
        if isinstance(record, UserError):
            return record
        records.append(record)
        bad += [f"sample {pick.sample_id}: {reason}" for reason in replaced[:1]]
    try:
        batch = collate([pick.sample_id for pick, _, _ in rows], records)
    except UserError as error:
        return UserError(str(error))
    batch.bad = bad
    return batch
