"""The matrix products of adapted linears, forward and backward, on plain tensors. `kernels/lora.py` makes operations of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm_core.kernels.launch import Tile
from scfm_core.kernels.quantised import dequantise

MIN_ROWS = 512
"""Fewer rows, such as those of modulations, always use the vendor's library."""
_tiles: dict[str, Tile] = {}


def use_tiles(tiles: Mapping[str, Tile]) -> None:
    """From now on Triton computes the products of these shapes (`shape_of`) in this process; the library computes all others."""
    _tiles.clear()
    _tiles.update(tiles)


def shape_of(weight: Tensor) -> str:
    """Name of products with `weight` [in, out], by sizes and order in memory: rows are contiguous in the backward, columns in the
    forward."""
    order = "columns" if weight.stride(0) == 1 else "rows"
    return f"{weight.shape[0]} x {weight.shape[1]}, {order}, {str(weight.dtype).removeprefix('torch.')}"


def add_product(rows: Tensor, weight: Tensor, low: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows weight + low factor + bias`, [rows, out].

    Args:
        rows: [rows, in].
        weight: [in, out], or the transposed view of such a matrix.
        low: [rows, rank].
        factor: [rank, out].
        bias: [out].
    """
    if _tiles and rows.shape[0] >= MIN_ROWS and (tile := _tiles.get(shape_of(weight))) is not None:
        from scfm_core.kernels.lora_gemm import lora_gemm

        return lora_gemm(rows, weight, low, factor, bias, tile)
    return F.linear(rows, weight.T, bias).addmm_(low, factor)


def rows_of(x: Tensor) -> Tensor:
    """[..., in] -> [rows, in]."""
    return x.reshape(-1, x.shape[-1])


def unpacked(weights: Sequence[Tensor], scales: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Weights [out, in] for a product in `dtype`; `scales` are those of packed ones, see `quantised.quantise`. One is unpacked at a time."""
    if not scales:
        yield from weights
    else:
        for weight, scale in zip(weights, scales, strict=True):
            yield dequantise(weight, scale, dtype)


def _values(
    downs: Sequence[Tensor], ups: Sequence[Tensor], copies: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """All A as one [n * rank, in], and every B, in `dtype`."""
    downs, ups = (copies[0::2], copies[1::2]) if copies else (downs, ups)
    return joined([down.to(dtype) for down in downs]), [up.to(dtype) for up in ups]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Matrices of one shape, one below the other. They are not copied if they lie so in memory."""
    first, size = parts[0], parts[0].numel()
    if all(
        part.is_contiguous()
        and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == first.storage_offset() + number * size
        for number, part in enumerate(parts)
    ):
        return first.as_strided((len(parts) * first.shape[0], first.shape[1]), (first.shape[1], 1))
    return torch.cat(list(parts))


def scale_rows(low: Tensor, scale: Tensor) -> Tensor:
    """Multiply rows [B * m, n * rank] by the scales of their samples, in place."""
    # The narrow product, where it costs least, and in fp32: in bf16, 3 ** -0.5 would be off by up to 0.2 %.
    low.view(scale.shape[0], -1, low.shape[-1]).mul_(scale[:, None, None])
    return low


def products(
    x: Tensor,
    weights: Iterable[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: Tensor,
    copies: Sequence[Tensor],
) -> list[Tensor]:
    """The results of n linears, and the scaled `x A^T` [B * m, n * rank], which the gradients of B need.

    Arguments are those of `lora_linears`; `biases` has n entries, `copies` A and B of one linear after the other.
    """
    rows, (down, ups) = rows_of(x), _values(downs, ups, copies, x.dtype)
    low = scale_rows(rows @ down.T, scale)
    outputs = []
    for weight, bias, up, part in zip(weights, biases, ups, low.chunk(len(ups), dim=1), strict=True):
        outputs.append(add_product(rows, weight.T, part, up.T, bias).view(*x.shape[:-1], -1))
    return [*outputs, low]


def gradients(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Iterable[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: Tensor,
    low: Tensor,
    needs: Sequence[bool],
    dtype: torch.dtype,
) -> list[list[Tensor]]:
    """Gradients of x, of each W, of each bias, of all A as one [n * rank, in], and of each B; those of A and B in `dtype`.

    A group that is not in `needs` has empty tensors. Without weights, the gradient of x is the adapters' part.
    """
    rows, grads, (down, ups) = rows_of(x), [rows_of(grad) for grad in grads], _values(downs, ups, (), x.dtype)
    grad_low = torch.empty_like(low)
    parts = low.chunk(len(ups), dim=1)
    for grad, up, part in zip(grads, ups, grad_low.chunk(len(ups), dim=1), strict=True):
        torch.mm(grad, up, out=part)
    scale_rows(grad_low, scale)
    groups: tuple[Callable[[], list[Tensor]], ...] = (
        lambda: [_grad_x(grads, weights, grad_low, down).view(x.shape)],
        lambda: [grad.T @ rows for grad in grads],
        lambda: [grad.sum(0) for grad in grads],
        lambda: [_product(grad_low.T, rows, dtype)],
        lambda: [_product(grad.T, part, dtype) for grad, part in zip(grads, parts, strict=True)],
    )
    numbers = (1, len(grads), len(grads), 1, len(grads))
    return [
        group() if needed else [x.new_empty(0) for _ in range(number)]
        for group, needed, number in zip(groups, needs, numbers, strict=True)
    ]


def _grad_x(grads: Sequence[Tensor], weights: Iterable[Tensor], grad_low: Tensor, down: Tensor) -> Tensor:
    grad_x: Tensor | None = None
    for number, weight in enumerate(weights):
        if grad_x is None:
            grad_x = add_product(grads[0], weight, grad_low, down)
        else:
            grad_x.addmm_(grads[number], weight)
    return grad_low @ down if grad_x is None else grad_x


def _product(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix product in `dtype`; on a GPU it is not rounded to the dtype of the factors before."""
    if one.device.type != "cpu" and one.dtype != dtype == torch.float32:
        return torch.mm(one, other, out_dtype=dtype)  # PyTorch has none for CPUs
    return (one @ other).to(dtype)


def gradient_shapes(
    grads: Sequence[Tensor], x: Tensor, ups: Sequence[Tensor], low: Tensor, needs: Sequence[bool], dtype: torch.dtype
) -> list[list[Tensor]]:
    """What `gradients` returns, without values."""
    inputs = x.shape[-1]
    groups: tuple[list[Any], ...] = (
        [x.shape],
        [(grad.shape[-1], inputs) for grad in grads],
        [grad.shape[-1:] for grad in grads],
        [(low.shape[-1], inputs)],
        [up.shape for up in ups],
    )
    return [
        [x.new_empty(shape if needed else 0, dtype=dtype if needed and kind >= 3 else x.dtype) for shape in shapes]
        for kind, (shapes, needed) in enumerate(zip(groups, needs, strict=True))
    ]
