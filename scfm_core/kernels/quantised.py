"""Linears with a frozen weight of one byte or half a byte per element: `y = x W^T + bias + strength * (x A^T) B^T`.

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


def quantised_lora_linear(
    x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, strength: Tensor
) -> Tensor:
    """`x W^T + bias + strength * (x A^T) B^T`; see `scfm_core.kernels.lora.lora_linear`. W and bias get no gradient."""
    return _lora_linear(x, values, scale, bias, down, up, strength)[0]


def _weighted(low: Tensor, strength: Tensor) -> Tensor:
    """Rows [B * n, rank], each multiplied by the strength of its sample, in fp32."""
    return (low.view(strength.shape[0], -1, low.shape[-1]) * strength[:, None, None]).to(low.dtype).view_as(low)


@torch.library.custom_op("scfm::quantised_linear", mutates_args=())
def _linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, dequantise(values, scale, x.dtype), bias)


@_linear.register_fake
def _(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
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


@torch.library.custom_op("scfm::quantised_lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, strength: Tensor
) -> tuple[Tensor, Tensor]:
    """The result, and the weighted `x A^T` [B * n, rank], which the gradient of B needs."""
    rows = x.reshape(-1, x.shape[-1])
    output = F.linear(rows, dequantise(values, scale, x.dtype), bias)
    low = _weighted(rows @ down.T, strength)
    output.addmm_(low, up.T)
    return output.view(*x.shape[:-1], -1), low


@_lora_linear.register_fake
def _(
    x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, strength: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], values.shape[0]), x.new_empty(x.numel() // x.shape[-1], down.shape[0])


@torch.library.custom_op("scfm::quantised_lora_linear_backward", mutates_args=())
def _lora_backward(
    grad: Tensor, x: Tensor, values: Tensor, scale: Tensor, down: Tensor, up: Tensor, strength: Tensor, low: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, A and B; an empty tensor for each that is not in `needs`."""
    rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_low = _weighted(grad @ up, strength)
    grad_x = grad.new_empty(0)
    if needs[0]:
        grad_x = grad @ dequantise(values, scale, grad.dtype)
        grad_x = grad_x.addmm_(grad_low, down).view(x.shape)
    return (
        grad_x,
        grad_low.T @ rows if needs[1] else grad.new_empty(0),
        grad.T @ low if needs[2] else grad.new_empty(0),
    )


@_lora_backward.register_fake
def _(
    grad: Tensor, x: Tensor, values: Tensor, scale: Tensor, down: Tensor, up: Tensor, strength: Tensor, low: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = (x.shape, down.shape, up.shape)
    return tuple(grad.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs, strict=True))


def _keep_all(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, values, scale, _, down, up, strength = inputs
    ctx.set_materialize_grads(False)  # only the backward uses the second output
    ctx.save_for_backward(x, values, scale, down, up, strength, output[1])


def _lora_gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 7
    needs = [ctx.needs_input_grad[place] for place in (0, 4, 5)]
    found = _lora_backward(grad, *ctx.saved_tensors, needs)
    grad_x, grad_down, grad_up = (part if needed else None for part, needed in zip(found, needs, strict=True))
    return grad_x, None, None, None, grad_down, grad_up, None


_lora_linear.register_autograd(_lora_gradients, setup_context=_keep_all)


@register_flop_formula([torch.ops.scfm.quantised_linear, torch.ops.scfm.quantised_linear_backward])
def _(x: list[int], values: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    """A product of x [..., in] and W [out, in], or of a gradient [..., out] and W."""
    return 2 * math.prod(x) * out_shape[-1]


@register_flop_formula(torch.ops.scfm.quantised_lora_linear)
def _(x: list[int], values: list[int], scale: list[int], bias: Any, down: list[int], *_: Any, **__: Any) -> int:
    rows, inputs, outputs, rank = math.prod(x[:-1]), x[-1], values[0], down[0]
    return 2 * rows * (inputs * outputs + rank * (inputs + outputs))


@register_flop_formula(torch.ops.scfm.quantised_lora_linear_backward)
def _(
    grad: list[int], x: list[int], values: list[int], scale: list[int], down: list[int], up: list[int],
    strength: list[int], low: list[int], needs: list[bool], **_: Any,
) -> int:  # fmt: skip
    rows, inputs, outputs, rank = math.prod(x[:-1]), x[-1], values[0], down[0]
    product = inputs * outputs * needs[0]
    return 2 * rows * (product + rank * (outputs + inputs * (needs[0] + needs[1]) + outputs * needs[2]))
