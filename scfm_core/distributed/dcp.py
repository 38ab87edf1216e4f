"""PyTorch's distributed checkpoint (DCP): saving tensors with it."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from scfm_core.distributed.world import World


def save_dcp(tensors: Mapping[str, Tensor], folder: Path, world: World, *, on_thread: bool) -> Callable[[], object]:
    """Write tensors as a distributed checkpoint. Every rank calls it.

    Args:
        tensors: by key; sharded ones are DTensors.
        folder: for `.metadata` and one `.distcp` file a rank.
        world: the processes, and the group over which DCP plans.
        on_thread: copy the tensors to host memory before returning, and write them in a background thread.

    Returns:
        a function that waits until the files are written, and raises what the writing raised.
    """
    quiet_dcp()
    options: dict[str, Any] = {"checkpoint_id": folder}
    if world.group is not None:
        options["process_group"] = world.group
    if on_thread:
        return dcp.async_save(dict(tensors), **options).result  # type: ignore[no-any-return, union-attr]
    dcp.save(dict(tensors), no_dist=world.group is None, **options)
    return lambda: None


def quiet_dcp() -> None:
    """Silence two warnings that DCP gives about its own code; one of them comes at every save of a single process."""
    for message in ("TypedStorage is deprecated", "torch.distributed is disabled"):
        warnings.filterwarnings("ignore", message=message, module="torch.distributed.checkpoint")
