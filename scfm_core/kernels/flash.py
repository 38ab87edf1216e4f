"""Fused attention in Triton, forward and backward, without a mask: FlashAttention-2 (arXiv 2307.08691).

Keys and values are read tile by tile with an online softmax, so no S x S matrix is written to memory. The backward runs
two kernels: in one a program owns a tile of keys, in the other a tile of queries. Each result is written once, without
atomics, so it is the same in every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from scfm_core.kernels.launch import accumulator, dense_rows, heads_first, is_interpreted, save_attention

_LOG2_E = 1.4426950408889634


class _Tile(NamedTuple):
    """Rows that a program owns, rows that it reads at a time, and Triton's launch options."""

    own: int
    read: int
    num_warps: int
    num_stages: int


# By head dimension. tests/kernels compiles all of them for compute capability 8.0 and 9.0: none spills registers in
# bf16, and all fit into the A100's 163 KiB of shared memory.
_FORWARD = {64: _Tile(128, 64, 8, 3), 128: _Tile(128, 64, 8, 3)}
_BACKWARD_KEYS = {64: _Tile(128, 32, 8, 2), 128: _Tile(128, 32, 8, 2)}
_BACKWARD_QUERIES = {64: _Tile(128, 32, 8, 2), 128: _Tile(128, 32, 8, 2)}
_SMALL = _Tile(32, 32, 4, 2)


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`softmax(Q K^T / sqrt(D)) V`.

    Args:
        query: [B, S_q, H, D], D 16, 32, 64 or 128.
        key, value: [B, S_k, H, D].

    Returns:
        [B, S_q, H, D], contiguous, in the dtype of `query`.

    Raises:
        ValueError: for another D.
    """
    if query.shape[-1] not in (16, 32, 64, 128):
        raise ValueError(
            f"the Triton attention has heads of 16, 32, 64 or 128, not {query.shape[-1]}: choose another backend"
        )
    return _flash(query, key, value)[0]


def _tile(table: dict[int, _Tile], query: Tensor) -> _Tile:
    if is_interpreted():
        return _SMALL
    tile = table.get(query.shape[-1], _SMALL)
    # Tiles in fp32 are twice as large.
    return tile if query.element_size() == 2 else _SMALL


def _near_rows(tensor: Tensor) -> Tensor:
    """`dense_rows`, copied too if offsets of rows need more than 32 bits, for which the backward has no registers left."""
    return tensor.contiguous() if tensor.shape[1] * tensor.stride(1) >= 2**31 else dense_rows(tensor)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Of batch, sequence and head."""
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


@torch.library.custom_op("scfm::flash_attention", mutates_args=())
def _flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and log2 of each row's softmax denominator, [B, H, S_q]."""
    query, key, value = _near_rows(query), _near_rows(key), _near_rows(value)
    output, lse = _fake_flash(query, key, value)
    batch, queries, heads, dim = query.shape
    keys, tile = key.shape[1], _tile(_FORWARD, query)
    _flash_kernel[(triton.cdiv(queries, tile.own), batch * heads)](
        query, key, value, output, lse, *_strides(query), *_strides(key), *_strides(value), *_strides(output), heads,
        queries, keys, dim**-0.5 * _LOG2_E, DIM=dim, OWN=tile.own, READ=tile.read, EVEN=keys % tile.read == 0,
        WIDEN=is_interpreted(), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return output, lse


@_flash.register_fake
def _fake_flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, queries, dtype=accumulator(query))


