"""The Euler sampler, and integration that also returns the mean velocities of the path."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from scfm_core.flow.path import euler_step, per_sample


@torch.no_grad()
def euler_sample(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """Integrate from noise to data along `sigmas`.

    Args:
        velocity: `velocity(x, sigma)` with x [B, ...] and sigma fp32 [B].
        noise: the state at `sigmas[0]`, [B, ...]. The state keeps this dtype, but at least fp32.
        sigmas: fp32, [N + 1], decreasing; N Euler steps are taken.

    Returns:
        the state at `sigmas[-1]`, [B, ...].
    """
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    sigmas = sigmas.to(x.device)
    for sigma, sigma_next in pairwise(sigmas):
        x = euler_step(x, velocity(x, sigma.expand(x.shape[0])), sigma - sigma_next)
    return x


@torch.no_grad()
def roll_out(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sigmas: Tensor,
    *,
    intervals: int,
    second_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Integrate from noise to data, and return the mean velocities with which K steps follow the same path.

    A teacher's images are sampled with Euler's method, so a student of Euler paths learns exactly those images. The
    second-order Adams-Bashforth method with variable steps (Hairer, Norsett, Wanner, Solving Ordinary Differential
    Equations I, III.5) also evaluates the velocity once per step, and is closer to the exact path of the field: the
    error of S steps is of order 1 / S^2, while Euler's is of order 1 / S.

    Args:
        velocity: `velocity(x, sigma)` with x [B, ...] and sigma fp32 [B].
        noise: the state at the first sigma, [B, ...]. The state keeps this dtype, but at least fp32.
        sigmas: fp32 [S + 1], or [B, S + 1] if each sample has its own; decreasing.
        intervals: K; each interval is S / K steps.
        second_order: Adams-Bashforth instead of Euler.

    Returns:
        the state at the last sigma, [B, ...], and the mean velocity of each interval, [B, K, ...].

    Raises:
        ValueError: if K does not divide S.
    """
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    sigmas = sigmas.to(x.device).expand(len(x), -1).T.contiguous()  # [S + 1, B]
    lengths = sigmas[:-1] - sigmas[1:]
    if intervals < 1 or len(lengths) % intervals:
        raise ValueError(f"{len(lengths)} steps are not a multiple of {intervals} intervals")
    means: list[Tensor] = []
    previous: Tensor | None = None
    for first in range(0, len(lengths), len(lengths) // intervals):
        steps = range(first, first + len(lengths) // intervals)
        displacement = torch.zeros_like(x)
        for step in steps:
            current = velocity(x, sigmas[step]).to(x.dtype)
            mean = current
            if second_order and previous is not None:
                ratio = per_sample(lengths[step] / lengths[step - 1] / 2, x)
                mean = (1 + ratio) * current - ratio * previous
            displacement = displacement + per_sample(lengths[step], x) * mean
            x, previous = euler_step(x, mean, lengths[step]), current
        means.append(displacement / per_sample(sigmas[first] - sigmas[steps.stop], x))
    return x, torch.stack(means, dim=1)
