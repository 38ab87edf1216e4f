"""The VAE of Qwen-Image, which other families share: 8 x 8 pixels per latent, 16 channels, and an axis of frames.

Its latents [B, C, 1, H, W] are [B, C, H, W] in scfm. Conventions are those of diffusers' `QwenImagePipeline`.
"""

from typing import Any

import torch
from torch import Tensor

from scfm_core.models.protocol import ModelFamily
from scfm_core.readback import to_device

ARCHITECTURE: dict[str, Any] = {"z_dim": 16, "temperal_downsample": (False, True, True)}
"""What `known` needs of the VAE's config.json; diffusers spells it so."""
PARAMETERS = 126_892_531
"""Of the encoder and the decoder."""


class QwenVAE(ModelFamily):
    """A family whose latents are those of diffusers' `AutoencoderKLQwenImage`."""

    @property
    def vae_class(self) -> Any:
        """See `ModelFamily`."""
        from diffusers import AutoencoderKLQwenImage

        return AutoencoderKLQwenImage

    @property
    def latent_channels(self) -> int:
        """See `ModelFamily`."""
        return self.vae_config["z_dim"]

    @property
    def vae_factor(self) -> int:
        """See `ModelFamily`."""
        return 2 ** len(self.vae_config["temperal_downsample"])

    def encode_images(self, vae: Any, images: Tensor) -> Tensor:
        """See `ModelFamily`. `(z - mean) / std` in fp32, with the mean and std of the VAE's config, per channel."""
        latents = vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0].float()
        mean, std = _statistics(vae, latents)
        return (latents - mean) / std

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """See `ModelFamily`. diffusers' pipeline divides by 1 / std, which rounds differently."""
        mean, std = _statistics(vae, latents)
        images: Tensor = vae.decode((latents / (1 / std) + mean)[:, :, None], return_dict=False)[0]
        return images[:, :, 0]


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of each channel of the latents, [C, 1, 1], in their dtype and on their device."""
    mean, std = (
        to_device(torch.tensor(values).view(-1, 1, 1).to(latents.dtype), latents.device)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
