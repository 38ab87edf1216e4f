"""`[attention | SwiGLU(gated)]` in one pass: the input of the output projections in FLUX.2's blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scfm_core.kernels.launch import compute_type, dense_rows

_BLOCK = 1024


@torch.library.custom_op("scfm::swiglu_concat", mutates_args=())
def swiglu_concat(attention: Tensor | None, gated: Tensor) -> Tensor:
    """`[attention | SiLU(gated[..., :M]) * gated[..., M:]]`, SwiGLU as in arXiv 2002.05202.

    Args:
        attention: [B, S, D]; None: D is 0.
        gated: [B, S, 2 M].

    Returns:
        [B, S, D + M] in the dtype of `gated`.
    """
    output = _fake_swiglu_concat(attention, gated)
    gated = dense_rows(gated)
    attention = gated if attention is None else dense_rows(attention)  # with D = 0 it is not read
    batch, tokens, hidden = gated.shape[0], gated.shape[1], gated.shape[2] // 2
    width = output.shape[2] - hidden
    _forward_kernel[(tokens, batch, triton.cdiv(width, _BLOCK) + triton.cdiv(hidden, _BLOCK))](
        attention, gated, output, attention.stride(0), attention.stride(1), gated.stride(0), gated.stride(1), width,
        hidden, BLOCK=_BLOCK, COMPUTE=compute_type(gated), num_warps=4,
    )  # fmt: skip
    return output


@swiglu_concat.register_fake
def _fake_swiglu_concat(attention: Tensor | None, gated: Tensor) -> Tensor:
    width = 0 if attention is None else attention.shape[2]
    return gated.new_empty(*gated.shape[:2], width + gated.shape[2] // 2)


@torch.library.custom_op("scfm::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, gated: Tensor) -> Tensor:
    """Gradient of `gated`; `grad` [B, S, M] may be a slice of a wider tensor."""
    grad, gated = dense_rows(grad), dense_rows(gated)
    batch, tokens, hidden = grad.shape
    grad_gated = gated.new_empty(gated.shape)
    _backward_kernel[(tokens, batch, triton.cdiv(hidden, _BLOCK))](
        grad, gated, grad_gated, grad.stride(0), grad.stride(1), gated.stride(0), gated.stride(1), hidden,
        BLOCK=_BLOCK, COMPUTE=compute_type(gated), num_warps=4,
    )  # fmt: skip
    return grad_gated


@_swiglu_backward.register_fake
def _(grad: Tensor, gated: Tensor) -> Tensor:
    return gated.new_empty(gated.shape)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    attention, gated = inputs
    ctx.width = None if attention is None else attention.shape[2]  # type: ignore[attr-defined]
    ctx.save_for_backward(gated)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor]:
    (gated,) = ctx.saved_tensors  # type: ignore[attr-defined]
    width: int | None = ctx.width  # type: ignore[attr-defined]
    if width is None:
        return None, _swiglu_backward(grad, gated)
    return grad[:, :, :width], _swiglu_backward(grad[:, :, width:], gated)


swiglu_concat.register_autograd(_gradients, setup_context=_setup)


@triton.jit
def _forward_kernel(
    attention_ptr, gated_ptr, out_ptr, attention_batch, attention_row, gated_batch, gated_row, width, hidden,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one token. The first programs copy the attention, the others compute the SwiGLU."""
    token = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    copies = tl.cdiv(width, BLOCK)
    out = out_ptr + (sample * tl.num_programs(0) + token) * (width + hidden)
    if tl.program_id(2) < copies:
        column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        copied = tl.load(attention_ptr + sample * attention_batch + token * attention_row + column, mask=inside)
        tl.store(out + column, copied.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        column = (tl.program_id(2) - copies) * BLOCK + tl.arange(0, BLOCK)
        inside = column < hidden
        place = gated_ptr + sample * gated_batch + token * gated_row + column
        gate = tl.load(place, mask=inside).to(COMPUTE)
        value = tl.load(place + hidden, mask=inside).to(COMPUTE)
        tl.store(out + width + column, (gate / (1 + tl.exp(-gate)) * value).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, gated_ptr, out_ptr, grad_batch, grad_row, gated_batch, gated_row, hidden,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """SiLU(x) = x s with s the logistic function of x; its slope is s (1 + x (1 - s))."""
    token = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    grad = tl.load(grad_ptr + sample * grad_batch + token * grad_row + column, mask=inside).to(COMPUTE)
    place = gated_ptr + sample * gated_batch + token * gated_row + column
    gate = tl.load(place, mask=inside).to(COMPUTE)
    value = tl.load(place + hidden, mask=inside).to(COMPUTE)
    logistic = 1 / (1 + tl.exp(-gate))
    out = out_ptr + (sample * tl.num_programs(0) + token) * (2 * hidden) + column
    grad_gate = grad * value * logistic * (1 + gate * (1 - logistic))
    tl.store(out, grad_gate.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + hidden, (grad * gate * logistic).to(out_ptr.dtype.element_ty), mask=inside)
