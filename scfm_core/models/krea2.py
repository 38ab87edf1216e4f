"""Krea 2 on diffusers' `Krea2Transformer2DModel`: one stream of tokens, and hidden states of many layers as text.

Conventions are those of diffusers' `Krea2Pipeline`; see also https://github.com/krea-ai/krea-2.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scfm_core.models import original_names, qwen_vae
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.flux import image_ids, pack_latents, unpack_latents
from scfm_core.models.protocol import FieldKind, dtype_of, rounded

_TRANSFORMER = {
    "attention_head_dim": 128,
    "axes_dims_rope": (32, 48, 48),
    "in_channels": 64,
    "intermediate_size": 16384,
    "num_attention_heads": 48,
    "num_key_value_heads": 12,
    "num_layers": 28,
    "num_text_layers": 12,
    "text_hidden_dim": 2560,
    "text_intermediate_size": 6912,
    "text_num_attention_heads": 20,
    "text_num_key_value_heads": 20,
}


class Krea2(qwen_vae.QwenVAE):
    """Krea 2 in diffusers' format. The velocity is `cond + s * (cond - uncond)`, so a scale s of 0 is one pass."""

    pipelines = ("Krea2Pipeline",)
    fields: ClassVar[dict[str, FieldKind]] = {"text": "masked"}
    neutral_guidance = 0.0
    mu_points = ((256, 0.5), (6400, 1.15))
    in_channels_per_latent = 4
    static_shapes = False
    other_tools = original_names.KREA2
    known: ClassVar[dict[str, dict[str, Any]]] = {
        "krea/Krea-2-Raw": {
            "transformer": _TRANSFORMER,
            # bf16: Qwen3-VL 4B with its vision tower 4.438 B, the VAE 0.127 B parameters
            "encoder_bytes": 2 * (4_438_000_000 + qwen_vae.PARAMETERS),
            "vae": qwen_vae.ARCHITECTURE,
        }
    }

    @property
    def network_class(self) -> Any:
        """See `ModelFamily`."""
        from diffusers import Krea2Transformer2DModel

        return Krea2Transformer2DModel

    @property
    def kv_heads(self) -> int:
        """See `ModelFamily`."""
        return int(self.network_config["num_key_value_heads"])

    def shapes(self, text_length: int) -> dict[str, tuple[int, ...]]:
        """See `ModelFamily`. A token has the hidden states of several layers, [layers, D]."""
        return {"text": (text_length, self.network_config["num_text_layers"], self.network_config["text_hidden_dim"])}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """See `ModelFamily`. All text tokens have position 0, so place and number of masked ones do not matter."""
        height, width = x.shape[-2:]
        dtype, text = dtype_of(network), cond.fields["text"]
        positions = image_ids(height, width, x.device)
        packed = network(
            hidden_states=pack_latents(x).to(dtype),
            encoder_hidden_states=text.to(dtype),
            encoder_attention_mask=cond.mask_if_needed,
            timestep=rounded(sigma, dtype),
            position_ids=torch.cat([positions.new_zeros(text.shape[1], 3), positions]),
            return_dict=False,
        )[0]
        return unpack_latents(packed, height, width)

    def guide(self, cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
        """See `ModelFamily`. A scale s is 1 + s of classifier-free guidance."""
        return cond + scale * (cond - uncond)

    def encode_prompt(
        self, pipeline: Any, captions: Sequence[str], device: torch.device, text_length: int
    ) -> tuple[dict[str, Tensor], tuple[int, ...] | None]:
        """See `ModelFamily`.

        The pipeline pads between the caption and the end of the template, and masks the padding. Here it is left out.
        """
        text, mask = pipeline.encode_prompt(list(captions), device=device, max_sequence_length=text_length)
        rows = [row[real] for row, real in zip(text, mask, strict=True)]
        return {"text": nn.utils.rnn.pad_sequence(rows, batch_first=True)}, tuple(len(row) for row in rows)

    def count_tokens(self, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        """See `ModelFamily`. The caption, and the five tokens of the template behind it."""
        return [count + 5 for count in super().count_tokens(tokenizer, captions)]

    def dynamic_shift(self, image_tokens: int, num_steps: int) -> float:
        """See `ModelFamily`. One number for the model that was distilled to a few steps."""
        if self.pipeline_config.get("is_distilled"):
            return math.exp(1.15)
        return super().dynamic_shift(image_tokens, num_steps)
