"""Sampling from a shortcut model: the noise, the shift, Euler's method, decoding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scfm_core.flow.sampler import euler_sample
from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.encoders import Autoencoder
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.student import ShortcutModel
from scfm_core.scfm.method import PlanConfig, sampling_strength
from scfm_core.train.config import RunConfig, SampleConfig
from scfm_core.train.device import compute_dtype


def sampling_shift(config: SampleConfig, family: ModelFamily, latents: Tensor, num_steps: int) -> float:
    """The timestep shift of a sampler of `num_steps` steps for `latents` [B, C, H, W]."""
    if config.shift == "dynamic":
        return family.shift(family.image_tokens(latents), num_steps)
    return float(config.shift)


def initial_noise(shape: tuple[int, int, int], seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The noise that a diffusers pipeline draws from `torch.Generator().manual_seed(seed)` on the CPU, [B, C, H, W]."""
    return torch.cat(
        [torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds]
    )


@torch.no_grad()
def sample_latents(
    model: ShortcutModel,
    role: str,
    noise: Tensor,
    cond: Conditioning,
    *,
    method: PlanConfig,
    num_steps: int,
    shift: float,
    strength: float | None = None,
    before_step: Callable[[], None] | None = None,
) -> Tensor:
    """Sample with Euler's method from `noise` [B, C, H, W]; returns latents at sigma 0, at least fp32.

    Args:
        model: the networks.
        role: the network whose velocity is used: `student`, `ema_fast`, `ema_slow` or `teacher`.
        noise: the start, at sigma 1.
        cond: conditioning, one row for each image.
        method: how the weights were trained; it determines how they are conditioned on the step size.
        num_steps: Euler steps.
        shift: timestep shift.
        strength: strength of the adapter; None: the one that `method` trained for this number of steps.
        before_step: called before each step. What it raises ends the sampling.
    """
    if strength is None:
        strength = sampling_strength(method.step_gain, num_steps)
    strengths = torch.full((noise.shape[0],), strength)
    if method.step_embedding:
        cond = cond.with_guidance(torch.full((noise.shape[0],), 1 / num_steps, device=noise.device))
    if method.distil_guidance and role != "teacher":
        cond = cond.with_guidance(None)  # the student has learned the teacher's guidance

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        if before_step is not None:
            before_step()
        return model.velocity(role, x, sigma, cond, strengths)

    return euler_sample(velocity, noise, sigma_grid(num_steps, shift))


def generate(
    config: RunConfig,
    model: ShortcutModel,
    role: str,
    vae: Autoencoder,
    cond: Conditioning,
    seeds: list[int],
    num_steps: int,
    strength: float | None = None,
    *,
    size: tuple[int, int] | None = None,
    before_step: Callable[[], None] | None = None,
) -> Tensor:
    """Images from the weights of `role`, one for each row of `cond` and seed; fp32 [N, 3, H, W] in [0, 1] on the CPU.

    `size` is height and width in pixels, by default `data.resolution`. `before_step` as in `sample_latents`.
    """
    shape, batch = model.family.latent_shape(*(size or config.data.resolution)), config.evaluate.batch_size
    latents = []
    for at in range(0, len(seeds), batch):
        rows = cond[at : at + batch]
        dtype = model.family.noise_dtype or compute_dtype(config)
        noise = initial_noise(shape, seeds[at : at + batch], dtype).to(rows.device)
        shift = sampling_shift(config.sample, model.family, noise, num_steps)
        settings: dict[str, Any] = {
            "num_steps": num_steps,
            "shift": shift,
            "strength": strength,
            "before_step": before_step,
        }
        latents.append(sample_latents(model, role, noise, rows, method=config.method, **settings))
    with torch.no_grad():
        return decode(vae, torch.cat(latents), batch)


def decode(vae: Autoencoder, latents: Tensor, batch_size: int) -> Tensor:
    """Images fp32 [B, 3, H, W] in [0, 1] on the CPU, decoded `batch_size` at a time."""
    return torch.cat([vae.decode(part).cpu() for part in latents.split(batch_size)])


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] -> uint8, rounded to nearest as diffusers does."""
    return (images * 255).round().to(torch.uint8)
