"""Stable Diffusion 3 and 3.5 on diffusers' `SD3Transformer2DModel`: classifier-free guidance in two passes.

Conventions are those of diffusers' `StableDiffusion3Pipeline`. The model: Esser et al., arXiv 2403.03206.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scfm_core.flow.path import per_sample
from scfm_core.models.protocol import Conditioning, ModelFamily, dtype_of

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
    """SD3 and SD3.5 in diffusers' format. Guidance is not an input of the network; it is the scale of two passes."""

    pipeline = "StableDiffusion3Pipeline"
    t5_tokenizer = "tokenizer_3"
    clip_tokens = 77
    is_guided_by_passes = True
    known: ClassVar[dict[str, dict[str, Any]]] = {
        f"stabilityai/stable-diffusion-3.5-{size}": {
            "transformer": transformer,
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

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """See `ModelFamily`. With guidance w: `uncond + w * (cond - uncond)`; one pass if guidance was distilled.

        `uncond` gets no gradient: otherwise training could lower the loss by moving `uncond` away from the data.
        """
        if cond.guidance is None or self.has_learned_guidance:
            return self._pass(network, x, sigma, cond)
        assert self.unconditional is not None, "TextEncoders sets it"
        empty, rows = self.unconditional, len(cond)
        with torch.no_grad():
            unconditional = self._pass(
                network,
                x,
                sigma,
                Conditioning(text=empty.text.expand(rows, -1, -1), pooled=empty.pooled.expand(rows, -1)),
            )
        # Autocast caches the weights that it cast without gradient; the next pass needs weights with gradient.
        torch.clear_autocast_cache()
        conditional = self._pass(network, x, sigma, cond)
        return unconditional + per_sample(cond.guidance, x).to(x.dtype) * (conditional - unconditional)

    def _pass(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        dtype = dtype_of(network)
        velocity: Tensor = network(
            hidden_states=x.to(dtype),
            encoder_hidden_states=cond.text.to(dtype),
            pooled_projections=cond.pooled.to(dtype),
            timestep=1000 * sigma,
            return_dict=False,
        )[0]
        return velocity

    def encode_prompt(
        self, pipeline: Any, captions: Sequence[str], device: torch.device, text_length: int
    ) -> tuple[Tensor, Tensor]:
        """See `ModelFamily`. The tokens of both CLIPs, joined along features, come before those of T5."""
        prompts = list(captions)
        text, _, pooled, _ = pipeline.encode_prompt(
            prompts, prompts, prompts, device=device, do_classifier_free_guidance=False, max_sequence_length=text_length
        )
        return text, pooled

    def products(self, image_tokens: int, text_tokens: int) -> tuple[float, float]:
        """See `ModelFamily`. Modulation and embedders are not counted. The last block has no text after attention."""
        arch, tokens = self.network_config, image_tokens + text_tokens
        dim, blocks = arch["num_attention_heads"] * arch["attention_head_dim"], arch["num_layers"]
        dual = len(arch["dual_attention_layers"])
        # A block has 12 D^2 weights per token; a second attention, over the image only, has 4 D^2.
        linear = 24 * blocks * dim**2 * tokens - 18 * dim**2 * text_tokens + 8 * dual * dim**2 * image_tokens
        return linear, 4 * dim * (blocks * tokens**2 + dual * image_tokens**2)
