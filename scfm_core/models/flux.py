"""Flux on diffusers' `FluxTransformer2DModel`: packing, position ids, guidance, timesteps.

Layout and conventions are those of diffusers' `FluxPipeline`; see also https://github.com/black-forest-labs/flux.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from scfm_core.kernels.ops import Ops
from scfm_core.models import original_names
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.protocol import FieldKind, ModelFamily, dtype_of, rounded

PATCH = 2
"""Side of a packed token, in latents."""


def pack_latents(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> tokens [B, H/2 * W/2, 4C]; a token is a patch of C x 2 x 2."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack_latents(packed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack_latents`, for latents of `height` x `width`."""
    batch, _, features = packed.shape
    channels = features // PATCH**2
    patches = packed.reshape(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Position ids (0, row, column) of the packed tokens, for latents of `height` x `width`: fp32 [tokens, 3]."""
    rows = torch.arange(height // PATCH, device=device, dtype=torch.float32)
    columns = torch.arange(width // PATCH, device=device, dtype=torch.float32)
    ids = torch.zeros(len(rows), len(columns), 3, device=device)
    ids[..., 1], ids[..., 2] = rows[:, None], columns[None, :]
    return ids.flatten(0, 1)


class Flux(ModelFamily):
    """Flux.1 in diffusers' format."""

    pipelines = ("FluxPipeline",)
    fields: ClassVar[dict[str, FieldKind]] = {"text": "tokens", "pooled": "vector"}
    tokenizer = "tokenizer_2"
    in_channels_per_latent = PATCH**2
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    has_kernels = True
    other_tools = original_names.FLUX
    known: ClassVar[dict[str, dict[str, Any]]] = {
        "black-forest-labs/FLUX.1-dev": {
            "transformer": {
                "attention_head_dim": 128,
                "axes_dims_rope": (16, 56, 56),
                "guidance_embeds": True,
                "in_channels": 64,
                "joint_attention_dim": 4096,
                "num_attention_heads": 24,
                "num_layers": 19,
                "num_single_layers": 38,
                "patch_size": 1,
                "pooled_projection_dim": 768,
            },
            # bf16: T5-XXL's encoder 4.76 B, CLIP-L's text model 0.12 B, the VAE 0.08 B parameters
            "encoder_bytes": 2 * 4_969_000_000,
            "vae": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16},
        }
    }

    @property
    def network_class(self) -> Any:
        """See `ModelFamily`."""
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel

    @property
    def guidance_kind(self) -> Literal["input", "passes", "none"]:
        """See `ModelFamily`. Schnell has no guidance."""
        return "input" if self.network_config["guidance_embeds"] else "none"

    def shapes(self, text_length: int) -> dict[str, tuple[int, ...]]:
        """See `ModelFamily`."""
        arch = self.network_config
        return {"text": (text_length, arch["joint_attention_dim"]), "pooled": (arch["pooled_projection_dim"],)}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """See `ModelFamily`."""
        height, width = x.shape[-2:]
        dtype, text = dtype_of(network), cond.fields["text"]
        packed = network(
            hidden_states=pack_latents(x).to(dtype),
            encoder_hidden_states=text.to(dtype),
            pooled_projections=cond.fields["pooled"].to(dtype),
            timestep=timestep_of(sigma, dtype),
            guidance=cond.guidance if self.guidance_kind == "input" else None,
            img_ids=image_ids(height, width, x.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            return_dict=False,
        )[0]
        return unpack_latents(packed, height, width)

    def fuse(self, network: nn.Module, ops: Ops, attention_backend: str, *, blocks: bool) -> None:
        """See `ModelFamily`."""
        from scfm_core.models.fused import fuse

        fuse(network, ops, attention_backend, blocks=blocks)

    def encode_prompt(
        self, pipeline: Any, captions: Sequence[str], device: torch.device, text_length: int
    ) -> tuple[dict[str, Tensor], None]:
        """See `ModelFamily`."""
        text, pooled, _ = pipeline.encode_prompt(prompt=list(captions), device=device, max_sequence_length=text_length)
        return {"text": text, "pooled": pooled}, None


def timestep_of(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """Flux's timestep is sigma; the network multiplies it by 1000, in its dtype.

    diffusers' pipeline rounds 1000 sigma to bf16 and divides again. Rounding sigma itself would tell the network another time for a
    quarter of all sigmas, by up to 4 of 1000. In fp32, where nothing is rounded, sigma stays as it is.
    """
    timestep = rounded(1000 * sigma, dtype)
    return sigma if timestep.dtype == torch.float32 else timestep / 1000
