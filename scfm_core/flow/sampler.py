"""The sampler: plain Euler, no architectural change; and the paths of a teacher that are kept."""

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
        noise: the start, [B, ...]; the state is kept in this dtype, at least fp32.
        sigmas: fp32, [N + 1], falling; N Euler steps are taken.

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
    """Integrate from noise to data, and tell by what mean velocities the path can be gone in fewer steps.

    Euler's is the sampler that a teacher's images are made with, so a student of these paths learns its very images. The
    second-order Adams-Bashforth method with variable steps (Hairer, Norsett, Wanner, Solving Ordinary Differential
    Equations I, III.5) also evaluates once a step and is closer to the field's own path: the error of K steps falls with
    1 / K^2 where Euler's falls with 1 / K.

    Args:
        velocity: `velocity(x, sigma)` with x [B, ...] and sigma fp32 [B].
        noise: the start, [B, ...]; the state is kept in this dtype, at least fp32.
        sigmas: of the steps, fp32 [S + 1] or, for each sample its own, [B, S + 1]; falling.
        intervals: K, of which each is S / K steps.
        second_order: Adams-Bashforth instead of Euler.

    Returns:
        the state at the last of `sigmas`, [B, ...], and the mean velocity of each interval, [B, K, ...].

    Raises:
        ValueError: if K does not divide S.
    """
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    sigmas = sigmas.to(x.device).expand(len(x), -1).T.contiguous()  # a row a node
    lengths = sigmas[:-1] - sigmas[1:]
    if intervals < 1 or len(lengths) % intervals:
        raise ValueError(f"{len(lengths)} steps are no multiple of {intervals} intervals")
    means: list[Tensor] = []
    before: Tensor | None = None
    for first in range(0, len(lengths), len(lengths) // intervals):
        within = range(first, first + len(lengths) // intervals)
        moved = torch.zeros_like(x)
        for number in within:
            now = velocity(x, sigmas[number]).to(x.dtype)
            mean = now
            if second_order and before is not None:
                ratio = per_sample(lengths[number] / lengths[number - 1] / 2, x)
                mean = (1 + ratio) * now - ratio * before
            x, moved, before = euler_step(x, mean, lengths[number]), moved + per_sample(lengths[number], x) * mean, now
        means.append(moved / per_sample(sigmas[first] - sigmas[within.stop], x))
    return x, torch.stack(means, dim=1)