@torch.library.custom_op("scfm::flash_attention_backward", mutates_args=())
def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, query, key, value = _near_rows(grad), _near_rows(query), _near_rows(key), _near_rows(value)
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    batch, queries, heads, dim = query.shape
    keys = key.shape[1]
    delta = torch.empty_like(lse)
    _delta_kernel[(triton.cdiv(queries, 32), batch * heads)](
        grad, output, delta, *_strides(grad), *_strides(output), heads, queries, DIM=dim, OWN=32, num_warps=4
    )
    inputs = (query, key, value, grad, lse, delta)
    strides = (*_strides(query), *_strides(key), *_strides(value), *_strides(grad))
    sizes = (heads, queries, keys, dim**-0.5)
    tile = _tile(_BACKWARD_KEYS, query)
    _backward_keys_kernel[(triton.cdiv(keys, tile.own), batch * heads)](
        *inputs, grad_key, grad_value, *strides, *_strides(grad_key), *sizes, DIM=dim, OWN=tile.own, READ=tile.read,
        WIDEN=is_interpreted(), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    tile = _tile(_BACKWARD_QUERIES, query)
    _backward_queries_kernel[(triton.cdiv(queries, tile.own), batch * heads)](
        *inputs, grad_query, *strides, *_strides(grad_query), *sizes, DIM=dim, OWN=tile.own, READ=tile.read,
        EVEN=keys % tile.read == 0, WIDEN=is_interpreted(), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return grad_query, grad_key, grad_value


@_flash_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, _: Tensor | None) -> tuple:
    if grad is None:
        return None, None, None
    return _flash_backward(grad, *ctx.saved_tensors)  # type: ignore[attr-defined, no-any-return]


_flash.register_autograd(_gradients, setup_context=save_attention)


@register_flop_formula(torch.ops.scfm.flash_attention)
def _flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(*map(heads_first, (query, key, value)))


@register_flop_formula(torch.ops.scfm.flash_attention_backward)
def _backward_flops(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    """Seven products: both kernels compute the scores and the gradient of the probabilities. The forward has two."""
    return sdpa_flop_count(*map(heads_first, (query, key, value))) * 7 // 2


@triton.jit
def _rows(pointer, first, count, row, limit, DIM: tl.constexpr):
    """Rows `first + 0 .. count - 1` of [S, DIM]; those at `limit` and beyond are zero."""
    at = first + tl.arange(0, count)
    return tl.load(pointer + at[:, None] * row + tl.arange(0, DIM)[None, :], mask=at[:, None] < limit, other=0.0)


@triton.jit
def _dot(a, b, accumulated, WIDEN: tl.constexpr):
    """`accumulated + a b`. WIDEN is for the interpreter, which multiplies bf16 incorrectly."""
    if WIDEN:
        a, b = a.to(accumulated.dtype), b.to(accumulated.dtype)
    return tl.dot(a, b, accumulated, input_precision="ieee", out_dtype=accumulated.dtype)


@triton.jit
def _flash_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    out_batch, out_row, out_head, heads, queries, keys, scale,
    DIM: tl.constexpr, OWN: tl.constexpr, READ: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """OWN queries against all keys; `scale` includes log2(e), so that exp2 does the work of exp."""
    first = tl.program_id(0) * OWN
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    query = _rows(q_ptr + sample * q_batch + head * q_head, first, OWN, q_row, queries, DIM)
    wide = lse_ptr.dtype.element_ty
    most = tl.full([OWN], float("-inf"), wide)
    total = tl.zeros([OWN], wide)
    result = tl.zeros([OWN, DIM], wide)
    for start in range(0, keys, READ):
        key = _rows(k_ptr, start, READ, k_row, keys, DIM)
        scores = _dot(query, tl.trans(key), tl.zeros([OWN, READ], wide), WIDEN) * scale
        if not EVEN:
            scores = tl.where((start + tl.arange(0, READ))[None, :] < keys, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        value = _rows(v_ptr, start, READ, v_row, keys, DIM)
        result = _dot(weights.to(value.dtype), value, result * shrink[:, None], WIDEN)
        most = higher
    row = first + tl.arange(0, OWN)
    out = out_ptr + sample * out_batch + head * out_head + row[:, None] * out_row + tl.arange(0, DIM)[None, :]
    tl.store(out, (result / total[:, None]).to(out_ptr.dtype.element_ty), mask=row[:, None] < queries)
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * queries + row, most + tl.log2(total), mask=row < queries)


@triton.jit
def _delta_kernel(
    grad_ptr, out_ptr, delta_ptr, grad_batch, grad_row, grad_head, out_batch, out_row, out_head, heads, queries,
    DIM: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """The sum of grad * output over each row; the softmax's backward subtracts it from the gradient of the weights."""
    first = tl.program_id(0) * OWN
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    grad = _rows(grad_ptr + sample * grad_batch + head * grad_head, first, OWN, grad_row, queries, DIM)
    out = _rows(out_ptr + sample * out_batch + head * out_head, first, OWN, out_row, queries, DIM)
    wide = delta_ptr.dtype.element_ty
    row = first + tl.arange(0, OWN)
    place = delta_ptr + tl.program_id(1).to(tl.int64) * queries + row
    tl.store(place, tl.sum(grad.to(wide) * out.to(wide), axis=1), mask=row < queries)


@triton.jit
def _backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, q_batch, q_row, q_head, k_batch, k_row,
    k_head, v_batch, v_row, v_head, grad_batch, grad_row, grad_head, out_batch, out_row, out_head, heads, queries, keys,
    scale,
    DIM: tl.constexpr, OWN: tl.constexpr, READ: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Gradients of OWN keys and values, over all queries. Scores are held transposed, [OWN, READ]."""
    first = tl.program_id(0) * OWN
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    q_ptr += sample * q_batch + head * q_head
    grad_ptr += sample * grad_batch + head * grad_head
    statistics = tl.program_id(1).to(tl.int64) * queries
    key = _rows(k_ptr + sample * k_batch + head * k_head, first, OWN, k_row, keys, DIM)
    value = _rows(v_ptr + sample * v_batch + head * v_head, first, OWN, v_row, keys, DIM)
    wide = lse_ptr.dtype.element_ty
    grad_key = tl.zeros([OWN, DIM], wide)
    grad_value = tl.zeros([OWN, DIM], wide)
    for start in range(0, queries, READ):
        row = start + tl.arange(0, READ)
        query = _rows(q_ptr, start, READ, q_row, queries, DIM)
        grad = _rows(grad_ptr, start, READ, grad_row, queries, DIM)
        # An infinite denominator makes the weights of rows beyond the last query zero.
        lse = tl.load(lse_ptr + statistics + row, mask=row < queries, other=float("inf"))
        delta = tl.load(delta_ptr + statistics + row, mask=row < queries, other=0.0)
        scores = _dot(key, tl.trans(query), tl.zeros([OWN, READ], wide), WIDEN) * (scale * 1.4426950408889634)
        weights = tl.exp2(scores - lse[None, :])
        grad_value = _dot(weights.to(grad.dtype), grad, grad_value, WIDEN)
        grad_weights = _dot(value, tl.trans(grad), tl.zeros([OWN, READ], wide), WIDEN)
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_key = _dot(grad_scores.to(query.dtype), query, grad_key, WIDEN)
    row = first + tl.arange(0, OWN)
    place = sample * out_batch + head * out_head + row[:, None] * out_row + tl.arange(0, DIM)[None, :]
    tl.store(grad_k_ptr + place, (grad_key * scale).to(grad_k_ptr.dtype.element_ty), mask=row[:, None] < keys)
    tl.store(grad_v_ptr + place, grad_value.to(grad_v_ptr.dtype.element_ty), mask=row[:, None] < keys)


@triton.jit
def _backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, grad_q_ptr, q_batch, q_row, q_head, k_batch, k_row, k_head,
    v_batch, v_row, v_head, grad_batch, grad_row, grad_head, out_batch, out_row, out_head, heads, queries, keys, scale,
    DIM: tl.constexpr, OWN: tl.constexpr, READ: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Gradients of OWN queries, over all keys."""
    first = tl.program_id(0) * OWN
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    row = first + tl.arange(0, OWN)
    query = _rows(q_ptr + sample * q_batch + head * q_head, first, OWN, q_row, queries, DIM)
    grad = _rows(grad_ptr + sample * grad_batch + head * grad_head, first, OWN, grad_row, queries, DIM)
    statistics = tl.program_id(1).to(tl.int64) * queries
    lse = tl.load(lse_ptr + statistics + row, mask=row < queries, other=float("inf"))
    delta = tl.load(delta_ptr + statistics + row, mask=row < queries, other=0.0)
    wide = lse_ptr.dtype.element_ty
    grad_query = tl.zeros([OWN, DIM], wide)
    for start in range(0, keys, READ):
        key = _rows(k_ptr, start, READ, k_row, keys, DIM)
        value = _rows(v_ptr, start, READ, v_row, keys, DIM)
        scores = _dot(query, tl.trans(key), tl.zeros([OWN, READ], wide), WIDEN) * (scale * 1.4426950408889634)
        weights = tl.exp2(scores - lse[:, None])
        if not EVEN:
            # A key beyond the last has score 0. If all true scores are far below 0, its weight would overflow.
            weights = tl.where((start + tl.arange(0, READ))[None, :] < keys, weights, 0.0)
        grad_weights = _dot(grad, tl.trans(value), tl.zeros([OWN, READ], wide), WIDEN)
        grad_scores = weights * (grad_weights - delta[:, None])
        grad_query = _dot(grad_scores.to(key.dtype), key, grad_query, WIDEN)
    place = sample * out_batch + head * out_head + row[:, None] * out_row + tl.arange(0, DIM)[None, :]
    tl.store(grad_q_ptr + place, (grad_query * scale).to(grad_q_ptr.dtype.element_ty), mask=row[:, None] < queries)
