"""Flux.1's blocks with fused operations, around the same layers under the same names."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm_core.kernels.attention import attention
from scfm_core.kernels.ops import Ops

Rotation = tuple[Tensor, Tensor]


class FusedBlock(nn.Module):
    """A block that takes over the layers of diffusers' block, and calls `ops` between them."""

    def __init__(self, block: nn.Module, ops: Ops) -> None:
        super().__init__()
        for name, child in block.named_children():
            setattr(self, name, child)
        self.ops = ops


class FusedAttnProcessor:
    """diffusers' `FluxAttnProcessor` or `Flux2AttnProcessor` with norm, rotation and joining fused, and a selectable
    attention backend."""

    def __init__(self, ops: Ops, backend: str) -> None:
        self.ops, self.backend = ops, backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As in diffusers: [B, S, D] -> [B, S, D]; with a text stream, the projected results of image and text.

        Raises:
            ValueError: for a mask, or without a rotary embedding.
        """
        if attention_mask is not None or image_rotary_emb is None:
            raise ValueError("the fused attention takes a rotary embedding and no mask; set kernels.fused: none")
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        text_query = text_key = text_weight_q = text_weight_k = None
        if encoder_hidden_states is not None:
            text_query, text_key = attn.add_q_proj(encoder_hidden_states), attn.add_k_proj(encoder_hidden_states)
            value = torch.cat([attn.add_v_proj(encoder_hidden_states), value], dim=1)
            text_weight_q, text_weight_k = attn.norm_added_q.weight, attn.norm_added_k.weight
        eps = attn.norm_q.eps
        query = self.ops.norm_rope(
            query, text_query, attn.norm_q.weight, text_weight_q, *image_rotary_emb, attn.heads, eps
        )
        key = self.ops.norm_rope(key, text_key, attn.norm_k.weight, text_weight_k, *image_rotary_emb, attn.heads, eps)
        result = attention(query, key, value.unflatten(-1, (attn.heads, -1)), self.backend).flatten(2, 3)
        if encoder_hidden_states is None:
            return result
        # The backward of `split` is one concatenation. A product adds its bias itself only if its input is contiguous.
        text, image = result.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())


class FusedDoubleBlock(FusedBlock):
    """diffusers' `FluxTransformerBlock` with fused operations."""

    norm1: Any
    norm1_context: Any
    attn: Any
    ff: Any
    ff_context: Any

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotation,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As in diffusers; returns text and image stream."""
        assert not joint_attention_kwargs, "adapters in joint_attention_kwargs are not supported"
        embedded = F.silu(temb)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1.linear(embedded).chunk(6, dim=1)
        text_shift, text_scale, text_gate, text_shift_mlp, text_scale_mlp, text_gate_mlp = self.norm1_context.linear(
            embedded
        ).chunk(6, dim=1)
        branch, text_branch = self.attn(
            hidden_states=self.ops.modulate(hidden_states, scale, shift),
            encoder_hidden_states=self.ops.modulate(encoder_hidden_states, text_scale, text_shift),
            image_rotary_emb=image_rotary_emb,
        )
        image, normed = self.ops.gated_modulate(hidden_states, branch, gate, scale_mlp, shift_mlp)
        image = self.ops.gate_residual(image, self.ff(normed), gate_mlp)
        text, normed = self.ops.gated_modulate(
            encoder_hidden_states, text_branch, text_gate, text_scale_mlp, text_shift_mlp
        )
        return self.ops.gate_residual(text, self.ff_context(normed), text_gate_mlp), image


class FusedSingleBlock(FusedBlock):
    """diffusers' `FluxSingleTransformerBlock` with fused operations."""

    norm: Any
    attn: Any
    proj_mlp: Any
    proj_out: Any

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotation,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As in diffusers; returns text and image stream."""
        assert not joint_attention_kwargs, "adapters in joint_attention_kwargs are not supported"
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = self.norm.linear(F.silu(temb)).chunk(3, dim=1)
        normed = self.ops.modulate(joint, scale, shift)
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        branch = self.proj_out(self.ops.gelu_concat(attended, self.proj_mlp(normed)))
        joint = self.ops.gate_residual(joint, branch, gate)
        text, image = joint.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return text, image
