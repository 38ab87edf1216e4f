"""FlashAttention-4 as a custom op: the package `flash-attn-4`, whose kernels are written in NVIDIA's CuTe DSL and compiled at the first call.

Source: https://github.com/Dao-AILab/flash-attention, folder flash_attn/cute; read at 4.0.0b36, not run by this project yet.
It trains on compute capability 9.0 and later: its forward runs on 8.0 too, its backward does not. The package registers no op, so
`torch.compile` would trace into its kernels, and selective checkpointing would not see it (Dao-AILab/flash-attention#2154).
Its backward adds to the queries' gradient in any order: gradients differ between runs by rounding.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from scfm_core.kernels.launch import heads_first, save_attention

_CAPABILITY = (9, 0)


def why_no_flash4(device: torch.device) -> str | None:
    """Why FlashAttention-4 cannot train on `device`; None if it may."""
    if device.type != "cuda":
        return "FlashAttention-4 has no kernel for a CPU"
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"the backward of FlashAttention-4 needs compute capability 9.0 (H100, B200, RTX 5090), {name} has less"
    try:
        import flash_attn.cute.interface  # noqa: F401
    except Exception as error:  # it compiles while it is imported, which can fail in many ways
        return f"FlashAttention-4 cannot be imported ({error}); install it with: pip install flash-attn-4"
    return None


def flash4_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`softmax(Q K^T / sqrt(D)) V`: query, key, value [B, S, H, D] in bf16 or fp16 -> [B, S, H, D]."""
    return _flash4(query, key, value)[0]


@torch.library.custom_op("scfm::flash4_attention", mutates_args=())
def _flash4(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the log of each row's softmax denominator, fp32 [B, H, S]."""
    from flash_attn.cute.interface import _flash_attn_fwd

    output, lse, *_ = _flash_attn_fwd(query, key, value, return_lse=True)
    return output, lse


@_flash4.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.custom_op("scfm::flash4_attention_backward", mutates_args=())
def _flash4_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    grad_query, grad_key, grad_value, *_ = _flash_attn_bwd(query, key, value, output, grad.contiguous(), lse)
    return grad_query, grad_key, grad_value


@_flash4_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
    )  # strides as of the package's results


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, _: Tensor | None) -> tuple:
    if grad is None:
        return None, None, None
    return _flash4_backward(grad, *ctx.saved_tensors)  # type: ignore[attr-defined, no-any-return]


_flash4.register_autograd(_gradients, setup_context=save_attention)


@register_flop_formula(torch.ops.scfm.flash4_attention)
def _flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(*map(heads_first, (query, key, value)))


@register_flop_formula(torch.ops.scfm.flash4_attention_backward)
def _backward_flops(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return sdpa_backward_flop_count(*map(heads_first, (grad, query, key, value)))
