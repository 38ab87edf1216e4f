"""The sampler: plain Euler, no architectural change; and a second-order method, for paths that are kept."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from scfm_core.flow.path import euler_step


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
def roll_out(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Integrate from noise to data by the second-order Adams-Bashforth method with variable steps.

    One evaluation a node: the error of K nodes falls with 1 / K^2 where Euler's falls with 1 / K
    (Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, III.5).

    Args:
        velocity: `velocity(x, sigma)` with x [B, ...] and sigma fp32 [B].
        noise: the start, [B, ...]; the state is kept in this dtype, at least fp32.
        sigmas: fp32 [K + 1], falling.

    Returns:
        the state at `sigmas[-1]`, [B, ...], and the mean velocity of each interval, [B, K, ...].
    """
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    sigmas = sigmas.to(x.device)
    lengths = sigmas[:-1] - sigmas[1:]
    means: list[Tensor] = []
    before: Tensor | None = None
    for number, length in enumerate(lengths):
        now = velocity(x, sigmas[number].expand(x.shape[0])).to(x.dtype)
        ratio = 0.0 if before is None else float(length / lengths[number - 1]) / 2
        mean = now if before is None else (1 + ratio) * now - ratio * before
        x, before = euler_step(x, mean, length), now
        means.append(mean)
    return x, torch.stack(means, dim=1)
