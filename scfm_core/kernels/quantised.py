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
from scfm_core.kernels.lora import Copies
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
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    strength: Tensor,
    copies: Copies | None = None,
) -> Tensor:
    """`x W^T + bias + strength * (x A^T) B^T`; see `scfm_core.kernels.lora.lora_linear`. W and bias get no gradient."""
    return _lora_linear(x, values, scale, bias, down, up, strength, *(copies or (None, None)))[0]


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
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    strength: Tensor,
    down_copy: Tensor | None,
    up_copy: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `scfm::lora_linear`."""
    weight = dequantise(values, scale, x.dtype)
    return torch.ops.scfm.lora_linear(x, weight, bias, down, up, strength, down_copy, up_copy)  # type: ignore[no-any-return]


@_lora_linear.register_fake
def _(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, down: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], values.shape[0]), x.new_empty(x.numel() // x.shape[-1], down.shape[0])


@torch.library.custom_op("scfm::quantised_lora_backward", mutates_args=())
def _lora_backward(
    grad: Tensor, x: Tensor, values: Tensor, scale: Tensor, down: Tensor, up: Tensor, strength: Tensor, low: Tensor,
    needs: list[bool], dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, A and B; an empty tensor for each that is not in `needs`. Those of A and B are of `dtype`."""
    weight = dequantise(values, scale, x.dtype) if needs[0] else None
    of_x, of_down, of_up = needs
    needed = [of_x, False, False, of_down, of_up]
    grad_x, _, _, grad_down, grad_up = torch.ops.scfm.lora_backward(
        grad, x, weight, down, up, strength, low, needed, dtype
    )
    return grad_x, grad_down, grad_up


@_lora_backward.register_fake
def _(
    grad: Tensor, x: Tensor, values: Tensor, scale: Tensor, down: Tensor, up: Tensor, strength: Tensor, low: Tensor,
    needs: list[bool], dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    kinds = ((x.shape, grad.dtype), (down.shape, dtype), (up.shape, dtype))
    return tuple(
        grad.new_empty(shape if needed else 0, dtype=kind) for (shape, kind), needed in zip(kinds, needs, strict=True)
    )


def _keep_all(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, values, scale, _, down, up, strength, down_copy, up_copy = inputs
    ctx.set_materialize_grads(False)  # only the backward uses the second output
    ctx.dtype = down.dtype
    factors = (down if down_copy is None else down_copy, up if up_copy is None else up_copy)
    ctx.save_for_backward(x, values, scale, *factors, strength, output[1])


def _lora_gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 9
    needs = [ctx.needs_input_grad[place] for place in (0, 4, 5)]
    found = _lora_backward(grad, *ctx.saved_tensors, needs, ctx.dtype)
    grad_x, grad_down, grad_up = (part if needed else None for part, needed in zip(found, needs, strict=True))
    return grad_x, None, None, None, grad_down, grad_up, None, None, None


_lora_linear.register_autograd(_lora_gradients, setup_context=_keep_all)


@register_flop_formula([torch.ops.scfm.quantised_linear, torch.ops.scfm.quantised_linear_backward])
def _(x: list[int], values: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    """A product of x [..., in] and W [out, in], or of a gradient [..., out] and W."""
    return 2 * math.prod(x) * out_shape[-1]


@register_flop_formula(torch.ops.scfm.quantised_lora_linear)
def _(x: list[int], values: list[int], scale: list[int], bias: Any, down: list[int], *_: Any, **__: Any) -> int:
    rows, inputs, outputs, rank = math.prod(x[:-1]), x[-1], values[0], down[0]
    return 2 * rows * (inputs * outputs + rank * (inputs + outputs))


@register_flop_formula(torch.ops.scfm.quantised_lora_backward)
def _(
    grad: list[int], x: list[int], values: list[int], scale: list[int], down: list[int], up: list[int],
    strength: list[int], low: list[int], needs: list[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    rows, inputs, outputs, rank = math.prod(x[:-1]), x[-1], values[0], down[0]
    product = inputs * outputs * needs[0]
    return 2 * rows * (product + rank * (outputs + inputs * (needs[0] + needs[1]) + outputs * needs[2]))
