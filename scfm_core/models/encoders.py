"""The frozen encoders of diffusers' pipelines: text encoders for captions, the VAE for images."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scfm_core.errors import UserError
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.quantised import Base, quantise_onto
from scfm_core.models.weights import load_component

LARGE_ENCODER = 10**9
"""Bytes above which an encoder can be quantised. CLIP is below."""


class TextEncoders:
    """The text encoders of a pipeline.

    Args:
        family: the model; its `unconditional` is set to the encoding of the empty caption.
        text_length: number of tokens of a caption, as `ModelFamily.encode_prompt` takes it.
        dtype: of the encoders.
        device: of the encoders.
        packing: how the linears of encoders of more than a gigabyte are stored; products are in `dtype`.

    Raises:
        UserError: if the encoders cannot be loaded.
    """

    def __init__(
        self,
        family: ModelFamily,
        text_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
        packing: Base = "bfloat16",
    ) -> None:
        import diffusers
        from diffusers.utils import logging

        logging.disable_progress_bar()  # "Loading pipeline components" at every start
        cls = getattr(diffusers, family.pipeline)
        # CLIP truncates captions to 77 tokens, as intended; diffusers warns about every such caption.
        logging.get_logger(cls.__module__).setLevel(logging.ERROR)
        self.family, self.text_length, self.device = family, text_length, torch.device(device)
        try:
            self._pipeline = _load(cls, family.folder, dtype)
            for encoder in self._pipeline.components.values():
                if isinstance(encoder, nn.Module) and sum(p.nbytes for p in encoder.parameters()) > LARGE_ENCODER:
                    quantise_onto(encoder, packing, self.device)
            self._pipeline.to(self.device)
            family.unconditional = self.encode([family.empty_caption])  # a missing chat template is found here
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.path: the text encoders in {family.folder} cannot be used: {error}. If a file is missing or damaged, "
                f"download the model again"
            ) from error

    @torch.no_grad()
    def encode(self, captions: Sequence[str], guidance: float | None = None) -> Conditioning:
        """Encode captions to the fields of the family; `guidance` becomes fp32 [B], the same for all rows.

        Raises:
            UserError: if a caption has a lone surrogate, on which a tokenizer would fail. Bytes of a command line that
                are not UTF-8 become such.
        """
        for caption in captions:
            if not caption.isascii() and re.search(r"[\ud800-\udfff]", caption):
                raise UserError(
                    f"the text {caption[:80]!a} has half of a character. Write the whole character, in UTF-8"
                )
        fields, lengths = self.family.encode_prompt(self._pipeline, captions, self.device, self.text_length)
        rows = None if guidance is None else torch.full((len(captions),), guidance, device=self.device)
        return Conditioning(fields=fields, lengths=lengths, guidance=rows)

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """See `ModelFamily.count_tokens`; more than `text_length` are truncated."""
        return self.family.count_tokens(getattr(self._pipeline, self.family.tokenizer), captions)

    def kept(self, tokens: int) -> int:
        """Number of rows of the text that are not padding, of a caption of `tokens` tokens."""
        return self.family.extra_tokens + min(tokens, self.text_length)


def _load(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A pipeline without network and VAE. ValueError if it cannot be loaded: a damaged file can raise any type."""
    try:
        return cls.from_pretrained(folder, transformer=None, vae=None, torch_dtype=dtype, use_safetensors=True)
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def load_tokenizer(family: ModelFamily) -> Any:
    """The tokenizer of `ModelFamily.tokenizer`, without the encoder.

    Raises:
        UserError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = family.folder / family.tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )  # without it, transformers asks on a terminal
        family.count_tokens(tokenizer, [""])  # a missing chat template is found here
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path: the tokenizer in {folder} cannot be used: {error}. If a file is missing or damaged, download the model "
            f"again"
        ) from error
    return tokenizer


class Autoencoder:
    """The VAE with the family's normalisation of latents; for a model in pixel space, the identity."""

    def __init__(self, family: ModelFamily, dtype: torch.dtype, device: torch.device | str) -> None:
        self.family = family
        self.grey = family.in_pixels and family.latent_channels == 1
        self.vae = (
            None if family.in_pixels else load_component(family.vae_class, family.folder, "vae", dtype).to(device)
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]; see `ModelFamily.encode_images`."""
        if self.vae is None:
            return images.mean(1, keepdim=True) if self.grey else images
        return self.family.encode_images(self.vae, images.to(self.vae.device, self.vae.dtype))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images [B, 3, H, W], fp32 in [0, 1]."""
        if self.vae is None:
            images = latents.expand(-1, 3, -1, -1)
        else:
            images = self.family.decode_latents(self.vae, latents.to(self.vae.device, self.vae.dtype))
        return (images.float() / 2 + 0.5).clamp(0, 1)
