"""What scfm's family and diffusers' pipeline make of the same folder, side by side."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scfm_core.flow.sampler import euler_sample
from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.protocol import ModelFamily

CAPTIONS = ["a fox", "a handwritten digit seven, in Vivid ink"]
"""Of different lengths."""


def load(family: type[ModelFamily], folder: Path, dtype: torch.dtype) -> tuple[ModelFamily, nn.Module, Any]:
    """The family, its network, and diffusers' pipeline, in `dtype`."""
    opened = family(folder)
    pipe = getattr(importlib.import_module("diffusers"), opened.pipeline).from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return opened, opened.load_network(dtype, "cpu"), pipe


@torch.no_grad()
def encode(
    family: ModelFamily, pipe: Any, captions: list[str], text_length: int, scale: float | None = None
) -> Conditioning:
    """The captions' conditioning; it also sets the empty caption of `family`."""
    device = torch.device("cpu")
    fields, lengths = family.encode_prompt(pipe, [family.empty_caption], device, text_length)
    family.unconditional = Conditioning(fields=fields, lengths=lengths)
    fields, lengths = family.encode_prompt(pipe, captions, device, text_length)
    guidance = None if scale is None else torch.full((len(captions),), scale)
    return Conditioning(fields=fields, lengths=lengths, guidance=guidance)


@torch.no_grad()
def images(
    family: ModelFamily, network: nn.Module, vae: Any, noise: Tensor, cond: Conditioning, shift: float, steps: int = 4
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of scfm's sampler."""
    latents = euler_sample(lambda x, sigma: family.velocity(network, x, sigma, cond), noise, sigma_grid(steps, shift))
    return (family.decode_latents(vae, latents.to(vae.dtype)).float() / 2 + 0.5).clamp(0, 1)


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[tuple[dict[str, Any], Tensor]]]:
    """A list that gets the arguments and the output of every pass of `network` within."""
    passes: list[tuple[dict[str, Any], Tensor]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: tuple[Tensor, ...]) -> None:
        passes.append((kwargs | ({"hidden_states": args[0]} if args else {}), out[0]))

    hook = network.register_forward_hook(record, with_kwargs=True)
    yield passes
    hook.remove()
