"""PyTorch's distributed checkpoint (DCP): saving tensors with it."""

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.logger import _dcp_logger

from scfm_core.distributed.world import World
from scfm_core.distributed.written import HashingWriter
from scfm_core.files import Written


def save_dcp(tensors: Mapping[str, Tensor], folder: Path, world: World, *, on_thread: bool) -> Callable[[], Written]:
    """Write tensors as a distributed checkpoint. Every rank calls it.

    Args:
        tensors: by key; sharded ones are DTensors.
        folder: for `.metadata` and one `.distcp` file a rank.
        world: the processes, and the group over which DCP plans.
        on_thread: copy the tensors to host memory before returning, and write them in a background thread.

    Returns:
        a function that waits until the files are written, and raises what the writing raised; it returns this rank's files.
    """
    quiet_dcp()
    writer = HashingWriter(folder, staged=on_thread)
    options: dict[str, Any] = {"storage_writer": writer}
    if world.group is not None:
        options["process_group"] = world.group
    if on_thread:
        pending: Any = dcp.async_save(dict(tensors), **options)

        def wait() -> Written:
            pending.result()
            return writer.files

        return wait
    dcp.save(dict(tensors), no_dist=world.group is None, **options)
    return lambda: writer.files


def files_of_dcp(folder: Path) -> set[Path]:
    """All files of a distributed checkpoint, as its own metadata name them."""
    stored = dcp.FileSystemReader(folder).read_metadata().storage_data or {}
    return {folder / ".metadata", *(folder / entry.relative_path for entry in stored.values())}


def quiet_dcp() -> None:
    """Silence two warnings that DCP gives about its own code, and two records of its log for each tensor, which nobody reads."""
    for message in ("TypedStorage is deprecated", "torch.distributed is disabled"):
        warnings.filterwarnings("ignore", message=message, module="torch.distributed.checkpoint")
    _dcp_logger.setLevel(logging.WARNING)
