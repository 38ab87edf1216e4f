"""Elementwise operations of adaLN (DiT, arXiv 2212.09748): LayerNorm + modulate, gate + residual, and both fused.

A block adds a gated branch to its stream and normalises the sum for the next branch. `gated_modulate` reads stream and
branch once and writes both results; separate kernels would read the stream twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scfm_core.kernels.launch import accumulator, compute_type, dense_rows

_ROWS = 16
"""Tokens per program of a backward. A program writes its fp32 sums once: each is 1/8 of the bytes of a bf16 tensor."""


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """`LayerNorm(x) * (1 + scale) + shift`: x [B, S, D], scale and shift [B, D] -> [B, S, D] in the dtype of `x`."""
    return _modulate(x, scale, shift, eps)[0]


def gated_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`stream = x + gate * branch` and `modulate(stream, scale, shift)`, both [B, S, D] in the dtype of `x`."""
    return _gated_modulate(x, branch, gate, scale, shift, eps)[:2]


def _tile(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}


@torch.library.custom_op("scfm::modulate", mutates_args=())
def _modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and each row's mean and reciprocal standard deviation."""
    x, scale, shift = dense_rows(x), dense_rows(scale), dense_rows(shift)
    batch, tokens, width = x.shape
    output, mean, rstd = _fake_modulate(x, scale, shift, eps)
    _modulate_forward_kernel[(tokens, batch)](
        x, x, x, scale, shift, x, output, mean, rstd, x.stride(0), x.stride(1), 0, 0, 0, scale.stride(0),
        shift.stride(0), width, eps, GATED=False, COMPUTE=compute_type(x), **_tile(width),
    )  # fmt: skip
    return output, mean, rstd


@_modulate.register_fake
def _fake_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    row = x.new_empty(x.shape[:2], dtype=accumulator(x))
    return x.new_empty(x.shape), row, torch.empty_like(row)


@torch.library.custom_op("scfm::gated_modulate", mutates_args=())
def _gated_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, its modulated norm, and each row's mean and reciprocal standard deviation."""
    x, branch, gate, scale, shift = (dense_rows(tensor) for tensor in (x, branch, gate, scale, shift))
    batch, tokens, width = x.shape
    stream = x.new_empty(x.shape)
    output, mean, rstd = _fake_modulate(x, scale, shift, eps)
    _modulate_forward_kernel[(tokens, batch)](
        x, branch, gate, scale, shift, stream, output, mean, rstd, x.stride(0), x.stride(1), branch.stride(0),
        branch.stride(1), gate.stride(0), scale.stride(0), shift.stride(0), width, eps, GATED=True,
        COMPUTE=compute_type(x), **_tile(width),
    )  # fmt: skip
    return stream, output, mean, rstd


