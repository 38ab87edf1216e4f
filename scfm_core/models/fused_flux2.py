"""FLUX.2's blocks with fused operations, around the same layers under the same names.

Against Flux.1: all blocks share their modulation, which the network computes once; feed-forwards are SwiGLU; a single block
projects queries, keys, values and feed-forward at once.
"""

from typing import Any

from torch import Tensor, nn

from scfm_core.kernels.attention import attention
from scfm_core.kernels.ops import Ops
from scfm_core.models.fused_flux import FusedBlock, Rotation, attention_inputs


class FusedParallelAttnProcessor:
    """diffusers' `Flux2ParallelSelfAttnProcessor` with norm and rotation fused, SwiGLU and joining fused, and a selectable
    attention backend."""

    def __init__(self, ops: Ops, backend: str) -> None:
        self.ops, self.backend = ops, backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> Tensor:
        """As in diffusers: [B, S, D] -> [B, S, D], attention and feed-forward together.

        Raises:
            ValueError: for a mask, or without a rotary embedding.
        """
        if attention_mask is not None or image_rotary_emb is None:
            raise ValueError("the fused attention takes a rotary embedding and no mask; set kernels.fused: none")
        width, eps = attn.inner_dim, attn.norm_q.eps
        # The backward of one `split` is one concatenation.
        query, key, value, gated = attn.to_qkv_mlp_proj(hidden_states).split(
            [width, width, width, attn.mlp_hidden_dim * attn.mlp_mult_factor], dim=-1
        )
        query = self.ops.norm_rope(query, None, attn.norm_q.weight, None, *image_rotary_emb, attn.heads, eps)
        key = self.ops.norm_rope(key, None, attn.norm_k.weight, None, *image_rotary_emb, attn.heads, eps)
        result = attention(query, key, value.unflatten(-1, (attn.heads, -1)), self.backend).flatten(2, 3)
        output: Tensor = attn.to_out(self.ops.swiglu_concat(result, gated))
        return output


class FusedFlux2DoubleBlock(FusedBlock):
    """diffusers' `Flux2TransformerBlock` with fused operations."""

    norm1: Any
    norm1_context: Any
    norm2: Any
    norm2_context: Any
    attn: Any
    ff: Any
    ff_context: Any

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb_mod_img: Tensor,
        temb_mod_txt: Tensor,
        image_rotary_emb: Rotation,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As in diffusers; returns text and image stream. The modulations are [B, 6 D]."""
        assert not joint_attention_kwargs, "adapters in joint_attention_kwargs are not supported"
        shift, scale, gate, *image_mlp = temb_mod_img.chunk(6, dim=-1)
        text_shift, text_scale, text_gate, *text_mlp = temb_mod_txt.chunk(6, dim=-1)
        branch, text_branch = self.attn(
            hidden_states=self.ops.modulate(hidden_states, scale, shift, self.norm1.eps),
            encoder_hidden_states=self.ops.modulate(
                encoder_hidden_states, text_scale, text_shift, self.norm1_context.eps
            ),
            image_rotary_emb=image_rotary_emb,
        )
        image = self._feed_forward(self.ff, hidden_states, branch, gate, image_mlp, self.norm2.eps)
        text = self._feed_forward(
            self.ff_context, encoder_hidden_states, text_branch, text_gate, text_mlp, self.norm2_context.eps
        )
        return text, image

    def joined(self) -> list[tuple[nn.Module, ...]]:
        """See `FusedBlock`."""
        return attention_inputs(self.attn)

    def _feed_forward(
        self, layers: Any, x: Tensor, branch: Tensor, gate: Tensor, modulation: list[Tensor], eps: float
    ) -> Tensor:
        """A stream after attention [B, S, D]: the sum with its branch, then the gated feed-forward."""
        shift, scale, gate_mlp = modulation
        stream, normed = self.ops.gated_modulate(x, branch, gate, scale, shift, eps)
        branch = layers.linear_out(self.ops.swiglu_concat(None, layers.linear_in(normed)))
        return self.ops.gate_residual(stream, branch, gate_mlp)


class FusedFlux2SingleBlock(FusedBlock):
    """diffusers' `Flux2SingleTransformerBlock` with fused operations."""

    norm: Any
    attn: Any

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb_mod: Tensor,
        image_rotary_emb: Rotation,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """As in diffusers, on the joint stream: text comes first in `hidden_states`. The modulation is [B, 3 D]."""
        assert encoder_hidden_states is None, "the network joins both streams before its single blocks"
        assert not joint_attention_kwargs, "adapters in joint_attention_kwargs are not supported"
        shift, scale, gate = temb_mod.chunk(3, dim=-1)
        normed = self.ops.modulate(hidden_states, scale, shift, self.norm.eps)
        branch = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        return self.ops.gate_residual(hidden_states, branch, gate)
