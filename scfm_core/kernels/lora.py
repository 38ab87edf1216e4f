"""A linear with a low-rank correction of per-sample strength: `y = x W + scale * (x A) B`, with one write of `y`.

All work is in matrix products, for which the vendor's library is fastest; no operation here needs Triton. Eager PyTorch adds
memory traffic: the second product writes its own [rows, out] tensor, and a third kernel reads both tensors to add them. Here
the product accumulates into the base's result, and in the backward into the gradient of `x`. This reduces the traffic of the
adapters in a Flux.1-dev forward from about 23 GB to 14 GB, at 1536 tokens and batch 1 (counted). Under selective
checkpointing the results of one operation are saved instead of those of three products.

The factors are fp32 masters. The products need them in the dtype of `x`: the caller gives these `copies`, or each call casts.
The masters get the gradient in their own dtype, on a GPU directly from the fp32 accumulators of the product.

One product for the A of queries, keys and values would read `x` once instead of three times. This is not implemented:
it would save 2 of the 25 tensors that the adapters of a single block read or write.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Copies = tuple[Tensor, Tensor]
"""A and B in the dtype of `x`."""


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    copies: Copies | None = None,
) -> Tensor:
    """`x W^T + bias + scale * (x A^T) B^T`. `reference.lora_linear_reference` is the definition.

    Args:
        x: [B, ..., in]. The first axis may also be B * n, with n adjacent rows of each sample: Krea 2's attention over the
            layers of its text encoder has samples x tokens there.
        weight: W [out, in], in the dtype of `x`, as is `bias`.
        bias: [out].
        down: A [rank, in], in the dtype of `x` or fp32. Its gradient has its dtype.
        up: B [out, rank], as `down`.
        scale: of the correction, fp32 [B]; it gets no gradient.
        copies: the values of `down` and `up` in the dtype of `x`. Then these two are not read, but they get the gradients.

    Returns:
        [B, ..., out] in the dtype of `x`.
    """
    return _lora_linear(x, weight, bias, down, up, scale, *(copies or (None, None)))[0]


def lora_add(base: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor, copies: Copies | None = None) -> Tensor:
    """`base + scale * (x A^T) B^T`, for a base product [B, ..., out] that was computed before. See `lora_linear`."""
    return _lora_add(base, x, down, up, scale, *(copies or (None, None)))[0]


def _in_dtype(factor: Tensor, copy: Tensor | None, x: Tensor) -> Tensor:
    return factor.to(x.dtype) if copy is None else copy


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _scaled(low: Tensor, scale: Tensor) -> Tensor:
    """Rows [B * n, rank], each multiplied by the scale of its sample."""
    # Scale the narrow product, where it costs least, and in fp32: in bf16, 3 ** -0.5 would be off by up to 0.2 %.
    return (low.view(scale.shape[0], -1, low.shape[-1]) * scale[:, None, None]).to(low.dtype).view_as(low)


@torch.library.custom_op("scfm::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    down_copy: Tensor | None,
    up_copy: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The result, and the scaled `x A^T` [B * n, rank], which the gradient of B needs."""
    rows = _rows(x)
    output = F.linear(rows, weight, bias)
    low = _scaled(rows @ _in_dtype(down, down_copy, x).T, scale)
    output.addmm_(low, _in_dtype(up, up_copy, x).T)
    return output.view(*x.shape[:-1], -1), low


