"""The frozen encoders of diffusers' pipelines: T5 and CLIP for captions, the VAE for images."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scfm_core.errors import UserError
from scfm_core.models.protocol import Conditioning, ModelFamily
from scfm_core.models.weights import load_component


class TextEncoders:
    """CLIP and T5 of a pipeline.

    Args:
        family: the model; its `unconditional` is set to the encoding of the empty caption.
        text_length: number of T5 tokens; captions are padded or truncated to it.
        dtype: of the encoders.
        device: of the encoders.

    Raises:
        UserError: if the encoders cannot be loaded.
    """

    def __init__(self, family: ModelFamily, text_length: int, dtype: torch.dtype, device: torch.device | str) -> None:
        import diffusers
        from diffusers.utils import logging

        logging.disable_progress_bar()  # "Loading pipeline components" at every start
        cls = getattr(diffusers, family.pipeline)
        # CLIP truncates captions to 77 tokens, as intended; diffusers warns about every such caption.
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
        """Encode captions: text [B, L, D] and pooled [B, P]; `guidance` becomes fp32 [B], the same for all rows.

        Raises:
            UserError: if a caption has a lone surrogate, on which a tokenizer would fail. Bytes of a command line that
                are not UTF-8 become such.
        """
        for caption in captions:
            if not caption.isascii() and re.search(r"[\ud800-\udfff]", caption):
                raise UserError(
                    f"the text {caption[:80]!a} has half of a character. Write the whole character, in UTF-8"
                )
        text, pooled = self.family.encode_prompt(self._pipeline, captions, self.device, self.text_length)
        rows = None if guidance is None else torch.full((len(captions),), guidance, device=self.device)
        return Conditioning(text=text, pooled=pooled, guidance=rows)

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """Number of T5 tokens of each caption with its end token; more than `text_length` are truncated."""
        return count_tokens(getattr(self._pipeline, self.family.t5_tokenizer), captions)

    def kept(self, tokens: int) -> int:
        """Number of rows of the text that are not padding: CLIP's tokens, and T5's up to its end token."""
        return self.family.clip_tokens + min(tokens, self.text_length)


def count_tokens(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Number of tokens of each caption with its end token, not truncated."""
    # Not verbose: it would warn about each long caption.
    return [len(row) for row in tokenizer(list(captions), truncation=False, verbose=False).input_ids]


def load_tokenizer(family: ModelFamily) -> Any:
    """T5's tokenizer, without the encoder.

    Raises:
        UserError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = family.folder / family.t5_tokenizer
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: the tokenizer in {folder} cannot be loaded: {error}") from error


class Autoencoder:
    """diffusers' `AutoencoderKL` with the latents' shift and scale; for a model in pixel space, the identity."""

    def __init__(self, family: ModelFamily, dtype: torch.dtype, device: torch.device | str) -> None:
        from diffusers import AutoencoderKL

        self.grey = family.in_pixels and family.vae_config["latent_channels"] == 1
        self.vae = None if family.in_pixels else load_component(AutoencoderKL, family.folder, "vae", dtype).to(device)
        if self.vae is not None:
            self.shift = self.vae.config.shift_factor or 0.0
            self.scale = self.vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w].

        The latents are the posterior's mean: it is not random, so a cache agrees with encoding on the fly.
        """
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
