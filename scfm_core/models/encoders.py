"""The frozen encoders: T5 and CLIP for captions, the VAE for images. diffusers does the work."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scfm_core.errors import UserError
from scfm_core.models.protocol import Conditioning
from scfm_core.models.weights import load_component


class TextEncoders:
    """CLIP (pooled) and T5 (sequence) of a Flux pipeline.

    Args:
        folder: a pipeline in diffusers' format.
        text_length: T5 tokens; captions are padded or cut to it.
    """

    def __init__(self, folder: Path, text_length: int, dtype: torch.dtype, device: torch.device | str) -> None:
        from diffusers import FluxPipeline
        from diffusers.utils import logging

        logging.disable_progress_bar()  # of "loading components"; every start would print it
        # A caption beyond 77 tokens is cut for CLIP, not for T5: as it should be, but said of every single one.
        logging.get_logger("diffusers.pipelines.flux.pipeline_flux").setLevel(logging.ERROR)
        self.text_length = text_length
        self.device = torch.device(device)
        try:
            self._pipeline = FluxPipeline.from_pretrained(
                folder, transformer=None, vae=None, torch_dtype=dtype, use_safetensors=True
            ).to(self.device)
        except (OSError, ValueError) as error:
            raise UserError(f"model.path: the text encoders in {folder} cannot be loaded: {error}") from error

    @torch.no_grad()
    def encode(self, captions: Sequence[str], guidance: float | None = None) -> Conditioning:
        """Captions -> text [B, text_length, D] and pooled [B, P]; `guidance` is the same for all rows."""
        text, pooled, _ = self._pipeline.encode_prompt(
            prompt=list(captions), device=self.device, max_sequence_length=self.text_length
        )
        rows = None if guidance is None else torch.full((len(captions),), guidance, device=self.device)
        return Conditioning(text=text, pooled=pooled, guidance=rows)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """T5 tokens of each caption, its end mark included, at most `text_length`; the rest is padding."""
        tokens = self._pipeline.tokenizer_2(list(captions), truncation=True, max_length=self.text_length)
        return [len(row) for row in tokens.input_ids]


class Autoencoder:
    """diffusers' `AutoencoderKL`, with the scaling of the latents folded in."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:
        from diffusers import AutoencoderKL

        self.vae = load_component(AutoencoderKL, folder, "vae", dtype).to(device)
        self.shift = self.vae.config.shift_factor or 0.0
        self.scale = self.vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]: the posterior's mean, so that a cache and
        encoding on the fly agree and nothing random enters."""
        mean = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return (mean - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images [B, 3, H, W], fp32 in [0, 1]."""
        latents = latents.to(self.vae.device, self.vae.dtype) / self.scale + self.shift
        images = self.vae.decode(latents, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)
