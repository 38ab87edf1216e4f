"""Batches in an exact order that a run can go on with at any step, on any number of processes and workers."""

import contextlib
import gc
import mmap
import multiprocessing
import os
import signal
import struct
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from scfm_core.data.corpus import Corpus
from scfm_core.data.order import Order
from scfm_core.data.remote import close_connections
from scfm_core.data.schema import BadData, Batch, Record, collate
from scfm_core.errors import UserError

_FETCHERS = 4
"""Downloads at a time, a process."""


@dataclass(frozen=True)
class Pick:
    """One sample to be read."""

    sample_id: int
    """Its place in the run's stream."""
    item: int
    """Its number in the corpus."""
    spares: tuple[int, ...] = ()
    """What may stand in for it."""


@dataclass(frozen=True)
class Picks:
    """One rank's micro-batches.

    A global batch is cut into as many consecutive parts as there are ranks, so that a partition's samples stay together on
    one machine, and a rank's part into micro-batches. A global batch is thus the same on every number of ranks.

    Args:
        order: of global batches.
        start: the first global batch.
        stop: the first that is not read.
        micro_batch_size: samples of each micro-batch.
        rank, world_size: this process, of how many.
        sample_offset: number of the stream's first sample.
        with_spares: name substitutes.
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
        """Micro-batches of this rank in a global batch."""
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
    """From a pick to a record, or to its substitute.

    A user's error is returned in place of the record: raised in a worker, it would arrive with the worker's traceback
    as its message.
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
) -> Generator[Batch]:
    """One rank's micro-batches of the samples `start` to `stop - 1` of the stream, in order.

    Args:
        corpus: of the recipe.
        seed: of the order, if the recipe names none.
        global_batch_size: samples of all ranks together in a step, all of one size.
        micro_batch_size: times `world_size` it divides the global batch.
        start: the data cursor: samples consumed so far, a multiple of the global batch. It is the whole state.
        stop: the first sample of the stream that is not read, a multiple of the global batch.
        rank, world_size: this process, of how many.
        sample_offset: what is added to places in the stream to number the samples.

    Raises:
        UserError: naming shard and sample, if one cannot be had; BadData becomes one where the recipe bears none.
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
    loader: DataLoader[Batch | UserError] = DataLoader(
        _Samples(corpus),
        batch_sampler=picks,  # type: ignore[arg-type]
        num_workers=config.num_workers,
        collate_fn=_collate,
        prefetch_factor=max(2, -(-4 * picks.per_step // config.num_workers)) if config.num_workers else None,
        worker_init_fn=_ignore_signals if config.num_workers else None,
        # Forked, so that they share the table of hashed shards.
        multiprocessing_context="fork" if config.num_workers else None,
    )
    close_connections()
    with contextlib.ExitStack() as stack:
        ahead = stack.enter_context(_FetchAhead(corpus, picks)) if config.num_workers else None
        # Without workers nothing is forked, and what this process has frozen before stays frozen.
        with _inherited() if config.num_workers else contextlib.nullcontext():
            iterator = iter(loader)
        # A traceback may keep the iterator alive to the end of the process, whose exit would then wait for ever for
        # workers that ignore its SIGTERM.
        if config.num_workers:
            stack.callback(iterator._shutdown_workers)  # type: ignore[attr-defined]
        for batch in iterator:
            if isinstance(batch, UserError):
                raise batch
            if ahead is not None:
                ahead.consumed()
            yield batch


class _FetchAhead:
    """A process that downloads and hashes shards before the workers need them.

    It goes through the same picks, at most two shuffle blocks and half of the cache's limit ahead of the training. Two,
    since a block's first batch needs nearly all of the block's shards.
    """

    def __init__(self, corpus: Corpus, picks: Picks) -> None:
        self.corpus, self.picks = corpus, picks
        self._counter = mmap.mmap(-1, 8)
        self._parent = os.getpid()
        self._process = multiprocessing.get_context("fork").Process(target=self._run, daemon=True)

    def __enter__(self) -> "_FetchAhead":
        with _inherited():
            self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def consumed(self) -> None:
        """One more micro-batch has been."""
        self._counter[:] = struct.pack("<q", self._done + 1)

    @property
    def _done(self) -> int:
        return int(struct.unpack("<q", self._counter[:])[0])

    def _run(self) -> None:
        _ignore_signals(0)
        corpus, limit = self.corpus, self.corpus.config.cache.limit_gb
        most_bytes = float("inf") if limit is None else limit * 1e9 / 2
        block = corpus.config.shuffle_block // self.picks.world_size
        in_use = max(16, block // self.picks.micro_batch_size)
        window: deque[tuple[int, int]] = deque()  # (micro-batch that needs it first, shard), of those asked for

        def is_ahead(number: int, new: bool) -> bool:
            """Whether to wait before going on with micro-batch `number`, or with a `new` shard of it."""
            if os.getppid() != self._parent:
                os._exit(0)  # the training process was killed
            done = self._done
            # A shard is used for about a block's length after its first sample.
            while window and window[0][0] + in_use < done:
                window.popleft()
            held = sum(corpus.shard_bytes(known) for _, known in window)
            return number > done + 2 * in_use or (new and bool(window) and held >= most_bytes)

        with ThreadPoolExecutor(_FETCHERS) as pool:
            for number, micro_batch in enumerate(self.picks):
                for shard in dict.fromkeys(corpus.shard_of(pick.item) for pick in micro_batch):
                    known = any(shard == each for _, each in window)
                    while is_ahead(number, not known):
                        time.sleep(0.05)
                    if not known:
                        window.append((number, shard))
                        if number >= self._done:  # else whoever needed it has fetched it meanwhile
                            pool.submit(self._ready, shard)
        os._exit(0)

    def _ready(self, shard: int) -> None:
        # Whoever needs the shard will meet the same error, and tell.
        with contextlib.suppress(UserError, OSError):
            self.corpus.make_ready(shard)


@contextlib.contextmanager
def _inherited() -> Generator[None]:
    """Processes forked in here never collect what they inherit.

    Among this process's garbage may be a process group (FSDP's modules hold one in a cycle), which joins its threads when
    it goes; in a forked process those do not exist, and it would be aborted. Nor are the pages that a collection writes
    to copied.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _ignore_signals(_: int) -> None:
    # Ctrl-C, and Slurm's signals, reach every process of the job; the training process decides when to stop, and its
    # workers must live until it has.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


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
