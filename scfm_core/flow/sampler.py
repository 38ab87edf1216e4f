"""The sampler: plain Euler, no architectural change."""

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
