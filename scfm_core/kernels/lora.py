"""Linears with a low-rank correction of per-sample strength: `y = x W + scale * (x A) B`, with one write of `y`.

All work is in matrix products, for which the vendor's library is fastest; no operation here needs Triton. Eager PyTorch adds
memory traffic: the second product writes its own [rows, out] tensor, and a third kernel reads both tensors to add them. Here
the product accumulates into the base's result, and in the backward into the gradient of `x`. This reduces the traffic of the
adapters in a Flux.1-dev forward from about 23 GB to 14 GB, at 1536 tokens and batch 1 (counted). Under selective
checkpointing the results of one operation are saved instead of those of three products.

The factors are fp32 masters. The products need them in the dtype of `x`: the caller gives these copies, or each call casts.
The masters get the gradient in their own dtype, on a GPU directly from the fp32 accumulators of the product.

Several linears of the same `x`, such as those of queries, keys, values and feed-forward, are one operation, `lora_linears`. One
product with all A reads `x` once, and so does the product for their gradients. The gradients of `x` accumulate in the
products, where autograd would write one for each linear and then add them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from scfm_core.kernels.lora_products import gradient_shapes, gradients, products, rows_of, scale_rows, unpacked

Copies = tuple[Tensor, Tensor]
"""A and B in the dtype of `x`."""


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: Tensor,
    copies: Sequence[Copies] = (),
    weight_scales: Sequence[Tensor] = (),
) -> list[Tensor]:
    """`x W^T + bias + scale * (x A^T) B^T` for each of n linears. `reference.lora_linear_reference` is the definition.

    Args:
        x: [B, ..., in]. The first axis may also be B * m, with m adjacent rows of each sample: Krea 2's attention over the
            layers of its text encoder has samples x tokens there.
        weights: n times W [out, in], in the dtype of `x`, as are `biases`; or, without gradients, as `quantised.quantise` packs it.
        biases: n times [out], or none.
        downs: n times A [rank, in], all in the dtype of `x` or all in fp32. A gradient has the dtype of its factor.
        ups: n times B [out, rank], as `downs`.
        scale: of the corrections, fp32 [B]; it gets no gradient.
        copies: the values of each A and B in the dtype of `x`, or none. With copies, `downs` and `ups` are not read, but they get
            the gradients. Copies of A that are adjacent in memory are used as they are; others are joined.
        weight_scales: of packed weights. They are dequantised for each product, again in the backward: autograd keeps them packed.

    Returns:
        n times [B, ..., out] in the dtype of `x`.
    """
    flat = [factor for pair in copies for factor in pair]
    lists = (list(weights), list(biases), list(downs), list(ups))
    return _lora_linears(x, *lists, scale, flat, list(weight_scales))[:-1]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    copies: Copies | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """`lora_linears` of one linear. In eager mode autograd takes 0.1 ms longer for an operation on lists."""
    return _lora_linear(x, weight, bias, down, up, scale, *(copies or (None, None)), weight_scale)[0]


def lora_add(base: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor, copies: Copies | None = None) -> Tensor:
    """`base + scale * (x A^T) B^T`, for a base product [B, ..., out] that was computed before. See `lora_linears`."""
    return _lora_add(base, x, down, up, scale, *(copies or (None, None)))[0]


@torch.library.custom_op("scfm::lora_linears", mutates_args=())
def _lora_linears(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scale: Tensor,
    copies: list[Tensor],
    weight_scales: list[Tensor],
) -> list[Tensor]:
    """See `products`."""
    dense = unpacked(weights, weight_scales, x.dtype)
    return products(x, dense, biases or [None] * len(weights), downs, ups, scale, copies)


@_lora_linears.register_fake
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor], downs: list[Tensor], *_: object) -> list[Tensor]:
    low = x.new_empty(x.numel() // x.shape[-1], len(downs) * downs[0].shape[0])
    return [*(x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights), low]


# Last arguments that may be None have it as their default: inductor (torch 2.10) leaves such arguments out.
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
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `products`."""
    copies = [] if down_copy is None or up_copy is None else [down_copy, up_copy]
    dense = unpacked([weight], [] if weight_scale is None else [weight_scale], x.dtype)
    output, low = products(x, dense, [bias], [down], [up], scale, copies)
    return output, low


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
    down_copy: Tensor | None = None,
    up_copy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result and the scaled `x A^T`."""
    down, up = (down if down_copy is None else down_copy).to(x.dtype), (up if up_copy is None else up_copy).to(x.dtype)
    low = scale_rows(rows_of(x) @ down.T, scale)
    return torch.addmm(rows_of(base), low, up.T).view(base.shape), low


@_lora_add.register_fake
def _(base: Tensor, x: Tensor, down: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return base.new_empty(base.shape), x.new_empty(x.numel() // x.shape[-1], down.shape[0])


# One linear has operations of its own: inductor (torch 2.10) calls an operation on a list of one tensor with the tensor.
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
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dense = unpacked([] if weight is None else [weight], [] if weight_scale is None else [weight_scale], x.dtype)
    groups = gradients([grad], x, dense, [down], [up], scale, low, needs, dtype)
    of_x, of_weight, of_bias, of_down, of_up = (group[0] for group in groups)
    return of_x, of_weight, of_bias, of_down, of_up


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
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return tuple(group[0] for group in gradient_shapes([grad], x, [up], low, needs, dtype))


@torch.library.custom_op("scfm::lora_linears_backward", mutates_args=())
def _linears_backward(
    grads: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scale: Tensor,
    low: Tensor,
    needs: list[bool],
    dtype: torch.dtype,
    weight_scales: list[Tensor],
) -> list[Tensor]:
    dense = unpacked(weights, weight_scales, x.dtype)
    return [one for group in gradients(grads, x, dense, downs, ups, scale, low, needs, dtype) for one in group]


@_linears_backward.register_fake
def _(
    grads: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scale: Tensor,
    low: Tensor,
    needs: list[bool],
    dtype: torch.dtype,
    weight_scales: list[Tensor],
) -> list[Tensor]:
    return [one for group in gradient_shapes(grads, x, ups, low, needs, dtype) for one in group]


def _setup_linear(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, *factors, weight_scale = inputs
    _save(ctx, x, weight, weight_scale, factors, output[1])


def _setup_add(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, x, *factors = inputs
    _save(ctx, x, None, None, factors, output[1])


def _save(ctx: Any, x: Tensor, weight: Tensor | None, weight_scale: Tensor | None, factors: list, low: Tensor) -> None:
    down, up, scale, down_copy, up_copy = factors
    ctx.set_materialize_grads(False)  # only the backward uses `low`
    ctx.dtype = down.dtype
    saved = (down if down_copy is None else down_copy, up if up_copy is None else up_copy)
    ctx.save_for_backward(x, weight, *saved, scale, low, weight_scale)


def _linear_gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    needs, (*saved, weight_scale) = list(ctx.needs_input_grad[:5]), ctx.saved_tensors
    return *_needed(_backward(grad, *saved, needs, ctx.dtype, weight_scale), needs), None, None, None, None


def _add_gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    of_base, *others = ctx.needs_input_grad[:4]
    needs = [others[0], False, False, *others[1:]]
    x, _, _, down, up = _needed(_backward(grad, *ctx.saved_tensors[:-1], needs, ctx.dtype, None), needs)
    return grad if of_base else None, x, down, up, None, None, None


def _needed(found: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if needed else None for gradient, needed in zip(found, needs, strict=True)]


def _setup_linears(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, weights, biases, downs, ups, scale, copies, weight_scales = inputs
    ctx.set_materialize_grads(False)
    ctx.count, ctx.biases, ctx.copies, ctx.dtype = len(downs), len(biases), len(copies), downs[0].dtype
    factors = (copies[0::2] or downs, copies[1::2] or ups)
    ctx.save_for_backward(x, scale, output[-1], *weights, *factors[0], *factors[1], *weight_scales)


def _linears_gradients(ctx: Any, grads: list[Tensor | None]) -> tuple:
    n, (x, scale, low, *rest) = ctx.count, ctx.saved_tensors
    needs = [any(needed) if isinstance(needed, list) else needed for needed in ctx.needs_input_grad[:5]]
    weights, downs, ups, weight_scales = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
    given = [
        x.new_zeros(*x.shape[:-1], weight.shape[0]) if grad is None else grad
        for grad, weight in zip(grads[:-1], weights, strict=True)
    ]
    found = _linears_backward(given, x, weights, downs, ups, scale, low, needs, ctx.dtype, weight_scales)
    of_weights, of_biases, of_down, of_ups = found[1 : n + 1], found[n + 1 : 2 * n + 1], found[2 * n + 1], found[-n:]
    return (
        found[0] if needs[0] else None,
        of_weights if needs[1] else [None] * n,
        of_biases if needs[2] else [None] * ctx.biases,
        list(of_down.split(low.shape[-1] // n)) if needs[3] else [None] * n,
        of_ups if needs[4] else [None] * n,
        None,
        [None] * ctx.copies,
        [None] * len(weight_scales),
    )


_lora_linears.register_autograd(_linears_gradients, setup_context=_setup_linears)
_lora_linear.register_autograd(_linear_gradients, setup_context=_setup_linear)
_lora_add.register_autograd(_add_gradients, setup_context=_setup_add)


@register_flop_formula(torch.ops.scfm.lora_linears)
def _flops_of_linears(x: Any, weights: Any, biases: Any, downs: Any, *_: Any, **__: Any) -> int:
    outputs, inputs = sum(weight[0] for weight in weights), x[-1]
    return 2 * math.prod(x[:-1]) * (inputs * outputs + downs[0][0] * (len(downs) * inputs + outputs))


@register_flop_formula(torch.ops.scfm.lora_linear)
def _flops_of_linear(x: Any, weight: Any, bias: Any, down: Any, *_: Any, **__: Any) -> int:
    return _flops_of_linears(x, [weight], bias, [down])


@register_flop_formula(torch.ops.scfm.lora_add)
def _flops_of_add(base: Any, x: Any, down: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * down[0] * (x[-1] + base[-1])


@register_flop_formula(torch.ops.scfm.lora_linears_backward)
def _flops_of_linears_backward(
    grads: Any, x: Any, weights: Any, downs: Any, ups: Any, scale: Any, low: Any, needs: list[bool], *_: Any, **__: Any
) -> int:
    outputs, inputs, rank = sum(grad[-1] for grad in grads), x[-1], downs[0][0]
    of_x, of_weights, _of_biases, of_downs, of_ups = needs
    base = inputs * outputs * ((of_x and bool(weights)) + of_weights)
    adapters = rank * (outputs * (1 + of_ups) + len(downs) * inputs * (of_x + of_downs))
    return 2 * math.prod(x[:-1]) * (base + adapters)


@register_flop_formula(torch.ops.scfm.lora_backward)
def _flops_of_backward(grad: Any, x: Any, weight: Any, down: Any, *others: Any, **__: Any) -> int:
    return _flops_of_linears_backward([grad], x, [] if weight is None else [weight], [down], *others)