@_gated_modulate.register_fake
def _(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_fake_modulate(x, scale, shift, eps)


@torch.library.custom_op("scfm::modulate_backward", mutates_args=())
def _modulate_backward(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and shift."""
    grad, x, scale = dense_rows(grad), dense_rows(x), dense_rows(scale)
    grad_x, parts = x.new_empty(x.shape), _parts(2, x)
    _launch_backward(grad, grad, x, x, scale, scale, mean, rstd, grad_x, grad_x, parts, gated=False)
    grad_scale, grad_shift = parts.sum(2).to(scale.dtype).unbind()
    return grad_x, grad_scale.clone(), grad_shift.clone()


@_modulate_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@torch.library.custom_op("scfm::gated_modulate_backward", mutates_args=())
def _gated_backward(
    grad: Tensor,
    grad_stream: Tensor,
    stream: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, gate, scale and shift, from the gradients of the modulated norm and of the sum."""
    grad, grad_stream, stream, branch = (dense_rows(tensor) for tensor in (grad, grad_stream, stream, branch))
    gate, scale = dense_rows(gate), dense_rows(scale)
    grad_x, grad_branch, parts = stream.new_empty(stream.shape), branch.new_empty(branch.shape), _parts(3, stream)
    _launch_backward(grad, grad_stream, stream, branch, gate, scale, mean, rstd, grad_x, grad_branch, parts, gated=True)
    grad_scale, grad_shift, grad_gate = parts.sum(2).to(scale.dtype).unbind()
    return grad_x, grad_branch, grad_gate.to(gate.dtype, copy=True), grad_scale.clone(), grad_shift.clone()


@_gated_backward.register_fake
def _(
    grad: Tensor,
    grad_stream: Tensor,
    stream: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row = scale.new_empty(scale.shape)
    grads = stream.new_empty(stream.shape), branch.new_empty(branch.shape), gate.new_empty(gate.shape)
    return *grads, row, torch.empty_like(row)


def _parts(kinds: int, x: Tensor) -> Tensor:
    """Memory for each program's sums over its tokens: [kinds, B, programs, D]."""
    batch, tokens, width = x.shape
    return torch.empty(kinds, batch, triton.cdiv(tokens, _ROWS), width, dtype=accumulator(x), device=x.device)


def _launch_backward(
    grad: Tensor,
    grad_stream: Tensor,
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_x: Tensor,
    grad_branch: Tensor,
    parts: Tensor,
    *,
    gated: bool,
) -> None:
    batch, tokens, width = x.shape
    tile = _tile(width)
    if gated:
        tile["num_warps"] *= 2  # the program holds more rows at once
    _modulate_backward_kernel[(parts.shape[2], batch)](
        grad, grad_stream, x, branch, gate, scale, mean, rstd, grad_x, grad_branch, parts, grad.stride(0), grad.stride(1),
        grad_stream.stride(0), grad_stream.stride(1), x.stride(0), x.stride(1), branch.stride(0), branch.stride(1),
        gate.stride(0), scale.stride(0), parts.stride(0), tokens, width, ROWS=_ROWS, GATED=gated, COMPUTE=compute_type(x),
        **tile,
    )  # fmt: skip


@torch.library.custom_op("scfm::gate_residual", mutates_args=())
def gate_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """`x + gate * branch`: x and branch [B, S, D], gate [B, D] -> [B, S, D] in the dtype of `x`."""
    x, branch, gate = dense_rows(x), dense_rows(branch), dense_rows(gate)
    batch, tokens, width = x.shape
    output = x.new_empty(x.shape)
    _gate_forward_kernel[(tokens, batch)](
        x, branch, gate, output, x.stride(0), x.stride(1), branch.stride(0), branch.stride(1), gate.stride(0), width,
        COMPUTE=compute_type(x), **_tile(width),
    )  # fmt: skip
    return output


@gate_residual.register_fake
def _(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("scfm::gate_backward", mutates_args=())
def _gate_backward(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of branch and gate; the gradient of the residual is `grad` itself."""
    grad, branch, gate = dense_rows(grad), dense_rows(branch), dense_rows(gate)
    batch, tokens, width = branch.shape
    programs = triton.cdiv(tokens, _ROWS)
    grad_branch = branch.new_empty(branch.shape)
    parts = torch.empty(batch, programs, width, dtype=accumulator(branch), device=branch.device)
    _gate_backward_kernel[(programs, batch)](
        grad, branch, gate, grad_branch, parts, grad.stride(0), grad.stride(1), branch.stride(0), branch.stride(1),
        gate.stride(0), tokens, width, ROWS=_ROWS, COMPUTE=compute_type(branch), **_tile(width),
    )  # fmt: skip
    return grad_branch, parts.sum(1).to(gate.dtype)


@_gate_backward.register_fake
def _(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return branch.new_empty(branch.shape), gate.new_empty(gate.shape)


def _setup_modulate(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    x, scale, _, _ = inputs
    ctx.set_materialize_grads(False)  # only the backward uses the statistics
    ctx.save_for_backward(x, scale, *output[1:])


def _modulate_gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, *_: Tensor) -> tuple:
    if grad is None:
        return None, None, None, None
    x, scale, mean, rstd = ctx.saved_tensors  # type: ignore[attr-defined]
    return (*_modulate_backward(grad, x, scale, mean, rstd), None)


def _setup_gated(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    _, branch, gate, scale, _, _ = inputs
    stream, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(branch, gate, scale, stream, mean, rstd)


def _gated_gradients(
    ctx: torch.autograd.function.FunctionCtx, grad_stream: Tensor | None, grad: Tensor | None, *_: Tensor
) -> tuple:
    branch, gate, scale, stream, mean, rstd = ctx.saved_tensors  # type: ignore[attr-defined]
    grad_stream = torch.zeros_like(stream) if grad_stream is None else grad_stream
    grad = torch.zeros_like(stream) if grad is None else grad
    return *_gated_backward(grad, grad_stream, stream, branch, gate, scale, mean, rstd), None


def _setup_gate(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gate_gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    branch, gate = ctx.saved_tensors  # type: ignore[attr-defined]
    return grad, *_gate_backward(grad, branch, gate)


_modulate.register_autograd(_modulate_gradients, setup_context=_setup_modulate)
_gated_modulate.register_autograd(_gated_gradients, setup_context=_setup_gated)
gate_residual.register_autograd(_gate_gradients, setup_context=_setup_gate)


@triton.jit
def _modulate_forward_kernel(
    x_ptr, branch_ptr, gate_ptr, scale_ptr, shift_ptr, stream_ptr, out_ptr, mean_ptr, rstd_ptr, x_batch, x_row,
    branch_batch, branch_row, gate_batch, scale_batch, shift_batch, width, eps,
    GATED: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One token. With GATED the row is `x + gate * branch`, and is written too."""
    token = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = (sample * tl.num_programs(0) + token) * width + column
    x = tl.load(x_ptr + sample * x_batch + token * x_row + column, mask=inside, other=0.0).to(COMPUTE)
    if GATED:
        branch = tl.load(branch_ptr + sample * branch_batch + token * branch_row + column, mask=inside, other=0.0)
        gate = tl.load(gate_ptr + sample * gate_batch + column, mask=inside, other=0.0).to(COMPUTE)
        # Round as the store does: the backward reads the stored sum, and the norm must use the same values.
        stored = (x + gate * branch.to(COMPUTE)).to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + place, stored, mask=inside)
        x = stored.to(COMPUTE)
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    scale = tl.load(scale_ptr + sample * scale_batch + column, mask=inside, other=0.0).to(COMPUTE)
    shift = tl.load(shift_ptr + sample * shift_batch + column, mask=inside, other=0.0).to(COMPUTE)
    out = centred * rstd * (1 + scale) + shift
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + sample * tl.num_programs(0) + token, mean)
    tl.store(rstd_ptr + sample * tl.num_programs(0) + token, rstd)


@triton.jit
def _modulate_backward_kernel(
    grad_ptr, grad_stream_ptr, x_ptr, branch_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, grad_x_ptr, grad_branch_ptr,
    parts_ptr, grad_batch, grad_row, stream_batch, stream_row, x_batch, x_row, branch_batch, branch_row, gate_batch,
    scale_batch, kind, tokens, width,
    ROWS: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx = r (g - mean(g) - n mean(g n)), with n the normed row, r its reciprocal deviation and g = grad (1 + scale).

    With GATED the row was the sum `x + gate * branch`, which is also a result: its own gradient is added.
    """
    program = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    known_column = column < width
    scale = tl.load(scale_ptr + sample * scale_batch + column, mask=known_column, other=0.0).to(COMPUTE)
    scale_sum = tl.zeros([BLOCK], COMPUTE)
    shift_sum = tl.zeros([BLOCK], COMPUTE)
    gate_sum = tl.zeros([BLOCK], COMPUTE)
    for row in range(ROWS):
        token = program * ROWS + row
        known = token < tokens
        inside = known_column & known
        grad = tl.load(grad_ptr + sample * grad_batch + token * grad_row + column, mask=inside, other=0.0).to(COMPUTE)
        x = tl.load(x_ptr + sample * x_batch + token * x_row + column, mask=inside, other=0.0).to(COMPUTE)
        mean = tl.load(mean_ptr + sample * tokens + token, mask=known, other=0.0)
        rstd = tl.load(rstd_ptr + sample * tokens + token, mask=known, other=0.0)
        normed = tl.where(inside, (x - mean) * rstd, 0.0)
        scale_sum += grad * normed
        shift_sum += grad
        grad *= 1 + scale
        grad_x = rstd * (grad - tl.sum(grad, axis=0) / width - normed * (tl.sum(grad * normed, axis=0) / width))
        out = (sample * tokens + token) * width + column
        if GATED:
            beside = grad_stream_ptr + sample * stream_batch + token * stream_row + column
            grad_x += tl.load(beside, mask=inside, other=0.0).to(COMPUTE)
            branch = tl.load(branch_ptr + sample * branch_batch + token * branch_row + column, mask=inside, other=0.0)
            gate_sum += grad_x * branch.to(COMPUTE)
            # From the cache each time: kept over all rows it would take registers that rows of 6144 need.
            gate = tl.load(gate_ptr + sample * gate_batch + column, mask=known_column, other=0.0).to(COMPUTE)
            tl.store(grad_branch_ptr + out, (grad_x * gate).to(grad_branch_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_x_ptr + out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    part = parts_ptr + (sample * tl.num_programs(0) + program) * width + column
    tl.store(part, scale_sum, mask=known_column)
    tl.store(part + kind, shift_sum, mask=known_column)
    if GATED:
        tl.store(part + 2 * kind, gate_sum, mask=known_column)


@triton.jit
def _gate_forward_kernel(
    x_ptr, branch_ptr, gate_ptr, out_ptr, x_batch, x_row, branch_batch, branch_row, gate_batch, width,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + sample * x_batch + token * x_row + column, mask=inside).to(COMPUTE)
    branch = tl.load(branch_ptr + sample * branch_batch + token * branch_row + column, mask=inside).to(COMPUTE)
    gate = tl.load(gate_ptr + sample * gate_batch + column, mask=inside).to(COMPUTE)
    out = out_ptr + (sample * tl.num_programs(0) + token) * width + column
    tl.store(out, (x + gate * branch).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(
    grad_ptr, branch_ptr, gate_ptr, grad_branch_ptr, parts_ptr, grad_batch, grad_row, branch_batch, branch_row,
    gate_batch, tokens, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + sample * gate_batch + column, mask=column < width, other=0.0).to(COMPUTE)
    gate_sum = tl.zeros([BLOCK], COMPUTE)
    for row in range(ROWS):
        token = program * ROWS + row
        inside = (column < width) & (token < tokens)
        grad = tl.load(grad_ptr + sample * grad_batch + token * grad_row + column, mask=inside, other=0.0).to(COMPUTE)
        branch = tl.load(branch_ptr + sample * branch_batch + token * branch_row + column, mask=inside, other=0.0)
        gate_sum += grad * branch.to(COMPUTE)
        out = grad_branch_ptr + (sample * tokens + token) * width + column
        tl.store(out, (grad * gate).to(grad_branch_ptr.dtype.element_ty), mask=inside)
    part = (sample * tl.num_programs(0) + program) * width + column
    tl.store(parts_ptr + part, gate_sum, mask=column < width)