@_lora_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(x.numel() // x.shape[-1], down.shape[0])


@torch.library.custom_op("scfm::lora_add", mutates_args=())
def _lora_add(
    base: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    down_copy: Tensor | None,
    up_copy: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `_lora_linear`."""
    low = _scaled(_rows(x) @ _in_dtype(down, down_copy, x).T, scale)
    return torch.addmm(_rows(base), low, _in_dtype(up, up_copy, x).T).view(base.shape), low


@_lora_add.register_fake
def _(base: Tensor, x: Tensor, down: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return base.new_empty(base.shape), x.new_empty(x.numel() // x.shape[-1], down.shape[0])


@torch.library.custom_op("scfm::lora_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    low: Tensor,
    needs: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, W, bias, A and B; an empty tensor for each that is not in `needs`. Those of A and B are of `dtype`."""
    rows, grad = _rows(x), _rows(grad)
    down, up = down.to(x.dtype), up.to(x.dtype)
    grad_low = _scaled(grad @ up, scale)
    empty = grad.new_empty(0)
    grad_x = empty
    if needs[0]:
        grad_x = (grad_low @ down if weight is None else (grad @ weight).addmm_(grad_low, down)).view(x.shape)
    return (
        grad_x,
        grad.T @ rows if needs[1] else empty.clone(),
        grad.sum(0) if needs[2] else empty.clone(),
        _product(grad_low.T, rows, dtype) if needs[3] else empty.to(dtype, copy=True),
        _product(grad.T, low, dtype) if needs[4] else empty.to(dtype, copy=True),
    )


def _product(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix product in `dtype`; on a GPU it is not rounded to the dtype of the factors before."""
    if one.is_cuda and one.dtype != dtype == torch.float32:
        return torch.mm(one, other, out_dtype=dtype)  # PyTorch has it for GPUs only
    return (one @ other).to(dtype)


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    low: Tensor,
    needs: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    outputs = up.shape[0]
    shapes = (x.shape, (outputs, x.shape[-1]), (outputs,), down.shape, up.shape)
    dtypes = (grad.dtype, grad.dtype, grad.dtype, dtype, dtype)
    return tuple(
        grad.new_empty(shape if needed else 0, dtype=kind)
        for shape, needed, kind in zip(shapes, needs, dtypes, strict=True)
    )


def _save(ctx: Any, x: Tensor, weight: Tensor | None, factors: tuple, low: Tensor) -> None:
    down, up, scale, down_copy, up_copy = factors
    ctx.set_materialize_grads(False)  # only the backward uses `low`
    ctx.dtype = down.dtype
    saved = (down if down_copy is None else down_copy, up if up_copy is None else up_copy)
    ctx.save_for_backward(x, weight, *saved, scale, low)


def _gradients(ctx: Any, grad: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """Of x, W, bias, A and B."""
    found = _backward(grad, *ctx.saved_tensors, needs, ctx.dtype)
    return [gradient if needed else None for gradient, needed in zip(found, needs, strict=True)]


def _setup_linear(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs[0], inputs[1], inputs[3:], output[1])


def _linear_gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 8
    return *_gradients(ctx, grad, list(ctx.needs_input_grad[:5])), None, None, None


def _setup_add(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs[1], None, inputs[2:], output[1])


def _add_gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 7
    of_base, of_x, of_down, of_up = ctx.needs_input_grad[:4]
    x, _, _, down, up = _gradients(ctx, grad, [of_x, False, False, of_down, of_up])
    return grad if of_base else None, x, down, up, None, None, None


_lora_linear.register_autograd(_linear_gradients, setup_context=_setup_linear)
_lora_add.register_autograd(_add_gradients, setup_context=_setup_add)


@register_flop_formula(torch.ops.scfm.lora_linear)
def _flops_of_linear(x: Any, weight: Any, bias: Any, down: Any, *_: Any, **__: Any) -> int:
    return 2 * _number_of_rows(x) * (x[-1] * weight[0] + down[0] * (x[-1] + weight[0]))


@register_flop_formula(torch.ops.scfm.lora_add)
def _flops_of_add(base: Any, x: Any, down: Any, *_: Any, **__: Any) -> int:
    return 2 * _number_of_rows(x) * down[0] * (x[-1] + base[-1])


@register_flop_formula(torch.ops.scfm.lora_backward)
def _flops_of_backward(
    grad: Any, x: Any, weight: Any, down: Any, up: Any, scale: Any, low: Any, needs: list[bool], *_: Any, **__: Any
) -> int:
    rank, inputs, outputs = down[0], x[-1], grad[-1]
    of_x, of_weight, _of_bias, of_down, of_up = needs
    base = inputs * outputs * ((of_x and weight is not None) + of_weight)
    return 2 * _number_of_rows(x) * (base + rank * (outputs * (1 + of_up) + inputs * (of_x + of_down)))


def _number_of_rows(shape: Any) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows
