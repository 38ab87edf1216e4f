"""Stable Diffusion 3 and 3.5 on diffusers' `SD3Transformer2DModel`: classifier-free guidance.

Conventions are those of diffusers' `StableDiffusion3Pipeline`. The model: Esser et al., arXiv 2403.03206.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scfm_core.models import original_names
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.protocol import FieldKind, ModelFamily, dtype_of

_LARGE = {
    "attention_head_dim": 64,
    "caption_projection_dim": 2432,
    "dual_attention_layers": (),
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 38,
    "num_layers": 38,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
_MEDIUM = _LARGE | {
    "caption_projection_dim": 1536,
    "dual_attention_layers": tuple(range(13)),
    "num_attention_heads": 24,
    "num_layers": 24,
    "pos_embed_max_size": 384,
}
_VAE = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16}


class SD3(ModelFamily):
    """SD3 and SD3.5 in diffusers' format."""

    pipelines = ("StableDiffusion3Pipeline",)
    fields: ClassVar[dict[str, FieldKind]] = {"text": "tokens", "pooled": "vector"}
    tokenizer = "tokenizer_3"
    extra_tokens = 77
    other_tools = original_names.SD3
    known: ClassVar[dict[str, dict[str, Any]]] = {
        f"stabilityai/stable-diffusion-3.5-{size}": {
            "transformer": transformer,
            "scheduler": {"shift": 3.0},
            # bf16: T5-XXL's encoder 4.76 B, CLIP-G's text model 0.69 B, CLIP-L's 0.12 B, the VAE 0.08 B parameters
            "encoder_bytes": 2 * 5_664_000_000,
            "vae": _VAE,
        }
        for size, transformer in (("large", _LARGE), ("medium", _MEDIUM))
    }

    @property
    def network_class(self) -> Any:
        """See `ModelFamily`."""
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel

    def shapes(self, text_length: int) -> dict[str, tuple[int, ...]]:
        """See `ModelFamily`."""
        arch = self.network_config
        return {
            "text": (self.text_tokens(text_length), arch["joint_attention_dim"]),
            "pooled": (arch["pooled_projection_dim"],),
        }

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """See `ModelFamily`."""
        dtype = dtype_of(network)
        velocity: Tensor = network(
            hidden_states=x.to(dtype),
            encoder_hidden_states=cond.fields["text"].to(dtype),
            pooled_projections=cond.fields["pooled"].to(dtype),
            timestep=1000 * sigma,
            return_dict=False,
        )[0]
        return velocity

    def encode_prompt(
        self, pipeline: Any, captions: Sequence[str], device: torch.device, text_length: int
    ) -> tuple[dict[str, Tensor], None]:
        """See `ModelFamily`. The tokens of both CLIPs, joined along features, come before those of T5."""
        prompts = list(captions)
        text, _, pooled, _ = pipeline.encode_prompt(
            prompts, prompts, prompts, device=device, do_classifier_free_guidance=False, max_sequence_length=text_length
        )
        return {"text": text, "pooled": pooled}, None
