"""The interface of a model family."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from scfm_core.errors import UserError
from scfm_core.flow.path import per_sample
from scfm_core.flow.schedule import MuPoints, dynamic_shift
from scfm_core.kernels.ops import Ops
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.fingerprint import weight_files
from scfm_core.models.pretrained import Pretrained
from scfm_core.models.processors import choose_backend
from scfm_core.models.tensor_files import quantised_error
from scfm_core.models.weights import GUIDANCE_MARK, component_config

FieldKind = Literal["tokens", "masked", "vector"]
"""Of a field of text. tokens: [B, L, ...] of one length; the network sees the padding. masked: [B, L, ...] with lengths; the
network does not see the padding. vector: [B, D]."""


class ModelFamily(Pretrained):
    """How to load and call one architecture of diffusers. Each family is one file, listed in `families.py`.

    What most families share has a default here; a family replaces what is different.

    Args:
        folder: a pipeline in diffusers' format with `transformer`, `vae`, text encoders and tokenizers. For a dry run,
            the hub id of a known architecture.
        architecture: an entry of `known`, which replaces the folder's files.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """Class names of diffusers' pipelines of this family."""
    known: ClassVar[dict[str, dict[str, Any]]]
    """Architectures by hub id, for dry runs and cards: `transformer`, `vae`, perhaps `scheduler` as in their config.json; `encoder_bytes`
    of text encoders and VAE in bf16; and `pipeline`, if it is not the first of `pipelines`. `published.py` has their names."""
    fields: ClassVar[dict[str, FieldKind]]
    """What the text encoders give, by name. Not the names of other tensors in a shard: `latents`, `velocities`, `sigmas`, `guidance`."""
    tokenizer: ClassVar[str] = "tokenizer"
    """Name of the pipeline's component whose tokens `model.text_length` limits."""
    extra_tokens: ClassVar[int] = 0
    """Number of text tokens of the network beside those: CLIP's of SD3."""
    empty_caption: ClassVar[str] = ""
    """The caption of the unconditional pass of classifier-free guidance."""
    neutral_guidance: ClassVar[float] = 1.0
    """The scale of classifier-free guidance that gives the conditional velocity."""
    mu_points: ClassVar[MuPoints] = ((256, 0.5), (4096, 1.15))
    """Of the dynamic shift, where the model's scheduler has no numbers of its own. These are Flux.1's:
    https://github.com/black-forest-labs/flux, sampling.py."""
    noise_dtype: ClassVar[torch.dtype | None] = None
    """Of the noise that the pipeline draws; None: that of the text's embeddings. PyTorch draws other numbers in another dtype."""
    patch: ClassVar[int] = 2
    """Side of a token, in latents."""
    in_channels_per_latent: ClassVar[int] = 1
    """Input channels of the network per channel of the latents."""
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    """Names of the network's lists of blocks."""
    static_shapes: ClassVar[bool] = True
    """Whether all batches of a size have the same shapes, which CUDA graphs need."""
    has_kernels: ClassVar[bool] = False
    """Whether it has fused blocks, which can use every backend of attention; see `fuse`."""

    def __init__(self, folder: Path, architecture: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.unconditional: Conditioning | None = None
        """The empty caption, one row; set by `TextEncoders`."""
        self.has_learned_guidance = (folder / GUIDANCE_MARK).is_file()
        """Whether the model was made with `method.distil_guidance`."""
        self._architecture = architecture
        if architecture is not None:
            self.pipeline: str = architecture.get("pipeline", self.pipelines[0])
            self.pipeline_config: dict[str, Any] = {}
            self.network_config: dict[str, Any] = architecture["transformer"]
            self.vae_config: dict[str, Any] = architecture["vae"]
            self.encoder_bytes: int = architecture["encoder_bytes"]
            self.in_pixels = False
            return
        self.pipeline_config = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        """`model_index.json`."""
        self.pipeline = self.pipeline_config["_class_name"]
        """Class name of diffusers' pipeline."""
        self.network_config = component_config(folder, "transformer")
        if settings := self.network_config.get("quantization_config"):
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            raise quantised_error(folder / "transformer", f"quantization_config in config.json: {method or settings}")
        self.in_pixels = self.pipeline_config.get("vae") == [None, None]
        """Whether the latents are pixels: the pipeline was saved without a VAE."""
        channels = self.network_config["in_channels"] // self.in_channels_per_latent
        pixels = {"block_out_channels": (1,), "latent_channels": channels}
        self.vae_config = pixels if self.in_pixels else component_config(folder, "vae")
        self.encoder_bytes = sum(
            file.stat().st_size
            for component in self.pipeline_config
            if component == "vae" or component.startswith("text_encoder")
            for file in weight_files(folder / component)
        )

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """`scheduler/scheduler_config.json`."""
        if self._architecture is not None:
            return dict(self._architecture.get("scheduler", {}))
        return component_config(self.folder, "scheduler", "scheduler_config.json")

    @property
    def vae_class(self) -> Any:
        """The class of diffusers' VAE."""
        from diffusers import AutoencoderKL

        return AutoencoderKL

    @property
    def guidance_kind(self) -> Literal["input", "passes", "none"]:
        """How the pre-trained network is guided: by an input, or by classifier-free guidance with two passes, or not at all."""
        return "passes"

    @property
    def latent_channels(self) -> int:
        """C of latents [B, C, H, W]."""
        return int(self.vae_config["latent_channels"])

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along each side."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return int(self.network_config["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values; fewer than `heads` for grouped queries."""
        return self.heads

    @property
    def width(self) -> int:
        """Features of a token inside the network."""
        return int(self.heads * self.network_config["attention_head_dim"])

    @abstractmethod
    def shapes(self, text_length: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one row of each field, for a caption of `text_length` tokens."""

    @abstractmethod
    def encode_prompt(
        self, pipeline: Any, captions: Sequence[str], device: torch.device, text_length: int
    ) -> tuple[dict[str, Tensor], tuple[int, ...] | None]:
        """Encode captions as diffusers' pipeline does.

        Args:
            pipeline: diffusers' pipeline without network and VAE.
            captions: B captions.
            device: of the encoders.
            text_length: number of tokens of `tokenizer`; captions are truncated to it, and padded if the padding is not masked.

        Returns:
            the fields, and the lengths of masked fields; see `Conditioning`.
        """

    def count_tokens(self, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        """Number of tokens of each caption that `model.text_length` limits, not truncated, with an end token if there is one."""
        # Not verbose: it would warn about each long caption.
        return [len(row) for row in tokenizer(list(captions), truncation=False, verbose=False).input_ids]

    @abstractmethod
    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The velocity of one pass of the network, `noise - latents`.

        Args:
            network: of `network_class`, perhaps adapted or fused.
            x: noised latents, [B, C, H, W].
            sigma: fp32 [B].
            cond: B rows. Their guidance is used if it is an input of the network.

        Returns:
            [B, C, H, W] in the network's dtype.
        """

    def guide(self, cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
        """The guided velocity, [B, C, H, W].

        Args:
            cond: the velocity with the caption, [B, C, H, W].
            uncond: the velocity with the empty caption.
            scale: as the users of diffusers' pipeline give it, fp32 [B, 1, 1, 1].
        """
        return uncond + scale * (cond - uncond)

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The guided velocity of a network; see `predict`. Families do not replace it.

        The pass with the empty caption gets no gradient: otherwise training could lower the loss by moving it away from the data.
        """
        if not self._needs_two_passes(cond):
            return self.predict(network, x, sigma, cond)
        assert self.unconditional is not None and cond.guidance is not None, "TextEncoders sets the empty caption"
        empty, scale = self.unconditional.expand(len(cond)), per_sample(cond.guidance, x)
        if self.rows_per_sample(cond) == 2:
            both = Conditioning.cat([cond.with_guidance(None), empty])
            conditional, unconditional = self.predict(network, x.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
            return self.guide(conditional, unconditional, scale)
        with torch.no_grad():
            unconditional = self.predict(network, x, sigma, empty)
        # Autocast caches the weights that it cast without gradient; the next pass needs weights with gradient.
        torch.clear_autocast_cache()
        return self.guide(self.predict(network, x, sigma, cond), unconditional, scale)

    def rows_per_sample(self, cond: Conditioning) -> int:
        """Rows of a sample in a pass of `velocity`: 2 if both passes of classifier-free guidance are one batch, [2 B]."""
        return 2 if self._needs_two_passes(cond) and not torch.is_grad_enabled() else 1

    def _needs_two_passes(self, cond: Conditioning) -> bool:
        return cond.guidance is not None and self.passes == 2

    def encode_images(self, vae: Any, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] as the network takes them.

        The latents are the posterior's mean: it is not random, so a cache agrees with encoding on the fly.
        """
        latents: Tensor = vae.encode(images).latent_dist.mode()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents -> images [B, 3, H, W] in [-1, 1], the inverse of `encode_images`."""
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        images: Tensor = vae.decode(latents, return_dict=False)[0]
        return images

    @property
    def masks_attention(self) -> bool:
        """Whether the network's attention gets a mask, which some backends do not take."""
        return "masked" in self.fields.values()

    def shift(self, image_tokens: int, num_steps: int) -> float:
        """The timestep shift of the pipeline's sampler for images of `image_tokens` tokens in `num_steps` steps.

        The model's scheduler says whether it is fixed; without one (a known architecture) it is dynamic.
        """
        scheduler = self.scheduler_config
        if scheduler and not scheduler.get("use_dynamic_shifting"):
            return float(scheduler.get("flow_shift", scheduler.get("shift", 1.0)))
        return self.dynamic_shift(image_tokens, num_steps)

    def dynamic_shift(self, image_tokens: int, num_steps: int) -> float:
        """The shift of a scheduler with `use_dynamic_shifting`; arguments as of `shift`."""
        get, ((low, mu_low), (high, mu_high)) = self.scheduler_config.get, self.mu_points
        points = (
            (get("base_image_seq_len", low), get("base_shift", mu_low)),
            (get("max_image_seq_len", high), get("max_shift", mu_high)),
        )
        return dynamic_shift(image_tokens, points)

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The network's blocks, which are sharded, checkpointed and compiled one by one.

        Raises:
            UserError: if the network has none: then checkpointing and compilation would do nothing.
        """
        missing = [name for name in self.block_lists if not list(getattr(network, name, ()))]
        blocks = [block for name in self.block_lists for block in getattr(network, name, ())]
        if not blocks or any(not hasattr(network, name) for name in missing):
            raise UserError(
                f"model.path: the {type(network).__name__} of {self.folder} has no blocks in {', '.join(missing)}. This version of "
                f"diffusers may have renamed them; install the version of requirements.lock"
            )
        return blocks

    def fuse(self, network: nn.Module, ops: Ops, attention_backend: str, *, blocks: bool) -> None:
        """Use fused operations and a backend of attention in a network, adapted or not. By default only the backend.

        Args:
            network: with diffusers' own blocks; it is changed in place.
            ops: the operations that the fused modules call.
            attention_backend: one of `scfm_core.kernels.attention.BACKENDS`.
            blocks: also replace the blocks; only with `has_kernels`.
        """
        assert not blocks, "a family with fused blocks has its own method"
        choose_backend(network, attention_backend)

    def call_arguments(self, guidance: float, text_length: int) -> dict[str, Any]:
        """Arguments of a call of diffusers' pipeline that depend on the family, for the card of an adapter.

        Args:
            guidance: the scale; `neutral_guidance` is one pass.
            text_length: `model.text_length`.
        """
        return {"guidance_scale": guidance, "max_sequence_length": text_length}

    @property
    def passes(self) -> int:
        """Passes of the network per guided velocity."""
        return 2 if self.guidance_kind == "passes" and not self.has_learned_guidance else 1

    @property
    def has_guidance(self) -> bool:
        """Whether guidance has an effect on the velocity."""
        return self.passes == 2 or self.guidance_kind == "input"

    @property
    def pixel_multiple(self) -> int:
        """Image height and width must be multiples of this number of pixels."""
        return self.patch * self.vae_factor

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
        return self.latent_channels, height // self.vae_factor, width // self.vae_factor

    def image_tokens(self, latents: Tensor) -> int:
        """Number of tokens of latents [B, C, H, W], per sample."""
        return latents.shape[-2] * latents.shape[-1] // self.patch**2

    def text_tokens(self, text_length: int) -> int:
        """Number of text tokens of the network, for `text_length` tokens of `tokenizer`."""
        return self.extra_tokens + text_length


def rounded(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """A timestep in the dtype of a network's products, as in diffusers' pipelines: that of autocast, or `dtype`, the parameters'."""
    device = timestep.device.type
    is_mixed = device != "meta" and torch.is_autocast_enabled(device)
    return timestep.to(torch.get_autocast_dtype(device) if is_mixed else dtype)


def dtype_of(network: nn.Module) -> torch.dtype:
    """Dtype of a network's first parameter. The property of diffusers looks at every module: 11 ms a pass with adapters."""
    return next(network.parameters()).dtype


def _nearest(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
