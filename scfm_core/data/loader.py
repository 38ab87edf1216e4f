"""Batches in an exact order that a run can resume at any step: order is a pure function of (seed, global index)."""

import hashlib
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from scfm_core.data.folder import ImageFolder
from scfm_core.data.schema import Batch, Dataset, Record, collate
from scfm_core.data.webdataset import CachedDataset
from scfm_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from. A data recipe (`recipes/data/*.yaml`) holds one of these: `data=PATH` swaps it."""

    path: str
    """Folder of shards with `manifest.json`, or of images with captions."""
    format: Literal["webdataset", "folder"] = "webdataset"
    """`webdataset`: cached latents and embeddings (`scfm data encode`); `folder`: images, encoded on the fly."""
    resolution: tuple[int, int] = (512, 512)
    """Height and width in pixels; for a cache it must be what it was encoded at."""
    shuffle: bool = True
    """A new permutation every epoch; off: the files' order."""
    num_workers: int = 2
    """Processes that read ahead; 0 reads in the training process."""
    verify: bool = True
    """Hash every shard at start-up (about 1 GB/s)."""

    def __post_init__(self) -> None:
        if min(self.resolution) < 1:
            raise ValueError(f"data.resolution must be positive, got {self.resolution}")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must be at least 0, got {self.num_workers}")


def open_dataset(config: DataConfig) -> Dataset:
    """The dataset of a data recipe; UserError says what is wrong with it."""
    folder = Path(config.path).expanduser()
    if config.format == "folder":
        return ImageFolder(folder, *config.resolution)
    return CachedDataset(folder, verify=config.verify)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(length, generator=generator)


def dataset_index(global_index: int, length: int, seed: int, *, shuffle: bool = True) -> int:
    """Which record stands at `global_index` of the endless stream of epochs. Nothing is dropped at an epoch's end."""
    epoch, position = divmod(global_index, length)
    return int(_permutation(seed, epoch, length)[position]) if shuffle else position


class _Stream(TorchDataset):  # type: ignore[type-arg]
    """Map from global sample index to (index, record).

    A user's error is returned in place of the record: raised in a worker, it would arrive with the worker's traceback
    as its message.
    """

    def __init__(self, dataset: Dataset, seed: int, shuffle: bool) -> None:
        self.dataset, self.seed, self.shuffle = dataset, seed, shuffle

    def __getitem__(self, global_index: int) -> tuple[int, Record | UserError]:
        index = dataset_index(global_index, len(self.dataset), self.seed, shuffle=self.shuffle)
        try:
            return global_index, self.dataset[index]
        except UserError as error:
            return global_index, UserError(str(error))


def batches(
    dataset: Dataset,
    config: DataConfig,
    *,
    seed: int,
    micro_batch_size: int,
    start: int,
    stop: int,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Batch]:
    """One rank's micro-batches of the global samples `start` to `stop - 1`, in order.

    The ranks take consecutive micro-batches in turn, so a step's samples are the same on every number of ranks.

    Args:
        dataset: random access to records.
        config: workers and shuffling.
        seed: of the order.
        micro_batch_size: times `world_size` it divides `stop - start`.
        start: the data cursor: samples consumed so far. It is the whole state of the loader.
        stop: the first sample of the stream that is not read.
        rank, world_size: this process, of how many.
    """
    stride = micro_batch_size * world_size
    assert (stop - start) % stride == 0
    loader: DataLoader[Batch | UserError] = DataLoader(
        _Stream(dataset, seed, config.shuffle),
        batch_sampler=_Consecutive(range(start + rank * micro_batch_size, stop, stride), micro_batch_size),
        num_workers=config.num_workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_signals if config.num_workers else None,
    )
    iterator = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        # A traceback may keep the iterator alive to the end of the process, whose exit would then wait for ever for
        # workers that ignore its SIGTERM.
        if config.num_workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Consecutive:
    """Runs of `size` consecutive indices, made as they are asked for: a long run has millions."""

    starts: range
    size: int

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(at, at + self.size)) for at in self.starts)


def _ignore_signals(_: int) -> None:
    # Ctrl-C, and Slurm's signals, reach every process of the job; the training process decides when to stop, and its
    # workers must live until it has.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _collate(rows: list[tuple[int, Record | UserError]]) -> Batch | UserError:
    records = []
    for _, record in rows:
        if isinstance(record, UserError):
            return record
        records.append(record)
    try:
        return collate([index for index, _ in rows], records)
    except UserError as error:
        return UserError(str(error))
