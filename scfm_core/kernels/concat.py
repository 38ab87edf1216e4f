"""`[attention | activation]` in one pass: the input of the output projections in the single blocks of Flux and FLUX.2."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scfm_core.kernels.launch import compute_type, dense_rows

_BLOCK = 1024


def gelu_concat(attention: Tensor, mlp: Tensor) -> Tensor:
    """`[attention | GELU(mlp)]`, GELU by its tanh approximation (arXiv 1606.08415).

    Args:
        attention: [B, S, D].
        mlp: [B, S, M].

    Returns:
        [B, S, D + M] in the dtype of `mlp`.
    """
    return activation_concat(attention, mlp, False)


def swiglu_concat(attention: Tensor | None, gated: Tensor) -> Tensor:
    """`[attention | SiLU(gated[..., :M]) * gated[..., M:]]`, SwiGLU as in arXiv 2002.05202.

    Args:
        attention: [B, S, D]; None: D is 0.
        gated: [B, S, 2 M].

    Returns:
        [B, S, D + M] in the dtype of `gated`.
    """
    return activation_concat(attention, gated, True)


@torch.library.custom_op("scfm::activation_concat", mutates_args=())
def activation_concat(attention: Tensor | None, mlp: Tensor, is_gated: bool) -> Tensor:
    """`swiglu_concat` if `is_gated`, else `gelu_concat`."""
    output = _empty(attention, mlp, is_gated)
    mlp = dense_rows(mlp)
    attention = mlp if attention is None else dense_rows(attention)  # with D = 0 it is not read
    batch, tokens, hidden = mlp.shape[0], mlp.shape[1], mlp.shape[2] // (1 + is_gated)
    width = output.shape[2] - hidden
    _forward_kernel[(tokens, batch, triton.cdiv(width, _BLOCK) + triton.cdiv(hidden, _BLOCK))](
        attention, mlp, output, attention.stride(0), attention.stride(1), mlp.stride(0), mlp.stride(1), width, hidden,
        IS_GATED=is_gated, BLOCK=_BLOCK, COMPUTE=compute_type(mlp), num_warps=4,
    )  # fmt: skip
    return output


@activation_concat.register_fake
def _empty(attention: Tensor | None, mlp: Tensor, is_gated: bool) -> Tensor:
    width = 0 if attention is None else attention.shape[2]
    return mlp.new_empty(*mlp.shape[:2], width + mlp.shape[2] // (1 + is_gated))


@torch.library.custom_op("scfm::activation_backward", mutates_args=())
def _activation_backward(grad: Tensor, mlp: Tensor, is_gated: bool) -> Tensor:
    """Gradient of `mlp`; `grad` [B, S, M] may be a slice of a wider tensor."""
    grad, mlp = dense_rows(grad), dense_rows(mlp)
    batch, tokens, hidden = grad.shape
    grad_mlp = mlp.new_empty(mlp.shape)
    _backward_kernel[(tokens, batch, triton.cdiv(hidden, _BLOCK))](
        grad, mlp, grad_mlp, grad.stride(0), grad.stride(1), mlp.stride(0), mlp.stride(1), hidden,
        IS_GATED=is_gated, BLOCK=_BLOCK, COMPUTE=compute_type(mlp), num_warps=4,
    )  # fmt: skip
    return grad_mlp


@_activation_backward.register_fake
def _(grad: Tensor, mlp: Tensor, is_gated: bool) -> Tensor:
    return mlp.new_empty(mlp.shape)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    attention, mlp, ctx.is_gated = inputs  # type: ignore[attr-defined]
    ctx.width = None if attention is None else attention.shape[2]  # type: ignore[attr-defined]
    ctx.save_for_backward(mlp)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
    (mlp,) = ctx.saved_tensors  # type: ignore[attr-defined]
    width: int | None = ctx.width  # type: ignore[attr-defined]
    of_activation = grad if width is None else grad[:, :, width:]
    grad_mlp = _activation_backward(of_activation, mlp, ctx.is_gated)  # type: ignore[attr-defined]
    return None if width is None else grad[:, :, :width], grad_mlp, None


activation_concat.register_autograd(_gradients, setup_context=_setup)


@triton.jit
def _logistic(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _gelu_gate(x):
    """GELU(x) / x: (1 + tanh(u)) / 2 is the logistic function of 2 u."""
    return _logistic(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x))  # sqrt(2 / pi)


@triton.jit
def _forward_kernel(
    attention_ptr, mlp_ptr, out_ptr, attention_batch, attention_row, mlp_batch, mlp_row, width, hidden,
    IS_GATED: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one token. The first programs copy the attention, the others compute the activation."""
    token = tl.program_id(0).to(tl.int64)
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
        place = mlp_ptr + sample * mlp_batch + token * mlp_row + column
        x = tl.load(place, mask=inside).to(COMPUTE)
        y = x / (1 + tl.exp(-x)) * tl.load(place + hidden, mask=inside).to(COMPUTE) if IS_GATED else x * _gelu_gate(x)
        tl.store(out + width + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, mlp_ptr, out_ptr, grad_batch, grad_row, mlp_batch, mlp_row, hidden,
    IS_GATED: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Both activations are x s with s the logistic function of some u(x); the slope is s (1 + x (1 - s) u'(x))."""
    token = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    grad = tl.load(grad_ptr + sample * grad_batch + token * grad_row + column, mask=inside).to(COMPUTE)
    place = mlp_ptr + sample * mlp_batch + token * mlp_row + column
    x = tl.load(place, mask=inside).to(COMPUTE)
    out = out_ptr + (sample * tl.num_programs(0) + token) * ((1 + IS_GATED) * hidden) + column
    if IS_GATED:
        gate, slope = _logistic(x), 1.0
        tl.store(out + hidden, (grad * x * gate).to(out_ptr.dtype.element_ty), mask=inside)
        grad *= tl.load(place + hidden, mask=inside).to(COMPUTE)
    else:
        gate = _gelu_gate(x)
        slope = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    tl.store(out, (grad * gate * (1 + x * (1 - gate) * slope)).to(out_ptr.dtype.element_ty), mask=inside)
