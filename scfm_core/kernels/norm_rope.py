"""RMSNorm of queries or keys, and rotary position embedding, written into the joint text-image layout.

Eager PyTorch makes about twelve passes over the tensor, most of them in fp32 because the rotation upcasts. Here each
element is read once and written once. As in Flux, the text's rows come first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scfm_core.kernels.launch import accumulator, compute_type, dense_rows

_ROWS = 16
"""Tokens per program of the backward, if it sums the gradient of the norm's weight."""


@torch.library.custom_op("scfm::norm_rope", mutates_args=())
def norm_rope(
    image: Tensor,
    text: Tensor | None,
    image_weight: Tensor,
    text_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """Normalise, rotate and join the queries (or keys) of both streams.

    Args:
        image: projection of the image stream, [B, S_image, heads * D], D a power of two.
        text: of the text stream, [B, S_text, heads * D]; None if the streams are joined already.
        image_weight, text_weight: of the RMSNorm over a head (arXiv 1910.07467), [D].
        cos, sin: fp32 [S_text + S_image, D], every value twice in succession, as diffusers' `FluxPosEmbed` returns them
            (rotary embedding: arXiv 2104.09864).
        heads: number of heads.
        eps: of the norm.

    Returns:
        [B, S_text + S_image, heads, D] in the dtype of `image`, contiguous.
    """
    output = _fake_norm_rope(image, text, image_weight, text_weight, cos, sin, heads, eps)
    first = 0
    for x, weight in ((text, text_weight), (image, image_weight)):
        if x is None:
            continue
        x = dense_rows(x)
        batch, tokens, width = x.shape
        dim = width // heads
        _forward_kernel[(tokens, batch)](
            x, weight, cos, sin, output, x.stride(0), x.stride(1), output.stride(0), first, heads, eps,
            HEADS=triton.next_power_of_2(heads), DIM=dim, COMPUTE=compute_type(x), num_warps=4,
        )  # fmt: skip
        first += tokens
    return output


@norm_rope.register_fake
def _fake_norm_rope(
    image: Tensor, text: Tensor | None, _1: Tensor, _2: Tensor | None, _3: Tensor, _4: Tensor, heads: int, _5: float = 0
) -> Tensor:
    batch, tokens, width = image.shape
    joint = tokens + (0 if text is None else text.shape[1])
    return image.new_empty(batch, joint, heads, width // heads)


@torch.library.custom_op("scfm::norm_rope_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, first: int, eps: float, weight_too: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of one stream, whose rows in the joint `grad` [B, S, heads, D] begin at `first`.

    With `weight_too` also the gradient of the norm's weight; else it is empty (the base is frozen).
    """
    grad, x = dense_rows(grad), dense_rows(x)
    batch, tokens, width = x.shape
    heads, dim = grad.shape[2:]
    grad_x = torch.empty(batch, tokens, width, dtype=x.dtype, device=x.device)
    rows = _ROWS if weight_too else 1
    programs = triton.cdiv(tokens, rows)
    parts = torch.empty(batch * programs if weight_too else 0, dim, dtype=accumulator(x), device=x.device)
    _backward_kernel[(programs, batch)](
        grad, x, weight, cos, sin, grad_x, parts, grad.stride(0), grad.stride(1), grad.stride(2), x.stride(0),
        x.stride(1), first, tokens, heads, eps, ROWS=rows, HEADS=triton.next_power_of_2(heads), DIM=dim,
        WEIGHT_TOO=weight_too, COMPUTE=compute_type(x), num_warps=4,
    )  # fmt: skip
    return grad_x, parts.sum(0).to(weight.dtype) if weight_too else weight.new_empty(0)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, first: int, eps: float, weight_too: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if weight_too else 0)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    image, text, image_weight, text_weight, cos, sin, _, eps = inputs
    ctx.save_for_backward(image, text, image_weight, text_weight, cos, sin)
    ctx.eps = eps  # type: ignore[attr-defined]


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    image, text, image_weight, text_weight, cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
    needs, eps = ctx.needs_input_grad, ctx.eps  # type: ignore[attr-defined]
    grad_text = grad_text_weight = None
    first = 0
    if text is not None:
        first = text.shape[1]
        grad_text, grad_text_weight = _backward(grad, text, text_weight, cos, sin, 0, eps, needs[3])
    grad_image, grad_image_weight = _backward(grad, image, image_weight, cos, sin, first, eps, needs[2])
    return (
        grad_image,
        grad_text,
        grad_image_weight if needs[2] else None,
        grad_text_weight if needs[3] else None,
        None,
        None,
        None,
        None,
    )


norm_rope.register_autograd(_gradients, setup_context=_setup)


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, x_batch, x_row, out_batch, first, heads, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """All heads of one token, [HEADS, DIM]. Cosines and sines are read once for all heads."""
    token = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, DIM)[None, :]
    inside = (head < heads) & (column < DIM)
    pair = tl.arange(0, DIM // 2)[None, :]
    x = tl.load(x_ptr + sample * x_batch + token * x_row + head * DIM + column, mask=inside, other=0.0).to(COMPUTE)
    weight = tl.load(weight_ptr + column).to(COMPUTE)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / DIM + eps) * weight
    real, imaginary = tl.split(tl.reshape(normed, [HEADS, DIM // 2, 2]))
    cos = tl.load(cos_ptr + (first + token) * DIM + 2 * pair).to(COMPUTE)
    sin = tl.load(sin_ptr + (first + token) * DIM + 2 * pair).to(COMPUTE)
    turned = tl.join(real * cos - imaginary * sin, imaginary * cos + real * sin)
    out = out_ptr + sample * out_batch + (first + token) * (heads * DIM) + head * DIM + column
    tl.store(out, tl.reshape(turned, [HEADS, DIM]).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, grad_x_ptr, parts_ptr, grad_batch, grad_row, grad_head, x_batch,
    x_row, first, tokens, heads, eps,
    ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WEIGHT_TOO: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The inverse rotation, then the norm: dx = r (g - n mean(g n)), with n = x r and g the gradient of n."""
    program = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, DIM)[None, :]
    pair = tl.arange(0, DIM // 2)[None, :]
    weight = tl.load(weight_ptr + column).to(COMPUTE)
    total = tl.zeros([HEADS, DIM], COMPUTE)
    for row in range(ROWS):
        token = program * ROWS + row
        inside = (head < heads) & (column < DIM) & (token < tokens)
        place = grad_ptr + sample * grad_batch + (first + token) * grad_row + head * grad_head + column
        grad = tl.load(place, mask=inside, other=0.0).to(COMPUTE)
        x = tl.load(x_ptr + sample * x_batch + token * x_row + head * DIM + column, mask=inside, other=0.0).to(COMPUTE)
        known = (pair < DIM // 2) & (token < tokens)
        cos = tl.load(cos_ptr + (first + token) * DIM + 2 * pair, mask=known, other=0.0).to(COMPUTE)
        sin = tl.load(sin_ptr + (first + token) * DIM + 2 * pair, mask=known, other=0.0).to(COMPUTE)
        real, imaginary = tl.split(tl.reshape(grad, [HEADS, DIM // 2, 2]))
        back = tl.reshape(tl.join(real * cos + imaginary * sin, imaginary * cos - real * sin), [HEADS, DIM])
        scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / DIM + eps)
        normed = x * scale
        if WEIGHT_TOO:
            total += back * normed
        back *= weight
        grad_x = scale * (back - normed * (tl.sum(back * normed, axis=1, keep_dims=True) / DIM))
        out = grad_x_ptr + (sample * tokens + token) * (heads * DIM) + head * DIM + column
        tl.store(out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if WEIGHT_TOO:
        part = sample * tl.num_programs(0) + program
        tl.store(parts_ptr + part * DIM + tl.arange(0, DIM), tl.sum(total, axis=0))
