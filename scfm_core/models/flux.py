"""Flux on diffusers' `FluxTransformer2DModel`: packing, position ids, guidance, timesteps.

Layout and conventions as in diffusers' `FluxPipeline`; see also https://github.com/black-forest-labs/flux.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scfm_core.errors import UserError
from scfm_core.models.protocol import Conditioning
from scfm_core.models.weights import component_config, is_local, load_component, resolve_folder

PIPELINE = "FluxPipeline"
PATCH = 2  # latents are packed 2 x 2 into tokens

# Architectures that a dry run knows without network access (transformer/config.json of the repository).
KNOWN_ARCHITECTURES: dict[str, dict[str, Any]] = {
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


def pack_latents(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> tokens [B, H/2 * W/2, 4C]; a token holds C x 2 x 2."""
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
    """Position ids (0, row, column) of the packed tokens of latents of `height` x `width`: fp32 [tokens, 3]."""
    rows = torch.arange(height // PATCH, device=device, dtype=torch.float32)
    columns = torch.arange(width // PATCH, device=device, dtype=torch.float32)
    ids = torch.zeros(len(rows), len(columns), 3, device=device)
    ids[..., 1], ids[..., 2] = rows[:, None], columns[None, :]
    return ids.flatten(0, 1)


class Flux:
    """Flux.1 in diffusers' format.

    Args:
        path: hub id or local folder with `transformer`, `vae`, `text_encoder`, `text_encoder_2` and tokenizers.
        offline: do not touch the network; a hub id is then good for its architecture alone (dry run).
    """

    def __init__(self, path: str, *, offline: bool = False) -> None:
        known = KNOWN_ARCHITECTURES.get(path)
        if offline and known and not is_local(path):
            self.folder = Path(path)
            self.network_config, self.vae_config = known["transformer"], known["vae"]
            self.encoder_bytes: int = known["encoder_bytes"]
            return
        if offline and not is_local(path):
            raise UserError(
                f"model.path {path!r} is not a local folder, and a dry run of a hub id knows these architectures "
                f"alone: {', '.join(KNOWN_ARCHITECTURES)}. Download the model first, or give a local folder"
            )
        self.folder = resolve_folder(path, PIPELINE)
        self.network_config = component_config(self.folder, "transformer")
        self.vae_config = component_config(self.folder, "vae")
        encoders = ("vae", "text_encoder", "text_encoder_2")
        self.encoder_bytes = sum(
            f.stat().st_size for name in encoders for f in (self.folder / name).glob("*.safetensors")
        )

    def load_network(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """The pre-trained transformer, every parameter in `dtype`."""
        from diffusers import FluxTransformer2DModel

        return load_component(FluxTransformer2DModel, self.folder, "transformer", dtype).to(device)

    def random_network(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> nn.Module:
        """The transformer with fresh weights, every parameter in `dtype`, for training from scratch."""
        from diffusers import FluxTransformer2DModel

        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            network = FluxTransformer2DModel.from_config(dict(self.network_config))
        zero_modulation(network)
        return nn.Module.to(network, dtype)  # not diffusers' own `to`, which warns

    def meta_network(self) -> nn.Module:
        """The transformer on the meta device."""
        from diffusers import FluxTransformer2DModel

        with torch.device("meta"):
            return FluxTransformer2DModel.from_config(dict(self.network_config))

    @property
    def pixel_multiple(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return PATCH * 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, H, W] of an image of `height` x `width` pixels.

        Raises:
            UserError: if a side is not a multiple of `pixel_multiple`.
        """
        multiple = self.pixel_multiple
        if height < multiple or width < multiple or height % multiple or width % multiple:
            raise UserError(
                f"an image of {height} x {width} pixels cannot be packed: this model needs sides that are multiples "
                f"of {multiple}; the nearest is {_nearest(height, multiple)} x {_nearest(width, multiple)}"
            )
        factor = multiple // PATCH
        return self.vae_config["latent_channels"], height // factor, width // factor

    def image_tokens(self, latents: Tensor) -> int:
        """Packed tokens of latents [B, C, H, W]."""
        return latents.shape[-2] * latents.shape[-1] // PATCH**2

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The network's velocity: x [B, C, H, W], sigma fp32 [B] -> [B, C, H, W] in the network's dtype."""
        height, width = x.shape[-2:]
        dtype: torch.dtype = network.dtype  # type: ignore[assignment]  # of diffusers' ModelMixin
        packed = network(
            hidden_states=pack_latents(x).to(dtype),
            encoder_hidden_states=cond.text.to(dtype),
            pooled_projections=cond.pooled.to(dtype),
            timestep=sigma,  # Flux's timestep is sigma; the network multiplies by 1000
            guidance=cond.guidance if self.network_config["guidance_embeds"] else None,
            img_ids=image_ids(height, width, x.device),
            txt_ids=torch.zeros(cond.text.shape[1], 3, device=x.device),
            return_dict=False,
        )[0]
        return unpack_latents(packed, height, width)


def zero_modulation(network: nn.Module) -> None:
    """adaLN-zero (DiT, arXiv 2212.09748): every block starts as the identity, the output at zero."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def _nearest(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
