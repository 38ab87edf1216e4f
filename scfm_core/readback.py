"""Values that cross between host and device in a training step. Only `read_back` lets the host wait for the device."""

import torch
from torch import Tensor


def read_back(*tensors: Tensor) -> list[list[float]]:
    """The values of small tensors, flattened, as the host's numbers: one copy and one wait for those of a GPU.

    Args:
        tensors: of any dtype up to 64-bit floating point, on the CPU or on one GPU.
    """
    on_device = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    copied = iter(())
    if on_device:
        together = torch.cat([tensor.detach().double().flatten() for tensor in on_device]).cpu()
        copied = iter(together.split([tensor.numel() for tensor in on_device]))
    return [(tensor.flatten() if tensor.device.type == "cpu" else next(copied)).tolist() for tensor in tensors]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A small tensor, of the host or of `device`, on `device`. The host does not wait: a copy to a GPU starts from pinned memory."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
