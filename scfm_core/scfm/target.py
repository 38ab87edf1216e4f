"""The shortcut target: one step of the student should equal two steps, of teacher or fast EMA and of slow EMA."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scfm_core.flow.path import euler_step, per_sample
from scfm_core.scfm.plan import ShortcutPlan

Velocity = Callable[[Tensor, Tensor, Any, Tensor], Tensor]
"""`velocity(x, sigma, cond, strength)`: x [B, ...], sigma and strength fp32 [B] -> [B, ...]. The strength may be on the CPU."""


@torch.no_grad()
def scfm_target(
    plan: ShortcutPlan,
    noised_latents: Tensor,
    cond: Any,
    near: Velocity,
    far: Velocity,
    *,
    flow_velocity: Tensor | None = None,
) -> Tensor:
    """The regression target of each row (paper, Eq. 11-13, 21, 22); no gradient.

    Args:
        plan: sigmas, strengths and slices, [B].
        noised_latents: x at `plan.sigma_start`, fp32 [B, ...].
        cond: the conditioning for `near` and `far`; `cond[rows]` must select rows, numbers on the CPU, if the plan has rows
            with a known target (None is passed through).
        near: velocity of the first half: the teacher on rows of strength 0, the fast EMA on the others.
        far: velocity of the second half: the slow EMA.
        flow_velocity: the known targets, [B, ...]: `noise - latents` on flow-matching rows, the mean velocity of the path on
            trajectory rows; other rows are ignored.

    Returns:
        target velocity, fp32 [B, ...].

    Raises:
        ValueError: if the plan has rows with a known target and `flow_velocity` is missing.
    """
    method = plan.config
    has_known = method.has_flow or method.has_trajectory
    if has_known and flow_velocity is None:
        raise ValueError("this plan has flow-matching rows: pass flow_velocity = noise - latents")
    if not method.has_pairs:
        assert flow_velocity is not None
        return flow_velocity.detach().to(noised_latents.dtype)
    if not has_known:
        return _pair_target(plan, slice(None), slice(None), noised_latents, cond, near, far)

    assert flow_velocity is not None
    # Only pairs need the two passes. At least one row always runs them, because in a sharded run every process must enter
    # the network. If this row is not a pair, its result is overwritten below.
    rows = plan.pair_rows.to(noised_latents.device, non_blocking=True)
    pair_cond = None if cond is None else cond[plan.pair_rows]
    pairs = _pair_target(plan, rows, plan.pair_rows, noised_latents[rows], pair_cond, near, far)
    target = flow_velocity.to(pairs.dtype).index_copy(0, rows, pairs)
    return torch.where(per_sample(plan.has_known_target, target), flow_velocity.to(pairs.dtype), target)


def _pair_target(
    plan: ShortcutPlan,
    rows: slice | Tensor,
    rows_of_strengths: slice | Tensor,
    x_start: Tensor,
    cond: Any,
    near: Velocity,
    far: Velocity,
) -> Tensor:
    """The target of `rows`; `rows_of_strengths` are the same numbers where the strengths are, on the CPU."""
    sigma_start, sigma_mid, sigma_end = plan.sigma_start[rows], plan.sigma_mid[rows], plan.sigma_end[rows]
    delta1, delta2 = sigma_start - sigma_mid, sigma_mid - sigma_end
    v_near = near(x_start, sigma_start, cond, plan.near_strength[rows_of_strengths]).to(x_start.dtype)
    x_mid = euler_step(x_start, v_near, delta1)  # Eq. 11: an Euler step, not new noise
    v_far = far(x_mid, sigma_mid, cond, plan.far_strength[rows_of_strengths]).to(x_start.dtype)
    weight1, weight2 = per_sample(delta1, x_start), per_sample(delta2, x_start)
    return (weight1 * v_near + weight2 * v_far) / (weight1 + weight2)  # Eq. 12-13
