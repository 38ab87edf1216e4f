"""Sigma grids and the timestep shift."""

import math

import torch
from torch import Tensor

MuPoints = tuple[tuple[float, float], tuple[float, float]]
"""Of a dynamic shift: two points (image tokens, mu), between and beyond which mu is linear."""


def shift_sigma(u: Tensor, shift: Tensor | float) -> Tensor:
    """Shift `u` in [0, 1] towards the noise: `s*u / (1 + (s-1)*u)` (Esser et al., arXiv 2403.03206, Eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def sigma_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """The grid of an n-step sampler: `sigma_k = shift_sigma(1 - k/n)`, k = 0..n.

    Returns:
        fp32, [num_steps + 1], from 1 down to 0.

    Raises:
        ValueError: if `num_steps` < 1 or `shift` is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be positive and finite, got {shift}")
    u = 1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return shift_sigma(u, shift).to(torch.float32)


def shift_of_grid(sigmas: Tensor) -> float:
    """The inverse of `sigma_grid`: the shift of the grid `sigmas` [N + 1], N > 1, from its second point."""
    sigma, u = float(sigmas[1]), 1 - 1 / (len(sigmas) - 1)
    return sigma * (1 - u) / (u * (1 - sigma))


def dynamic_shift(image_tokens: int, points: MuPoints) -> float:
    """The shift `exp(mu)` for an image of `image_tokens` tokens; `mu` is linear through `points`."""
    (tokens_low, mu_low), (tokens_high, mu_high) = points
    slope = (mu_high - mu_low) / (tokens_high - tokens_low)
    return math.exp(mu_low + slope * (image_tokens - tokens_low))
