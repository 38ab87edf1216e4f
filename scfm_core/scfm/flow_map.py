"""The flow map: jumps of any length h, learned from the derivative of the student's own jumps. No stored path, image or average.

V(h) is the student's velocity at strength g(h), for a jump that starts at u_start, in the coordinate u in which samplers take equal
steps, and ends at u_end = u_start - h; sigma(u) has the row's own shift. V(h) is exact if it is the mean of the teacher's velocity
along the teacher's path. Two identities hold for exact jumps, and each gives a target:

- Lagrangian (Boffi et al., arXiv 2406.07507, 2505.18825): as h grows, the end x(h) = x - (sigma_start - sigma_end) V(h) moves along
  the teacher's velocity. So V = v(x(h), sigma_end) - (sigma_start - sigma_end) / sigma'(u_end) dV/dh.
- Eulerian (MeanFlow, Geng et al., arXiv 2505.13447): as the start moves along the teacher's velocity, the end stays. So
  V = v(x, sigma_start) - (sigma_start - sigma_end) / sigma'(u_start) dV/du_start, where x, sigma_start and h all move.

Derivatives are finite differences of passes without gradient: h enters the network by the strength alone, and no derivative goes
through the network. One-sided differences look back, to the shorter jump: what is right at small h spreads to larger h.

`teacher_step` is the difference over one step of the teacher's sampler, or `teacher_steps` of them, with v their mean velocity:

    (sigma_start - sigma_end) V(h) = (sigma_start - sigma_mid) V(h - steps) + (sigma_mid - sigma_end) v(x_mid, sigma_mid)

It is solved for v, so that the error of a long jump counts as much as that of a short one. The other differences take v where the
whole jump ends; near sigma = 0 this velocity changes faster than a difference can follow, and the sampler never uses it.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scfm_core.flow.path import euler_step, per_sample
from scfm_core.flow.rows import put_rows, take_rows
from scfm_core.flow.schedule import shift_sigma
from scfm_core.scfm.plan import ShortcutPlan
from scfm_core.scfm.target import Velocity


@torch.no_grad()
def flow_map_velocity(
    plan: ShortcutPlan,
    noised: Tensor,
    cond: Any,
    prediction: Tensor,
    student: Velocity,
    known: Tensor | None = None,
    *,
    is_sharded: bool = True,
) -> Tensor:
    """The targets of flow-map rows; no gradient. Only these rows go through the network.

    Args:
        plan: gives the rows, their jumps and shifts.
        noised: x at `plan.sigma_start`, [B, ...].
        cond: the conditioning, with guidance; `cond[rows]` must select rows, a list of their numbers, which may repeat.
        prediction: the student's velocity at `noised`, `plan.sigma_start` and `plan.student_strength`, [B, ...].
        student: its velocity at any strength; strength 0 is the teacher.
        known: targets of other rows, [B, ...].
        is_sharded: as in `own_starts`.

    Returns:
        `known` with the targets of flow-map rows, [B, ...], in the dtype of `noised`; rows of other slices are zero without `known`.
        With `flow_map.weight` the targets are moved towards `prediction`, so that the gradient has this factor.
    """
    known = torch.zeros_like(noised) if known is None else known.to(noised.dtype)
    rows = plan.flow_map_rows or [0] * is_sharded
    if not rows:
        return known
    target = _lagrangian if plan.config.flow_map.form == "lagrangian" else _eulerian
    jump = _Jump(plan, rows, noised, prediction, cond, student)
    # The distance to the prediction, and so the gradient, has the weight as a factor; the loss has its square.
    return put_rows(known, plan.flow_map_rows, torch.lerp(jump.velocity, target(jump), jump.settings.weight))


class _Jump:
    """The jumps of n flow-map rows, and passes of the student on them."""

    def __init__(
        self, plan: ShortcutPlan, rows: list[int], noised: Tensor, prediction: Tensor, cond: Any, student: Velocity
    ) -> None:
        self.settings = plan.config.flow_map
        self._plan, self._rows, self._cond, self._student = plan, rows, cond, student
        self.x = take_rows(noised, rows)
        self.velocity = take_rows(prediction.detach(), rows).to(self.x.dtype)
        self.start, self.end, self.u_start, self.length, self.shift = (
            take_rows(tensor, rows)
            for tensor in (plan.sigma_start, plan.sigma_end, plan.u_start, plan.step_size, plan.shift)
        )

    def sigma(self, u: Tensor) -> Tensor:
        """[n] -> [n], as the plan computes it."""
        return shift_sigma(u, self.shift).clamp(max=self._plan.config.sigma_max)

    def passes(self, *points: tuple[Tensor, Tensor, Tensor]) -> Sequence[Tensor]:
        """Velocities at points (x [n, ...], sigma [n], length [n]; 0 is the teacher), by one call of all rows: weights are gathered
        once."""
        x, sigma, length = (torch.cat(parts) for parts in zip(*points, strict=True))
        cond = self._cond[self._rows * len(points)]
        return self._student(x, sigma, cond, self._plan.config.strength(length)).to(x.dtype).chunk(len(points))

    def teacher_velocity(self, x: Tensor, sigma: Tensor, passed: Tensor) -> Tensor:
        """The mean velocity of the teacher's steps from `x` [n, ...] at `sigma` [n], where a jump of the length `passed` [n] ends, to the
        row's end: [n, ...]. The steps share the rest of the row's length evenly."""
        steps, moved = self.settings.teacher_steps, x
        shares = (torch.lerp(passed, self.length, number / steps) for number in range(1, steps))
        sigmas = [sigma, *(self.sigma(self.u_start - share) for share in shares), self.end]
        for before, after in itertools.pairwise(sigmas):
            [velocity] = self.passes((moved, before, torch.zeros_like(before)))
            if steps == 1:
                return velocity
            moved = euler_step(moved, velocity, before - after)
        return (x - moved) / per_sample(sigma - self.end, x)


def _lagrangian(jump: _Jump) -> Tensor:
    """The Lagrangian target, [n, ...]; the formula of `teacher_step` is above."""
    way, length = jump.start - jump.end, jump.length
    if jump.settings.difference == "teacher_step":
        rest = (length - jump.settings.teacher_steps * jump.settings.shortest).clamp(min=0)
        mid = jump.sigma(jump.u_start - rest)
        [near] = jump.passes((jump.x, jump.start, rest))
        teacher = jump.teacher_velocity(euler_step(jump.x, near, jump.start - mid), mid, rest)
        return teacher - per_sample((jump.start - mid) / (mid - jump.end), near) * (jump.velocity - near)
    shorter, longer = (1 - jump.settings.epsilon) * length, length
    landed = euler_step(jump.x, jump.velocity, way), jump.end, torch.zeros_like(length)
    if jump.settings.difference == "central":
        longer = ((1 + jump.settings.epsilon) * length).minimum(jump.u_start)  # no jump goes beyond the data
        back, forth, teacher = jump.passes((jump.x, jump.start, shorter), (jump.x, jump.start, longer), landed)
    else:
        back, teacher = jump.passes((jump.x, jump.start, shorter), landed)
        forth = jump.velocity
    # A difference in sigma: over the last tenth of u a shift changes the slope of sigma(u) by as much as its square.
    scale = way / (jump.sigma(jump.u_start - shorter) - jump.sigma(jump.u_start - longer))
    return teacher - per_sample(scale, back) * (forth - back)


def _eulerian(jump: _Jump) -> Tensor:
    """The Eulerian target, [n, ...]. At pure noise the difference is one-sided: there is no sigma above 1."""
    way, step = jump.start - jump.end, jump.settings.epsilon * jump.length
    [teacher] = jump.passes((jump.x, jump.start, torch.zeros_like(step)))

    def moved(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The jump to the same end from `u`, along the teacher's velocity."""
        sigma = jump.sigma(u)
        return euler_step(jump.x, teacher, jump.start - sigma), sigma, jump.length + u - jump.u_start

    if jump.settings.difference == "teacher_step":
        x, mid, rest = moved(jump.u_start - jump.settings.shortest)
        [far] = jump.passes((x, mid, rest.clamp(min=0)))
        return teacher - per_sample((mid - jump.end) / (jump.start - mid), far) * (jump.velocity - far)
    before, after = jump.u_start - step, jump.u_start
    if jump.settings.difference == "central":
        after = (after + step).clamp(max=1)
        back, forth = jump.passes(moved(before), moved(after))
    else:
        [back], forth = jump.passes(moved(before)), jump.velocity
    scale = way / (jump.sigma(after) - jump.sigma(before))
    return teacher - per_sample(scale, back) * (forth - back)
