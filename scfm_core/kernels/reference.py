"""Each operation in plain PyTorch: what the tests compare with. `kernels.fused: reference` runs those of a block; adapters
always run `kernels/lora.py`."""

import torch
from torch import Tensor


def norm_rope_reference(
    image: Tensor,
    text: Tensor | None,
    image_weight: Tensor,
    text_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """`norm_rope` in plain PyTorch, as diffusers computes it: in the dtype of the inputs, except for the rotation."""
    streams = [(image, image_weight)] if text is None else [(text, text_weight), (image, image_weight)]
    normed = [
        torch.nn.functional.rms_norm(x.unflatten(-1, (heads, -1)), (x.shape[-1] // heads,), weight, eps)
        for x, weight in streams
    ]
    joint = torch.cat(normed, dim=1)
    real, imaginary = joint.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([-imaginary, real], dim=-1).flatten(3)
    wide = torch.promote_types(joint.dtype, cos.dtype)
    return (joint.to(wide) * cos[:, None] + rotated.to(wide) * sin[:, None]).to(joint.dtype)


def modulate_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """`modulate` in plain PyTorch, as diffusers computes it."""
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return (normed * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


def gate_residual_reference(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """`gate_residual` in plain PyTorch."""
    return (x + gate[:, None] * branch).to(x.dtype)


def gated_modulate_reference(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`gated_modulate` in plain PyTorch."""
    stream = gate_residual_reference(x, branch, gate)
    return stream, modulate_reference(stream, scale, shift, eps)


def gelu_concat_reference(attention: Tensor, mlp: Tensor) -> Tensor:
    """`gelu_concat` in plain PyTorch."""
    return torch.cat([attention, torch.nn.functional.gelu(mlp, approximate="tanh")], dim=2)


def swiglu_concat_reference(attention: Tensor | None, gated: Tensor) -> Tensor:
    """`swiglu_concat` in plain PyTorch, as diffusers computes it."""
    gate, value = gated.chunk(2, dim=2)
    result = torch.nn.functional.silu(gate) * value
    return result if attention is None else torch.cat([attention, result], dim=2)


def flash_attention_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`flash_attention` in plain PyTorch; it allocates the whole matrix of scores."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: Tensor
) -> Tensor:
    """`lora_linear` in plain PyTorch."""
    return lora_add_reference(torch.nn.functional.linear(x, weight, bias), x, down, up, scale)


def lora_add_reference(base: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """`lora_add` in plain PyTorch."""
    low = x @ down.T
    low = (low.view(scale.shape[0], -1, low.shape[-1]) * scale[:, None, None]).to(x.dtype).view_as(low)
    return base + low @ up.T
