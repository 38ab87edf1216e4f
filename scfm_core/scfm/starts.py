"""Starts of jumps that need no data: pure noise, and where one jump of the student from pure noise ends."""

from typing import Any

import torch
from torch import Tensor

from scfm_core.flow.path import euler_step, per_sample
from scfm_core.flow.rows import put_rows, take_rows
from scfm_core.scfm.plan import ShortcutPlan
from scfm_core.scfm.target import Velocity


@torch.no_grad()
def own_starts(
    plan: ShortcutPlan, noised: Tensor, noise: Tensor, cond: Any, student: Velocity, *, is_sharded: bool = True
) -> Tensor:
    """Put flow-map rows (`flow_map.starts: own`) and matching rows where one jump of the student from pure noise ends.

    Only the plan's moved rows go through the network.

    Args:
        plan: these rows have sigma_start and u_start.
        noised: x at the start of the other rows, [B, ...].
        noise: pure noise, [B, ...].
        cond: the conditioning, with guidance; `cond[rows]` must select rows, a list of their numbers.
        student: its velocity at any strength.
        is_sharded: one row goes through the network if no row needs it: in a sharded run every process must enter the network
            equally often.

    Returns:
        x at the start of all rows, [B, ...], in the dtype of `noised`.
    """
    noised = torch.where(per_sample(plan.is_from_noise, noised), noise.to(noised.dtype), noised)
    rows = plan.moved_rows or [0] * (is_sharded and plan.config.has_own_starts)
    if not rows:
        return noised
    x, end, u_end = (take_rows(tensor, rows) for tensor in (noised, plan.sigma_start, plan.u_start))
    sigma = torch.full_like(end, plan.config.sigma_max)
    velocity = student(x, sigma, cond[rows], plan.config.strength(1 - u_end))
    return put_rows(noised, plan.moved_rows, euler_step(x, velocity, sigma - end))
