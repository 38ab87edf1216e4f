"""What a model family must offer, and the conditioning that travels with a batch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a network is conditioned on, one row a sample."""

    text: Tensor
    """T5 embeddings, [B, L, D_text]."""
    pooled: Tensor
    """CLIP's pooled embedding, [B, D_pooled]."""
    guidance: Tensor | None = None
    """Embedded guidance, fp32 [B]; None for networks without that input."""

    def __getitem__(self, rows: Any) -> "Conditioning":
        guidance = None if self.guidance is None else self.guidance[rows]
        return Conditioning(text=self.text[rows], pooled=self.pooled[rows], guidance=guidance)

    def __len__(self) -> int:
        return self.text.shape[0]

    def with_guidance(self, guidance: Tensor | None) -> "Conditioning":
        """The same rows at another guidance, fp32 [B]."""
        return dataclasses.replace(self, guidance=guidance)

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same rows on `device`."""
        guidance = None if self.guidance is None else self.guidance.to(device)
        return Conditioning(text=self.text.to(device), pooled=self.pooled.to(device), guidance=guidance)


class ModelFamily(Protocol):
    """How to load and call one architecture. `flux.py` is the example."""

    folder: Path

    def load_network(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """The pre-trained network."""
        ...

    def random_network(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> nn.Module:
        """The network with fresh weights."""
        ...

    def meta_network(self) -> nn.Module:
        """The network on the meta device: its architecture without weights."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, H, W] of the latents of an image of `height` x `width` pixels."""
        ...

    def image_tokens(self, latents: Tensor) -> int:
        """Packed image tokens of latents [B, C, H, W]."""
        ...

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The network's velocity at x [B, C, H, W], sigma fp32 [B]."""
        ...
