"""NF4, the 4-bit type of QLoRA (arXiv 2305.14314): each weight is one of 16 quantiles of a normal distribution, times the largest
absolute value of its block of 64.

Packed weights are those of bitsandbytes, bit for bit. The package itself is not used: where it is installed, diffusers and PEFT
import it and with it all of inductor, 0.8 s at every start; and its kernel for CPUs is wrong for some sizes of rows (version 0.50.2).
"""

import functools
import importlib.util

import torch
from torch import Tensor

BLOCK = 64
"""Elements that share one scale."""
_PART = 1 << 24
"""Elements that are packed at a time: packing needs some ten bytes for each of them."""
# Appendix E of the paper.
_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.cache
def levels(device: torch.device) -> Tensor:
    """The 16 values, fp32, ascending. Made once: a copy of numbers of the host to a GPU waits for the GPU's queue."""
    return torch.tensor(_LEVELS, device=device)


def fits_nf4(outputs: int, inputs: int) -> bool:
    """Whether a weight can be packed: whole bytes in each row, whole blocks in the weight."""
    return inputs % 2 == 0 and outputs * inputs % BLOCK == 0


def quantise_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight [out, in] of bf16 or fp32.

    Returns:
        uint8 [out, in / 2], in each byte two elements, the first one in the high bits; fp32 [out * in / 64], the scales.
    """
    table = levels(weight.device)
    middles = (table[1:] + table[:-1]) / 2
    values, scales = [], []
    for part in weight.reshape(-1).split(_PART):
        blocks = part.view(-1, BLOCK).float()
        scale = blocks.abs().amax(dim=1)
        places = torch.bucketize(blocks * (1 / scale.clamp(min=1e-38))[:, None], middles, out_int32=True).view(-1, 2)
        values.append((places[:, 0] << 4 | places[:, 1]).to(torch.uint8))
        scales.append(scale)
    return torch.cat(values).view(weight.shape[0], -1), torch.cat(scales)


def dequantise_nf4(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of `quantise_nf4` in `dtype`, by the Triton kernel on a GPU."""
    if values.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from scfm_core.kernels.nf4_unpack import unpack

        return unpack(values, scale, levels(values.device), dtype)
    return dequantise_nf4_reference(values, scale, dtype)


def dequantise_nf4_reference(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantise_nf4` in plain PyTorch."""
    if values.is_meta:  # one operator with the traffic of the kernel, for a trace of the step
        weight = torch.empty(values.shape[0], 2 * values.shape[1], dtype=dtype, device="meta")
        weight.view(-1, 2).copy_(values.view(-1, 1))
        return weight
    both = torch.cartesian_prod(*2 * [levels(values.device)])  # the two elements of each byte
    weight = both.index_select(0, values.reshape(-1).int()).view(-1, BLOCK) * scale[:, None]
    return weight.to(dtype).view(values.shape[0], -1)
