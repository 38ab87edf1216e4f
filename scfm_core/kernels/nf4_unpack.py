"""The Triton kernel of `scfm_core.kernels.nf4.dequantise_nf4`: it reads 0.56 bytes and writes 2 bytes for an element of bf16."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 1024  # of a program


@triton.jit
def _unpack_kernel(values, scale, levels, output, count, BYTES: tl.constexpr, HALF_BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = place < count
    byte = tl.load(values + place, mask=inside, other=0).to(tl.int32)
    largest = tl.load(scale + place // HALF_BLOCK, mask=inside, other=0.0)
    first = tl.load(levels + (byte >> 4)) * largest
    second = tl.load(levels + (byte & 15)) * largest
    places = tl.program_id(0).to(tl.int64) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    both = tl.interleave(first, second).to(output.dtype.element_ty)
    tl.store(output + places, both, mask=places < 2 * count)


def unpack(values: Tensor, scale: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Packed weights uint8 [out, in / 2], their scales fp32 [out * in / 64] and the 16 levels -> [out, in] in `dtype`."""
    output = torch.empty(values.shape[0], 2 * values.shape[1], dtype=dtype, device=values.device)
    count = values.numel()
    half_block = count // scale.numel()  # bytes that share a scale
    _unpack_kernel[(triton.cdiv(count, _BYTES),)](values, scale, levels, output, count, _BYTES, half_block)
    return output
