"""Linears with a frozen weight of one byte or half a byte per element: `y = x W^T + bias`. With adapters: `kernels/lora.py`.

The weight is dequantised to the dtype of `x` for each product, and again in the backward pass. So only the packed weight stays in
memory, besides one dequantised weight at a time. Each op is one node for autograd, `torch.compile` and activation checkpointing:
autograd would otherwise keep the dequantised weight for the gradient of `x`, and the partitioner of a compiled graph may do so too.

| type | element | scale | bytes per element | relative error of normal weights |
|---|---|---|---|---|
| int8 | -127 to 127 | fp32, one per row | 1 | 0.9 % |
| float8 | float8_e4m3fn | fp32, one per row | 1 | 2.7 % |
| nf4 | see `scfm_core.kernels.nf4` | fp32, one per 64 elements | 0.5625 | 9.2 % |
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from scfm_core.kernels.fp8 import quantise as quantise_float8
from scfm_core.kernels.nf4 import dequantise_nf4, quantise_nf4

Packing = Literal["int8", "float8", "nf4"]


def quantise(weight: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Pack a weight [out, in], bf16 or fp32, on any device.

    Returns:
        values: int8 or float8_e4m3fn [out, in], or for nf4 uint8 [out, in / 2] with two elements in a byte.
        scale: fp32 [out, 1], or for nf4 [out * in / 64].
    """
    if packing == "nf4":
        return quantise_nf4(weight)
    if packing == "float8":
        return quantise_float8(weight)
    scale = weight.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / 127
    return torch.round(weight / scale).to(torch.int8), scale


def dequantise(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`; the dtype of `values` tells how it is packed."""
    if values.dtype == torch.uint8:
        return dequantise_nf4(values, scale, dtype)
    if values.dtype == torch.int8:
        return torch.mul(values, scale, out=torch.empty_like(values, dtype=dtype))
    return values.to(dtype).mul_(scale)


def quantised_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + bias`: x [..., in] in bf16 or fp32 -> [..., out] in the dtype of `x`; `values` and `scale` as `quantise` makes them."""
    return _linear(x, values, scale, bias)


@torch.library.custom_op("scfm::quantised_linear", mutates_args=())
def _linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, dequantise(values, scale, x.dtype), bias)


@_linear.register_fake
def _(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


@torch.library.custom_op("scfm::quantised_linear_backward", mutates_args=())
def _linear_backward(grad: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Gradient of x."""
    return grad @ dequantise(values, scale, grad.dtype)


@_linear_backward.register_fake
def _(grad: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], _inputs(values))


def _inputs(values: Tensor) -> int:
    return values.shape[1] * (2 if values.dtype == torch.uint8 else 1)


def _keep_weight(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _linear_gradients(ctx: Any, grad: Tensor) -> tuple:
    return _linear_backward(grad, *ctx.saved_tensors), None, None, None


_linear.register_autograd(_linear_gradients, setup_context=_keep_weight)


@register_flop_formula([torch.ops.scfm.quantised_linear, torch.ops.scfm.quantised_linear_backward])
def _(x: list[int], values: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    """A product of x [..., in] and W [out, in], or of a gradient [..., out] and W."""
    return 2 * math.prod(x) * out_shape[-1]
