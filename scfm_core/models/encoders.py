"""The frozen encoders: T5 and CLIP for captions, the VAE for images. diffusers does the work."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scfm_core.errors import UserError
from scfm_core.models.protocol import Conditioning, ModelFamily
from scfm_core.models.weights import load_component


class TextEncoders:
    """CLIP and T5 of a pipeline.

    Args:
        family: the model; it learns here what an empty caption is.
        text_length: T5 tokens; captions are padded or cut to it.
    """

    def __init__(self, family: ModelFamily, text_length: int, dtype: torch.dtype, device: torch.device | str) -> None:
        import diffusers
        from diffusers.utils import logging

        logging.disable_progress_bar()  # of "loading components"; every start would print it
        cls = getattr(diffusers, family.pipeline)
        # A caption beyond 77 tokens is cut for CLIP, not for T5: as it should be, but said of every single one.
        logging.get_logger(cls.__module__).setLevel(logging.ERROR)
        self.family, self.text_length, self.device = family, text_length, torch.device(device)
        try:
            self._pipeline = cls.from_pretrained(
                family.folder, transformer=None, vae=None, torch_dtype=dtype, use_safetensors=True
            ).to(self.device)
        except (OSError, ValueError) as error:
            raise UserError(f"model.path: the text encoders in {family.folder} cannot be loaded: {error}") from error
        family.unconditional = self.encode([""])

    @torch.no_grad()
    def encode(self, captions: Sequence[str], guidance: float | None = None) -> Conditioning:
        """Captions -> text [B, L, D] and pooled [B, P]; `guidance` is the same for all rows."""
        text, pooled = self.family.encode_prompt(self._pipeline, captions, self.device, self.text_length)
        rows = None if guidance is None else torch.full((len(captions),), guidance, device=self.device)
        return Conditioning(text=text, pooled=pooled, guidance=rows)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, CLIP's and T5's with its end mark; the rest is padding."""
        tokenizer = getattr(self._pipeline, self.family.t5_tokenizer)
        tokens = tokenizer(list(captions), truncation=True, max_length=self.text_length)
        return [self.family.clip_tokens + len(row) for row in tokens.input_ids]


class Autoencoder:
    """diffusers' `AutoencoderKL`, with the scaling of the latents folded in; of a model in pixel space, the identity."""

    def __init__(self, family: ModelFamily, dtype: torch.dtype, device: torch.device | str) -> None:
        from diffusers import AutoencoderKL

        self.grey = family.in_pixels and family.vae_config["latent_channels"] == 1
        self.vae = None if family.in_pixels else load_component(AutoencoderKL, family.folder, "vae", dtype).to(device)
        if self.vae is not None:
            self.shift = self.vae.config.shift_factor or 0.0
            self.scale = self.vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]: the posterior's mean, so that a cache and
        encoding on the fly agree and nothing random enters."""
        if self.vae is None:
            return images.mean(1, keepdim=True) if self.grey else images
        mean = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return (mean - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images [B, 3, H, W], fp32 in [0, 1]."""
        if self.vae is None:
            images = latents.expand(-1, 3, -1, -1)
        else:
            latents = latents.to(self.vae.device, self.vae.dtype) / self.scale + self.shift
            images = self.vae.decode(latents, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)
