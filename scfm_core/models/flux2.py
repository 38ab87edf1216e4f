"""FLUX.2 on diffusers' `Flux2Transformer2DModel`: dev with guidance as an input, klein-base with classifier-free guidance.

As diffusers' `Flux2Pipeline` and `Flux2KleinPipeline` call it; see also https://github.com/black-forest-labs/flux2.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm_core.kernels.ops import Ops
from scfm_core.models import fused, original_names
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.flux import timestep_of
from scfm_core.models.protocol import FieldKind, ModelFamily, dtype_of

# Pipeline, double and single blocks, heads, features of the text; parameters of text encoder (Mistral Small 3.2, Qwen3) and VAE
_MODELS = {
    "dev": ("Flux2Pipeline", 8, 48, 48, 15360, 24_095_000_000),
    "klein-base-4B": ("Flux2KleinPipeline", 5, 20, 24, 7680, 4_107_000_000),
    "klein-base-9B": ("Flux2KleinPipeline", 8, 24, 32, 12288, 8_275_000_000),
}
_PATCH = 2  # side of the VAE's patches, which are the channels of our latents


class Flux2(ModelFamily):
    """FLUX.2 in diffusers' format. Our latents are the VAE's after patches and batch norm, as diffusers' noise is."""

    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    fields: ClassVar[dict[str, FieldKind]] = {"text": "tokens"}
    patch = 1
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    has_kernels = True
    other_tools = original_names.FLUX2
    known: ClassVar[dict[str, dict[str, Any]]] = {
        f"black-forest-labs/FLUX.2-{name}": {
            "pipeline": pipeline,
            "transformer": {
                "attention_head_dim": 128, "axes_dims_rope": (32, 32, 32, 32), "guidance_embeds": name == "dev",
                "in_channels": 128, "joint_attention_dim": text, "num_attention_heads": heads, "num_layers": double,
                "num_single_layers": single,
            },
            "vae": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 32}, "encoder_bytes": 2 * parameters,  # bf16
        }
        for name, (pipeline, double, single, heads, text, parameters) in _MODELS.items()
    }  # fmt: skip

    @property
    def network_class(self) -> Any:
        """See `ModelFamily`."""
        from diffusers import Flux2Transformer2DModel

        return Flux2Transformer2DModel

    @property
    def vae_class(self) -> Any:
        """See `ModelFamily`."""
        from diffusers import AutoencoderKLFlux2

        return AutoencoderKLFlux2

    @property
    def guidance_kind(self) -> Literal["input", "passes", "none"]:
        """See `ModelFamily`. The klein models without `base` were distilled to 4 steps, and their pipeline ignores guidance."""
        if self.network_config["guidance_embeds"]:
            return "input"
        return "none" if self.pipeline_config.get("is_distilled") else "passes"

    @property
    def latent_channels(self) -> int:
        """See `ModelFamily`."""
        return super().latent_channels * (1 if self.in_pixels else _PATCH**2)

    @property
    def vae_factor(self) -> int:
        """See `ModelFamily`."""
        return super().vae_factor * (1 if self.in_pixels else _PATCH)

    def shapes(self, text_length: int) -> dict[str, tuple[int, ...]]:
        """See `ModelFamily`."""
        return {"text": (text_length, self.network_config["joint_attention_dim"])}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """See `ModelFamily`. The timestep is sigma, rounded as in Flux.1; the network multiplies it by 1000."""
        height, width = x.shape[-2:]
        dtype, text = dtype_of(network), cond.fields["text"]
        tokens: Tensor = network(
            hidden_states=x.flatten(2).transpose(1, 2).to(dtype),
            encoder_hidden_states=text.to(dtype),
            timestep=timestep_of(sigma, dtype),
            guidance=cond.guidance if self.guidance_kind == "input" else None,
            img_ids=_position_ids(height, width, 1, x.device),
            txt_ids=_position_ids(1, 1, text.shape[1], x.device),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def fuse(self, network: nn.Module, ops: Ops, attention_backend: str, *, blocks: bool) -> None:
        """See `ModelFamily`."""
        fused.fuse(network, ops, attention_backend, blocks=blocks)

    def encode_prompt(
        self, pipeline: Any, captions: Sequence[str], device: torch.device, text_length: int
    ) -> tuple[dict[str, Tensor], None]:
        """See `ModelFamily`. Hidden states of three layers of the language model, after its chat template."""
        text, _ = pipeline.encode_prompt(prompt=list(captions), device=device, max_sequence_length=text_length)
        return {"text": text}, None

    def count_tokens(self, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        """See `ModelFamily`. The tokens of the chat template count. dev's `tokenizer` may be the processor around it."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        chats, options = format_input(list(captions)), {"add_generation_prompt": False}
        if self.pipeline == "Flux2KleinPipeline":
            chats = [[{"role": "user", "content": caption}] for caption in captions]
            options = {"add_generation_prompt": True, "enable_thinking": False}
        texts = tokenizer.apply_chat_template(chats, tokenize=False, **options)
        core = getattr(tokenizer, "tokenizer", tokenizer)
        return [len(row) for row in core(texts, add_special_tokens=False, verbose=False).input_ids]

    def encode_images(self, vae: Any, images: Tensor) -> Tensor:
        """See `ModelFamily`."""
        mean, std = _statistics(vae)
        return (F.pixel_unshuffle(vae.encode(images).latent_dist.mode(), _PATCH) - mean) / std

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """See `ModelFamily`."""
        mean, std = _statistics(vae)
        images: Tensor = vae.decode(F.pixel_shuffle(latents * std + mean, _PATCH), return_dict=False)[0]
        return images

    def dynamic_shift(self, image_tokens: int, num_steps: int) -> float:
        """See `ModelFamily`. exp(mu) of black-forest-labs' `compute_empirical_mu`, linear in both arguments."""
        of_200_steps = 0.00016927 * image_tokens + 0.45666666
        of_10_steps = of_200_steps if image_tokens > 4300 else 8.73809524e-05 * image_tokens + 1.89833333
        return math.exp(of_200_steps + (of_10_steps - of_200_steps) * (200 - num_steps) / 190)


def _position_ids(height: int, width: int, length: int, device: torch.device) -> Tensor:
    """Position ids (time, row, column, place in the text): int64 [height * width * length, 4]."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in (1, height, width, length)))


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the patches' channels, [1, 4 C, 1, 1], from the VAE's batch norm."""
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return vae.bn.running_mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
