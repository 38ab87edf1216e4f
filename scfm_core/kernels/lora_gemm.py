"""An adapted linear as one matrix product in Triton: `y = [x | low] [W | B]^T + bias`, without joining anything in memory.

The product with W and that with B accumulate in the same registers. With the vendor's library the second product reads and
writes all of y again: 16 of the 25 tensors that the adapters of a single block of Flux.1 read or write. The gain is lost if
Triton's product with W is 5 % slower than the library's (computed for an A100), so `lora_choice.py` measures both, forward and
backward, for each shape.
"""

import triton
import triton.language as tl
from torch import Tensor

from scfm_core.kernels.launch import Tile, compute_type, dense_rows, is_interpreted

# tests/kernels compiles all of them for compute capability 8.0 and 9.0: none spills registers in bf16.
TILES = (Tile(128, 256, 32, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 4, 4))
_SMALL = Tile(32, 32, 32, 4, 2)


def lora_gemm(x: Tensor, weight: Tensor, low: Tensor, factor: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    """`x weight + low factor + bias`.

    Args:
        x: [rows, in].
        weight: [in, out], any strides, such as those of `W.T`.
        low: [rows, rank], in the dtype of `x`.
        factor: [rank, out], any strides.
        bias: [out] or None.
        tile: one of `TILES`.

    Returns:
        [rows, out] in the dtype of `x`.
    """
    x, low = dense_rows(x), dense_rows(low)
    (rows, inputs), outputs, rank = x.shape, weight.shape[1], low.shape[1]
    tile = _SMALL if is_interpreted() or x.element_size() > 2 else tile
    output = x.new_empty(rows, outputs)
    _gemm_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.columns),)](
        x, weight, low, factor, bias, output, rows, outputs, inputs, rank,
        x.stride(0), *weight.stride(), low.stride(0), *factor.stride(), output.stride(0),
        HAS_BIAS=bias is not None, EVEN=inputs % tile.depth == 0, EVEN_RANK=rank % tile.depth == 0,
        WHOLE=outputs % tile.columns == 0, TYPE=compute_type(x), ROWS=tile.rows, COLUMNS=tile.columns,
        DEPTH=tile.depth, WIDEN=is_interpreted(),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return output


@triton.jit
def _accumulate(
    acc, left, right, rows, columns, depth, stride_left, stride_depth, stride_column, row, column,
    EVEN: tl.constexpr, WHOLE: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`acc + left right` for a tile: left [rows, depth], right [depth, columns]."""
    step = tl.arange(0, DEPTH)
    # Rows and columns outside are read from the start of the matrix: their results are not stored.
    if not WHOLE:
        column = column % columns
    left += (row % rows)[:, None].to(tl.int64) * stride_left + step[None, :]
    right += step[:, None].to(tl.int64) * stride_depth + column[None, :].to(tl.int64) * stride_column
    for start in range(0, depth, DEPTH):
        if EVEN:
            one, other = tl.load(left), tl.load(right)
        else:
            one = tl.load(left, mask=step[None, :] < depth - start, other=0.0)
            other = tl.load(right, mask=step[:, None] < depth - start, other=0.0)
        if WIDEN:  # the interpreter multiplies bf16 in bf16
            one, other = one.to(acc.dtype), other.to(acc.dtype)
        acc = tl.dot(one, other, acc, input_precision="ieee", out_dtype=acc.dtype)
        left += DEPTH
        right += DEPTH * stride_depth
    return acc


@triton.jit
def _gemm_kernel(
    x, weight, low, factor, bias, output, rows, outputs, inputs, rank,
    stride_x, stride_wd, stride_wc, stride_low, stride_fd, stride_fc, stride_output,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, EVEN_RANK: tl.constexpr, WHOLE: tl.constexpr, TYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # Groups of 8 rows of tiles go through all columns together, so that W stays in the L2 cache.
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(outputs, COLUMNS)
    group, place = tl.program_id(0) // (8 * column_tiles), tl.program_id(0) % (8 * column_tiles)
    height = tl.minimum(row_tiles - group * 8, 8)
    row = (group * 8 + place % height) * ROWS + tl.arange(0, ROWS)
    column = (place // height) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), dtype=TYPE)
    acc = _accumulate(
        acc,
        low,
        factor,
        rows,
        outputs,
        rank,
        stride_low,
        stride_fd,
        stride_fc,
        row,
        column,
        EVEN_RANK,
        WHOLE,
        DEPTH,
        WIDEN,
    )
    acc = _accumulate(
        acc, x, weight, rows, outputs, inputs, stride_x, stride_wd, stride_wc, row, column, EVEN, WHOLE, DEPTH, WIDEN
    )
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < outputs, other=0.0).to(TYPE)[None, :]
    place = row[:, None].to(tl.int64) * stride_output + column[None, :]
    tl.store(output + place, acc.to(output.dtype.element_ty), mask=(row < rows)[:, None] & (column < outputs)[None, :])
