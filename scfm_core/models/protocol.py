"""The interface of a model family, and a batch's conditioning."""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scfm_core.errors import UserError
from scfm_core.filling import materialise, stored_tensors
from scfm_core.models.fingerprint import network_fingerprint
from scfm_core.models.initial import RandomWeights, parameters_on_meta
from scfm_core.models.tensor_files import TensorFiles
from scfm_core.models.weights import GUIDANCE_MARK, component_config

PATCH = 2
"""Side of a token in latents, for Flux and for SD3."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The conditioning of a network, one row per sample."""

    text: Tensor
    """The text encoders' tokens, [B, L, D_text]."""
    pooled: Tensor
    """CLIP's pooled embedding, [B, D_pooled]."""
    guidance: Tensor | None = None
    """Guidance, fp32 [B]: an input of the network, or the scale of classifier-free guidance. None: no guidance."""

    def __getitem__(self, rows: Any) -> "Conditioning":
        guidance = None if self.guidance is None else self.guidance[rows]
        return Conditioning(text=self.text[rows], pooled=self.pooled[rows], guidance=guidance)

    def __len__(self) -> int:
        return self.text.shape[0]

    def with_guidance(self, guidance: Tensor | None) -> "Conditioning":
        """The same rows with another guidance, fp32 [B]."""
        return dataclasses.replace(self, guidance=guidance)

    def without_captions(self, rows: Tensor, empty: "Conditioning") -> "Conditioning":
        """The same, but `rows` (bool [B]) have the empty caption; `empty` is its one row."""
        text = torch.where(rows[:, None, None], empty.text.to(self.text.dtype), self.text)
        return dataclasses.replace(
            self, text=text, pooled=torch.where(rows[:, None], empty.pooled.to(self.pooled.dtype), self.pooled)
        )

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same rows on `device`."""
        guidance = None if self.guidance is None else self.guidance.to(device)
        return Conditioning(text=self.text.to(device), pooled=self.pooled.to(device), guidance=guidance)


class ModelFamily(ABC):
    """How to load and call one architecture of diffusers. Each family is one file: `flux.py`, `sd3.py`.

    Args:
        folder: a pipeline in diffusers' format with `transformer`, `vae`, text encoders and tokenizers. For a dry run,
            the hub id of a known architecture.
        architecture: an entry of `known`, which replaces the folder's files.
    """

    pipeline: ClassVar[str]
    """Class name of diffusers' pipeline."""
    known: ClassVar[dict[str, dict[str, Any]]]
    """Architectures by hub id, for a dry run without network access: `transformer` and `vae` as in their config.json,
    and `encoder_bytes`, the bytes of text encoders and VAE in bf16."""
    t5_tokenizer: ClassVar[str]
    """Name of the pipeline's component that is T5's tokenizer."""
    clip_tokens: ClassVar[int] = 0
    """Number of CLIP tokens before the T5 tokens."""
    in_channels_per_latent: ClassVar[int] = 1
    """Input channels of the network per channel of the latents."""
    has_kernels: ClassVar[bool] = False
    """Whether fused blocks and the choice of attention support its network."""
    is_guided_by_passes: ClassVar[bool] = False
    """Whether guidance is classifier-free, with two passes of the network, unless it was distilled."""

    def __init__(self, folder: Path, architecture: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.unconditional: Conditioning | None = None
        """The empty caption, one row; set by `TextEncoders`."""
        self.has_learned_guidance = (folder / GUIDANCE_MARK).is_file()
        """Whether the model was made with `method.distil_guidance`."""
        if architecture is not None:
            self.network_config: dict[str, Any] = architecture["transformer"]
            self.vae_config: dict[str, Any] = architecture["vae"]
            self.encoder_bytes: int = architecture["encoder_bytes"]
            self.in_pixels = False
            return
        self.network_config = component_config(folder, "transformer")
        self.in_pixels = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("vae") == [
            None,
            None,
        ]
        """Whether the latents are pixels: the pipeline was saved without a VAE."""
        channels = self.network_config["in_channels"] // self.in_channels_per_latent
        pixels = {"block_out_channels": (1,), "latent_channels": channels}
        self.vae_config = pixels if self.in_pixels else component_config(folder, "vae")
        encoders = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        self.encoder_bytes = sum(f.stat().st_size for name in encoders for f in (folder / name).glob("*.safetensors"))

    @property
    @abstractmethod
    def network_class(self) -> Any:
        """The class of diffusers' transformer."""

    @abstractmethod
    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The network's velocity.

        Args:
            network: of `network_class`, perhaps adapted or fused.
            x: noised latents, [B, C, H, W].
            sigma: fp32 [B].
            cond: B rows.

        Returns:
            [B, C, H, W] in the network's dtype.
        """

    @abstractmethod
    def encode_prompt(
        self, pipeline: Any, captions: Sequence[str], device: torch.device, text_length: int
    ) -> tuple[Tensor, Tensor]:
        """Encode captions with the pipeline's encoders: tokens [B, L, D] and pooled embedding [B, P]."""

    @abstractmethod
    def products(self, image_tokens: int, text_tokens: int) -> tuple[float, float]:
        """FLOPs of one sample's forward without adapters: of the linears, and of attention."""

    def load_network(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """The pre-trained transformer on one device, every parameter in `dtype`.

        Raises:
            UserError: if its weights are missing, damaged or of another architecture.
        """
        network = self.empty_network(dtype)
        with self.open_weights(network) as files:
            materialise(network, device, files.fill)
        return network

    def empty_network(self, dtype: torch.dtype) -> nn.Module:
        """The transformer without weights: parameters of `dtype` on the meta device, buffers on the CPU; in eval mode."""
        with parameters_on_meta():
            network: nn.Module = self.network_class.from_config(dict(self.network_config))
        return nn.Module.to(network, dtype).eval()  # diffusers' own `to` would warn

    def open_weights(self, network: nn.Module) -> TensorFiles:
        """The files of the pre-trained weights, checked against `network` as `empty_network` makes it. Local work.

        Raises:
            UserError: if they are missing, damaged or of another architecture.
        """
        files = TensorFiles(self.folder / "transformer")
        files.check(stored_tensors(network))
        return files

    def random_weights(self, seed: int) -> RandomWeights:
        """Random initial weights, for training from scratch."""
        with parameters_on_meta(only_drawn=True):
            return RandomWeights(self.network_class.from_config(dict(self.network_config)), seed)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the pre-trained network, as its files were when this was first read."""
        return network_fingerprint(self.folder)

    def meta_network(self) -> nn.Module:
        """The transformer on the meta device: its architecture without weights."""
        with torch.device("meta"):
            network: nn.Module = self.network_class.from_config(dict(self.network_config))
        return network

    @property
    def passes(self) -> int:
        """Passes of the network per guided velocity."""
        return 2 if self.is_guided_by_passes and not self.has_learned_guidance else 1

    @property
    def pixel_multiple(self) -> int:
        """Image height and width must be multiples of this number of pixels."""
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
        """Number of tokens of latents [B, C, H, W], per sample."""
        return latents.shape[-2] * latents.shape[-1] // PATCH**2

    def text_tokens(self, text_length: int) -> int:
        """Number of text tokens of the network, for `text_length` T5 tokens."""
        return self.clip_tokens + text_length


def dtype_of(network: nn.Module) -> torch.dtype:
    """Dtype of a network's first parameter. The property of diffusers looks at every module: 11 ms a pass with adapters."""
    return next(network.parameters()).dtype


def _nearest(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
