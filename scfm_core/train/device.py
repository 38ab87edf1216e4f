"""The device of this process, and the dtype that it computes in."""

import contextlib
import gc
import os
import platform

import torch

from scfm_core.errors import UserError
from scfm_core.launched import launched_size, local_rank
from scfm_core.train.config import RunConfig

ALLOCATOR_OPTIONS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables from which PyTorch reads the options of its memory allocator."""
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """`run.device` as a device. With several processes on a machine, each takes the GPU of its LOCAL_RANK.

    It also sets the options of PyTorch's memory allocator, which reads them when it allocates for the first time.

    Raises:
        UserError: if the device is unavailable.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"run.device is {name!r}, but torch finds no GPU. Set run.device=cpu, or repair the GPU driver")
    _expand_segments()
    if launched_size() == 1:
        device = torch.device("cuda", torch.device("cuda" if name == "auto" else name).index or 0)
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"run.device={name}, but this machine has {torch.cuda.device_count()} GPUs, numbered from cuda:0"
            )
        return _current(device)
    if ":" in name:
        raise UserError(
            f"run.device={name} names one GPU, but the launcher started {launched_size()} processes. Set it to auto"
        )
    own, count = local_rank(), torch.cuda.device_count()
    if own >= count:
        raise UserError(
            f"the launcher started a process of local rank {own}, but this machine has {count} GPUs. "
            f"Start at most {count} processes on it"
        )
    return _current(torch.device("cuda", own))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within it `device` is the current one: models of one process may be on several GPUs."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _current(device: torch.device) -> torch.device:
    """The device, which becomes the current one: Triton launches on that, wherever its tensors are."""
    torch.cuda.set_device(device)
    return device


def _expand_segments() -> None:
    """Let the segments of GPU memory grow, unless the user chose options of the allocator.

    Otherwise each segment keeps its size: the free parts of two segments serve no tensor that is larger than each. FSDP2's gathered
    weights, gradients and activations have many sizes, so some GiB stay unused. WSL2 may refuse the first such segment with an unknown
    error (https://github.com/pytorch/pytorch/issues/192330).
    """
    is_wsl = "microsoft" in platform.release().lower()
    if not is_wsl and not any(option in os.environ for option in ALLOCATOR_OPTIONS):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def free_unused(device: torch.device) -> None:
    """Return the memory of deleted models to `device`, before others are made.

    Otherwise tensors of other sizes would be put into the blocks of deleted ones, and the rest of each block might stay unused.
    """
    gc.collect()  # reference cycles keep models alive
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Dtype of activations and of the frozen base."""
    return _DTYPES[config.train.compute_dtype]
