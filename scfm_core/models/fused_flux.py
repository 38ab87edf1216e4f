"""Flux.1's blocks with fused operations, around the same layers under the same names."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm_core.kernels.attention import attention
from scfm_core.kernels.ops import Ops
from scfm_core.models.adapters import linears

Rotation = tuple[Tensor, Tensor]


class FusedBlock(nn.Module):
    """A block that takes over the layers of diffusers' block, and calls `ops` between them."""

    def __init__(self, block: nn.Module, ops: Ops) -> None:
        super().__init__()
        for name, child in block.named_children():
            setattr(self, name, child)
        self.ops = ops

    def joined(self) -> list[tuple[nn.Module, ...]]:
        """Groups of linears that have the same input, and are called together."""
        return []


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
        query, key, value = linears(hidden_states, (attn.to_q, attn.to_k, attn.to_v))
        if encoder_hidden_states is None:
            return self.attend(attn, query, key, value, image_rotary_emb)
        text_query, text_key, text_value = linears(
            encoder_hidden_states, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        value = torch.cat([text_value, value], dim=1)
        result = self.attend(attn, query, key, value, image_rotary_emb, text_query, text_key)
        # The backward of `split` is one concatenation. A product adds its bias itself only if its input is contiguous.
        text, image = result.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())

    def attend(
        self,
        attn: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        image_rotary_emb: Rotation,
        text_query: Tensor | None = None,
        text_key: Tensor | None = None,
    ) -> Tensor:
        """Norm, rotation and attention, [B, S, D]. With a text stream, `value` has both streams, and text comes first."""
        has_text, heads, eps = text_query is not None, attn.heads, attn.norm_q.eps
        text_weight_q, text_weight_k = (
            (attn.norm_added_q.weight, attn.norm_added_k.weight) if has_text else (None, None)
        )
        query = self.ops.norm_rope(query, text_query, attn.norm_q.weight, text_weight_q, *image_rotary_emb, heads, eps)
        key = self.ops.norm_rope(key, text_key, attn.norm_k.weight, text_weight_k, *image_rotary_emb, heads, eps)
        return attention(query, key, value.unflatten(-1, (heads, -1)), self.backend).flatten(2, 3)


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
        modulations = linears(F.silu(temb), (self.norm1.linear, self.norm1_context.linear))
        shift, scale, gate, *image_mlp = modulations[0].chunk(6, dim=1)
        text_shift, text_scale, text_gate, *text_mlp = modulations[1].chunk(6, dim=1)
        branch, text_branch = self.attn(
            hidden_states=self.ops.modulate(hidden_states, scale, shift),
            encoder_hidden_states=self.ops.modulate(encoder_hidden_states, text_scale, text_shift),
            image_rotary_emb=image_rotary_emb,
        )
        image = self._feed_forward(self.ff, hidden_states, branch, gate, image_mlp)
        return self._feed_forward(self.ff_context, encoder_hidden_states, text_branch, text_gate, text_mlp), image

    def _feed_forward(self, layers: Any, x: Tensor, branch: Tensor, gate: Tensor, modulation: list[Tensor]) -> Tensor:
        """A stream after attention [B, S, D]: the sum with its branch, then the gated feed-forward."""
        shift, scale, gate_mlp = modulation
        stream, normed = self.ops.gated_modulate(x, branch, gate, scale, shift)
        return self.ops.gate_residual(stream, layers(normed), gate_mlp)

    def joined(self) -> list[tuple[nn.Module, ...]]:
        """See `FusedBlock`."""
        return [(self.norm1.linear, self.norm1_context.linear), *attention_inputs(self.attn)]


def attention_inputs(attn: Any) -> list[tuple[nn.Module, ...]]:
    """The linears of each stream of a joint attention."""
    return [(attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]


class FusedSingleBlock(FusedBlock):
    """diffusers' `FluxSingleTransformerBlock` with fused operations, on the joint stream."""

    norm: Any
    attn: Any
    proj_mlp: Any
    proj_out: Any

    def forward(self, joint: Tensor, temb: Tensor, image_rotary_emb: Rotation) -> Tensor:
        """Text and image stream as one tensor [B, S, D], text first. `joint_forward` calls it."""
        shift, scale, gate = self.norm.linear(F.silu(temb)).chunk(3, dim=1)
        query, key, value, mlp = linears(self.ops.modulate(joint, scale, shift), self._inputs())
        attended = self.attn.processor.attend(self.attn, query, key, value, image_rotary_emb)
        return self.ops.gate_residual(joint, self.proj_out(self.ops.gelu_concat(attended, mlp)), gate)

    def _inputs(self) -> tuple[nn.Module, ...]:
        return self.attn.to_q, self.attn.to_k, self.attn.to_v, self.proj_mlp

    def joined(self) -> list[tuple[nn.Module, ...]]:
        """See `FusedBlock`."""
        return [self._inputs()]


def joint_forward(
    network: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor | None = None,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """The forward of a `FluxTransformer2DModel` with fused blocks; arguments and result as in diffusers.

    diffusers' single blocks join the streams and split them again, each of them: a copy of the stream for each block, and inputs of
    other strides for the first block than for the others, so torch.compile makes other graphs for it. Here they are joined once.
    """
    assert not return_dict, "the result is a tuple"
    image, text = network.x_embedder(hidden_states), network.context_embedder(encoder_hidden_states)
    times = [timestep] if guidance is None else [timestep, guidance]
    temb = network.time_text_embed(*(time.to(image.dtype) * 1000 for time in times), pooled_projections)
    rotation = network.pos_embed(torch.cat([txt_ids, img_ids]))
    for block in network.transformer_blocks:
        text, image = block(image, text, temb, rotation)
    joint = torch.cat([text, image], dim=1)
    for block in network.single_transformer_blocks:
        joint = block(joint, temb, rotation)
    return (network.proj_out(network.norm_out(joint[:, text.shape[1] :], temb)),)
