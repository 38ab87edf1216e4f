"""The shortcut target: one step of the student should equal two steps, of teacher or fast EMA and of slow EMA."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scfm_core.flow.path import euler_step, per_sample
from scfm_core.flow.rows import put_rows, take_rows
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
    student: Tensor | None = None,
    is_sharded: bool = True,
) -> Tensor:
    """The regression target of each row (paper, Eq. 11-13, 21, 22); no gradient.

    Args:
        plan: sigmas, strengths and slices, [B].
        noised_latents: x at `plan.sigma_start`, fp32 [B, ...].
        cond: the conditioning for `near` and `far`, or None; `cond[rows]` must select rows, a list of their numbers.
        near: velocity of the first half: the teacher on rows of strength 0, the fast EMA on the others.
        far: velocity of the second half: the slow EMA.
        flow_velocity: the known targets of flow-matching rows (`noise - latents`), trajectory rows (the mean velocity of
            the path), flow-map and matching rows, [B, ...]; other rows are ignored.
        student: the student's velocity at `plan.sigma_start`, [B, ...], the first half of self rows. `near` then is the teacher
            and gets teacher rows only. None: `near` gets all pairs.
        is_sharded: every process must enter the networks: a pass without rows runs on row 0, and its result is not used.

    Returns:
        target velocity, fp32 [B, ...].

    Raises:
        ValueError: if the plan has rows with a known target and `flow_velocity` is missing.
    """
    method = plan.config
    if method.has_known and flow_velocity is None:
        raise ValueError("this plan has rows with a known target: pass it, for flow-matching rows noise - latents")
    rows = plan.pair_rows or [0] * is_sharded
    if not method.has_pairs or not rows:
        assert flow_velocity is not None
        return flow_velocity.detach().to(noised_latents.dtype)

    def run(network: Velocity, x: Tensor, sigma: Tensor, strength: Tensor, rows: list[int]) -> Tensor:
        takes_all = cond is None or rows == list(range(len(plan)))
        return network(x, sigma, cond if takes_all else cond[rows], take_rows(strength, rows)).to(x.dtype)

    x_start = take_rows(noised_latents, rows)
    start, mid, end = (take_rows(sigma, rows) for sigma in (plan.sigma_start, plan.sigma_mid, plan.sigma_end))
    if student is None:
        v_near = run(near, x_start, start, plan.near_strength, rows)
    else:
        v_near = student.detach().to(x_start.dtype)
        if taught := plan.teacher_rows or [0] * (is_sharded and method.teacher_fraction > 0):
            x, sigma = take_rows(noised_latents, taught), take_rows(plan.sigma_start, taught)
            v_near = put_rows(v_near, plan.teacher_rows, run(near, x, sigma, plan.near_strength, taught))
        v_near = take_rows(v_near, rows)
    delta1, delta2 = start - mid, mid - end
    x_mid = euler_step(x_start, v_near, delta1)  # Eq. 11: an Euler step, not new noise
    v_far = run(far, x_mid, mid, plan.far_strength, rows)
    weight1, weight2 = per_sample(delta1, x_start), per_sample(delta2, x_start)
    target = (weight1 * v_near + weight2 * v_far) / (weight1 + weight2)  # Eq. 12-13
    return target if flow_velocity is None else put_rows(flow_velocity.to(target.dtype), plan.pair_rows, target)
