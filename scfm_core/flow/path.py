"""The noise convention. Every sign in the project comes from this file.

`sigma` is in [0, 1] and always fp32; 1 is pure noise, 0 is data. The path between them is a straight line, and the
network predicts its slope, as rectified-flow models do (Esser et al., arXiv 2403.03206).
"""

import torch
from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """View 1-D `values` [B] so that they broadcast with `like` [B, ...]; a scalar is returned unchanged.

    Raises:
        ValueError: if `values` has more than one dimension.
    """
    if values.ndim > 1:
        raise ValueError(f"expected a scalar or one value per sample, got shape {tuple(values.shape)}")
    return values.reshape(-1, *([1] * (like.ndim - 1))) if values.ndim else values


def noise_latents(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point at `sigma` on the line from data to noise: `(1 - sigma) * latents + sigma * noise`.

    Args:
        latents: data, [B, ...].
        noise: standard normal, the shape of `latents`.
        sigma: fp32, [B] or a scalar, in [0, 1].

    Returns:
        noised latents, [B, ...], in the widest of the three dtypes (fp32 for bf16 latents).

    Raises:
        ValueError: if `latents` and `noise` differ in shape.
    """
    if latents.shape != noise.shape:
        raise ValueError(f"latents {tuple(latents.shape)} and noise {tuple(noise.shape)} differ in shape")
    sigma = per_sample(sigma, latents)
    dtype = torch.promote_types(torch.promote_types(latents.dtype, noise.dtype), sigma.dtype)
    return (1 - sigma) * latents.to(dtype) + sigma * noise.to(dtype)


def flow_velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """The slope of the line, d(noised_latents)/d(sigma): `noise - latents`, [B, ...], at least fp32.

    Raises:
        ValueError: if the two differ in shape.
    """
    if latents.shape != noise.shape:
        raise ValueError(f"latents {tuple(latents.shape)} and noise {tuple(noise.shape)} differ in shape")
    dtype = torch.promote_types(torch.promote_types(latents.dtype, noise.dtype), torch.float32)
    return noise.to(dtype) - latents.to(dtype)


def euler_step(x: Tensor, velocity: Tensor, delta_sigma: Tensor) -> Tensor:
    """One Euler step towards the data: `x - delta_sigma * velocity`, with `delta_sigma` > 0, [B] or scalar."""
    return x - per_sample(delta_sigma, x) * velocity.to(x.dtype)
