"""The data loader: batches in an exact order. A run can resume at any step, with any number of ranks and workers."""

import contextlib
from collections.abc import Callable, Generator

from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from scfm_core.data.corpus import Corpus
from scfm_core.data.picks import Pick, Picks
from scfm_core.data.prefetch import Prefetcher, warn_of_small_cache
from scfm_core.data.remote import close_connections
from scfm_core.data.schema import BadData, Batch, Record, collate
from scfm_core.data.workers import POLL, WorkerGroup, batches_of_workers, portable
from scfm_core.errors import UserError
from scfm_core.launched import local_size


class _Samples(TorchDataset):  # type: ignore[type-arg]
    """Reads the record of a pick, or of a substitute; also returns what is wrong with the samples that it replaced.

    Here is the rule for errors. BadData is the result of a sample: its content is invalid, so another sample replaces it,
    and it is counted (`data.max_bad_fraction`). Every other exception is the result of a step: a shard that is
    unavailable, a disk, a bug. It is returned in place of the record, passes to the training process, and comes out of
    the stream in place of the batch, so that all ranks can agree on it and save a checkpoint. Errors that may pass have
    been retried before: `reading.retried` for files, `remote` for object storage.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def __getitem__(self, pick: Pick) -> tuple[Pick, Record | Exception, list[str]]:
        bad: list[str] = []
        for item in (pick.item, *pick.spares):
            try:
                return pick, self.corpus.record(item, pick.sample_id, padded=False), bad
            except BadData as error:
                bad.append(str(error))
            except Exception as error:
                return pick, portable(error), bad
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
        Exception: any other error of reading, also of a worker, in place of its batch; the batches before it come first.
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
    ahead = max(2, -(-4 * picks.per_step // config.num_workers)) if config.num_workers else 0
    warn_of_small_cache(corpus, picks, ahead * config.num_workers)
    if config.num_workers:
        yield from _read_by_workers(corpus, picks, ahead, is_stopping)
        return
    samples = _Samples(corpus)
    for rows in picks:
        yield _checked(_collate([samples[pick] for pick in rows]))


def _checked(batch: Batch | Exception) -> Batch:
    if isinstance(batch, Exception):
        raise batch
    return batch


def _read_by_workers(corpus: Corpus, picks: Picks, ahead: int, is_stopping: Callable[[], bool]) -> Generator[Batch]:
    """The micro-batches, read by `data.num_workers` processes, each up to `ahead` micro-batches ahead of the training."""
    workers = corpus.config.num_workers
    waiting = workers * local_size()  # the workers of all processes of this machine
    group = WorkerGroup(queued=ahead * waiting, least=2 * waiting)

    def collate_shared(rows: list[tuple[Pick, Record | Exception, list[str]]]) -> Batch | Exception:
        batch = _collate(rows)
        return batch if isinstance(batch, Exception) else group.has_room(batch) or batch

    loader = DataLoader(
        _Samples(corpus),
        batch_sampler=picks,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate_shared,
        prefetch_factor=ahead,
        worker_init_fn=group.start,
        timeout=POLL,
        # Forked, so that the workers share the table of verified shards.
        multiprocessing_context="fork",
    )
    read = batches_of_workers(loader, group, is_stopping)
    with Prefetcher(corpus, picks) as prefetcher, contextlib.closing(read):
        for batch in read:
            prefetcher.count_micro_batch()
            yield _checked(batch)


def _collate(rows: list[tuple[Pick, Record | Exception, list[str]]]) -> Batch | Exception:
    records, bad = [], []
    for pick, record, replaced in rows:
        if isinstance(record, Exception):
            return record
        records.append(record)
        bad += [f"sample {pick.sample_id}: {reason}" for reason in replaced[:1]]
    try:
        batch = collate([pick.sample_id for pick, _, _ in rows], records)
    except Exception as error:
        return portable(error)
    batch.bad = bad
    return batch
