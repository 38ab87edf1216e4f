"""What a model family must offer, and the conditioning that travels with a batch."""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scfm_core.errors import UserError
from scfm_core.models.weights import GUIDANCE_MARK, component_config, load_component

PATCH = 2  # latents enter Flux and SD3 alike in tokens of 2 x 2


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a network is conditioned on, one row a sample."""

    text: Tensor
    """The text encoders' tokens, [B, L, D_text]."""
    pooled: Tensor
    """CLIP's pooled embedding, [B, D_pooled]."""
    guidance: Tensor | None = None
    """Guidance, fp32 [B]: an input of the network, or the scale of classifier-free guidance; None: neither."""

    def __getitem__(self, rows: Any) -> "Conditioning":
        guidance = None if self.guidance is None else self.guidance[rows]
        return Conditioning(text=self.text[rows], pooled=self.pooled[rows], guidance=guidance)

    def __len__(self) -> int:
        return self.text.shape[0]

    def with_guidance(self, guidance: Tensor | None) -> "Conditioning":
        """The same rows at another guidance, fp32 [B]."""
        return dataclasses.replace(self, guidance=guidance)

    def without_captions(self, rows: Tensor, empty: "Conditioning") -> "Conditioning":
        """The same, but `rows` (bool [B]) have the `empty` caption, of one row."""
        text = torch.where(rows[:, None, None], empty.text.to(self.text.dtype), self.text)
        return dataclasses.replace(
            self, text=text, pooled=torch.where(rows[:, None], empty.pooled.to(self.pooled.dtype), self.pooled)
        )

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same rows on `device`."""
        guidance = None if self.guidance is None else self.guidance.to(device)
        return Conditioning(text=self.text.to(device), pooled=self.pooled.to(device), guidance=guidance)


class ModelFamily(ABC):
    """How to load and call one architecture of diffusers. A family is one file: `flux.py`, `sd3.py`.

    Args:
        folder: a pipeline in diffusers' format with `transformer`, `vae`, text encoders and tokenizers; or the hub id of a
            known architecture, of which a dry run needs no more.
        architecture: what is known of it, in place of the folder's files.
    """

    pipeline: ClassVar[str]
    """Name of diffusers' class."""
    known: ClassVar[dict[str, dict[str, Any]]]
    """Architectures that a dry run knows without network access: `transformer` and `vae` as in their config.json, and
    `encoder_bytes` of text encoders and VAE in bf16."""
    t5_tokenizer: ClassVar[str]
    """The pipeline's component."""
    clip_tokens: ClassVar[int] = 0
    """Tokens of CLIP before those of T5."""
    in_channels_per_latent: ClassVar[int] = 1
    """Input channels of the network for one of the latents."""
    has_kernels: ClassVar[bool] = False
    """Whether fused blocks and the choice of attention are for its network."""
    is_guided_by_passes: ClassVar[bool] = False
    """Whether guidance is classifier-free, in two passes of the network, as long as it has not been distilled."""

    def __init__(self, folder: Path, architecture: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.unconditional: Conditioning | None = None
        """Of an empty caption, one row; set by `TextEncoders`."""
        self.has_learned_guidance = (folder / GUIDANCE_MARK).is_file()
        """Whether this is a model that `method.distil_guidance` made."""
        if architecture is not None:
            self.network_config: dict[str, Any] = architecture["transformer"]
            self.vae_config: dict[str, Any] = architecture["vae"]
            self.encoder_bytes: int = architecture["encoder_bytes"]
            self.in_pixels = False
            return
        self.network_config = component_config(folder, "transformer")
        self.in_pixels = json.loads((folder / "model_index.json").read_text()).get("vae") == [None, None]
        """Whether the latents are the pixels themselves: the pipeline was saved without a VAE."""
        channels = self.network_config["in_channels"] // self.in_channels_per_latent
        pixels = {"block_out_channels": (1,), "latent_channels": channels}
        self.vae_config = pixels if self.in_pixels else component_config(folder, "vae")
        encoders = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        self.encoder_bytes = sum(f.stat().st_size for name in encoders for f in (folder / name).glob("*.safetensors"))

    @property
    @abstractmethod
    def network_class(self) -> Any:
        """diffusers' class of the transformer."""

    @abstractmethod
    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The network's velocity: x [B, C, H, W], sigma fp32 [B] -> [B, C, H, W] in the network's dtype."""

    @abstractmethod
    def encode_prompt(
        self, pipeline: Any, captions: Sequence[str], device: torch.device, text_length: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, D] and pooled embedding [B, P] of captions, by the pipeline's own encoders."""

    @abstractmethod
    def products(self, image_tokens: int, text_tokens: int) -> tuple[float, float]:
        """FLOPs of one sample's forward of the bare network: of its linears, and of attention."""

    def load_network(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """The pre-trained transformer, every parameter in `dtype`."""
        network: nn.Module = load_component(self.network_class, self.folder, "transformer", dtype)
        return network.to(device)

    def random_network(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> nn.Module:
        """The transformer with fresh weights, every parameter in `dtype`, for training from scratch."""
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            network: nn.Module = self.network_class.from_config(dict(self.network_config))
        zero_modulation(network)
        return nn.Module.to(network, dtype)  # not diffusers' own `to`, which warns

    def meta_network(self) -> nn.Module:
        """The transformer on the meta device: its architecture without weights."""
        with torch.device("meta"):
            network: nn.Module = self.network_class.from_config(dict(self.network_config))
        return network

    @property
    def passes(self) -> int:
        """Of the network for a guided velocity."""
        return 2 if self.is_guided_by_passes and not self.has_learned_guidance else 1

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
        """Tokens of latents [B, C, H, W]."""
        return latents.shape[-2] * latents.shape[-1] // PATCH**2

    def text_tokens(self, text_length: int) -> int:
        """Tokens of a caption of `text_length` T5 tokens."""
        return self.clip_tokens + text_length


def zero_modulation(network: nn.Module) -> None:
    """adaLN-zero (DiT, arXiv 2212.09748): every block starts as the identity, the output at zero."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def _nearest(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
