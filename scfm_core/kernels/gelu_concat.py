"""`[attention | GELU(mlp)]` in one pass: the input of the output projection in Flux's single blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scfm_core.kernels.launch import compute_type, dense_rows

_BLOCK = 1024


@torch.library.custom_op("scfm::gelu_concat", mutates_args=())
def gelu_concat(attention: Tensor, mlp: Tensor) -> Tensor:
    """`[attention | GELU(mlp)]`, GELU by its tanh approximation (arXiv 1606.08415).

    Args:
        attention: [B, S, D].
        mlp: [B, S, M].

    Returns:
        [B, S, D + M] in the dtype of `mlp`.
    """
    attention, mlp = dense_rows(attention), dense_rows(mlp)
    batch, tokens, hidden = mlp.shape
    width = attention.shape[2]
    output = mlp.new_empty(batch, tokens, width + hidden)
    _forward_kernel[(tokens, batch, triton.cdiv(width, _BLOCK) + triton.cdiv(hidden, _BLOCK))](
        attention, mlp, output, attention.stride(0), attention.stride(1), mlp.stride(0), mlp.stride(1), width, hidden,
        BLOCK=_BLOCK, COMPUTE=compute_type(mlp), num_warps=4,
    )  # fmt: skip
    return output


@gelu_concat.register_fake
def _(attention: Tensor, mlp: Tensor) -> Tensor:
    return mlp.new_empty(*mlp.shape[:2], attention.shape[2] + mlp.shape[2])


@torch.library.custom_op("scfm::gelu_backward", mutates_args=())
def _gelu_backward(grad: Tensor, mlp: Tensor) -> Tensor:
    """Gradient of `mlp`; `grad` [B, S, M] may be a slice of a wider tensor."""
    grad, mlp = dense_rows(grad), dense_rows(mlp)
    batch, tokens, hidden = mlp.shape
    grad_mlp = mlp.new_empty(mlp.shape)
    _backward_kernel[(tokens, batch, triton.cdiv(hidden, _BLOCK))](
        grad, mlp, grad_mlp, grad.stride(0), grad.stride(1), mlp.stride(0), mlp.stride(1), hidden,
        BLOCK=_BLOCK, COMPUTE=compute_type(mlp), num_warps=4,
    )  # fmt: skip
    return grad_mlp


@_gelu_backward.register_fake
def _(grad: Tensor, mlp: Tensor) -> Tensor:
    return mlp.new_empty(mlp.shape)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    attention, mlp = inputs
    ctx.width = attention.shape[2]  # type: ignore[attr-defined]
    ctx.save_for_backward(mlp)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
    (mlp,) = ctx.saved_tensors  # type: ignore[attr-defined]
    width: int = ctx.width  # type: ignore[attr-defined]
    return grad[:, :, :width], _gelu_backward(grad[:, :, width:], mlp)


gelu_concat.register_autograd(_gradients, setup_context=_setup)


@triton.jit
def _gate(x):
    """GELU(x) / x: (1 + tanh(u)) / 2 is the logistic function of 2 u."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # sqrt(2 / pi)
    return 1 / (1 + tl.exp(-2 * inner))


@triton.jit
def _forward_kernel(
    attention_ptr, mlp_ptr, out_ptr, attention_batch, attention_row, mlp_batch, mlp_row, width, hidden,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one token. The first programs copy the attention, the others compute the GELU."""
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
        x = tl.load(mlp_ptr + sample * mlp_batch + token * mlp_row + column, mask=inside).to(COMPUTE)
        tl.store(out + width + column, (x * _gate(x)).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, mlp_ptr, out_ptr, grad_batch, grad_row, mlp_batch, mlp_row, hidden,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    grad = tl.load(grad_ptr + sample * grad_batch + token * grad_row + column, mask=inside).to(COMPUTE)
    x = tl.load(mlp_ptr + sample * mlp_batch + token * mlp_row + column, mask=inside).to(COMPUTE)
    gate = _gate(x)
    slope = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    value = grad * gate * (1 + x * (1 - gate) * slope)
    out = out_ptr + (sample * tl.num_programs(0) + token) * hidden + column
    tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)
