"""Teacher trajectories: the exact mean velocity between two nodes of a path that the frozen teacher was rolled along.

No image is needed, no EMA and no near or far pass. The path is stored once (`scfm data generate --trajectories`) and used
many times, or taken for one row within the training (`take_paths`). A row jumps one interval of an N-step grid whose points
are nodes of the path.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scfm_core.flow.path import per_sample
from scfm_core.flow.sampler import roll_out
from scfm_core.flow.schedule import shift_sigma
from scfm_core.scfm.plan import ShortcutPlan
from scfm_core.scfm.target import Velocity


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Paths of B samples from noise to data over K intervals.

    Mean velocities are stored, not states: rounded to bf16, the difference of two close states would be off by a tenth.
    """

    velocities: Tensor
    """Mean velocity of each interval, [B, K, ...]."""
    sigmas: Tensor
    """Of the nodes, falling to 0, fp32 [B, K + 1]."""
    guidance: Tensor
    """Embedded guidance under which the teacher was rolled, fp32 [B]."""

    def to(self, device: torch.device | str) -> "Trajectory":
        """The same on `device`."""
        return Trajectory(**{name: part.to(device, non_blocking=True) for name, part in vars(self).items()})

    def jump(self, latents: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """From node to node.

        Args:
            latents: the ends of the paths, [B, ...].
            first, last: numbers of the nodes, int64 [B], first < last.

        Returns:
            the state at `first` and the mean velocity up to `last`, both fp32 [B, ...].
        """
        lengths = self.sigmas[:, :-1] - self.sigmas[:, 1:]
        interval = torch.arange(lengths.shape[1], device=lengths.device)
        behind = lengths * (interval >= first[:, None])
        within = behind * (interval < last[:, None])
        velocities = self.velocities.float()
        with torch.autocast(velocities.device.type, enabled=False):  # DeepSpeed's is around the whole step
            state = latents.float() + torch.einsum("bk,bk...->b...", behind, velocities)
            return state, torch.einsum("bk,bk...->b...", within / within.sum(1, keepdim=True), velocities)


def take_paths(
    plan: ShortcutPlan, latents: Tensor, noise: Tensor, cond: Any, teacher: Velocity, num_steps: int
) -> tuple[Trajectory, Tensor]:
    """The teacher's paths from `noise`, by Euler's method at each row's own shift; no gradient.

    Only the plan's trajectory rows go through the network, and at least one, so that every process of a sharded run enters
    it equally often.

    Args:
        plan: its trajectory rows, shifts and guidance.
        latents, noise: of all rows, [B, ...].
        cond: what `teacher` takes, already at the plan's guidance; `cond[rows]` must select rows.
        teacher: called with strength 0.
        num_steps: K, steps of each path, each an interval.

    Returns:
        the paths, of no meaning on other rows, and where they end: [B, ...], on other rows `latents`.
    """
    rows = plan.trajectory_rows
    u = 1 - torch.arange(num_steps + 1, dtype=torch.float64, device=noise.device) / num_steps
    sigmas = shift_sigma(u, plan.shift[:, None].double()).float()
    picked, strength = cond[rows], torch.zeros_like(plan.shift[rows])
    ends, velocities = roll_out(
        lambda x, sigma: teacher(x, sigma, picked, strength), noise[rows], sigmas[rows], intervals=num_steps
    )
    of_all = velocities.new_zeros(len(plan), *velocities.shape[1:]).index_copy(0, rows, velocities)
    path = Trajectory(velocities=of_all, sigmas=sigmas, guidance=plan.guidance)
    return path, latents.to(ends.dtype).index_copy(0, rows, ends)


def on_trajectories(
    plan: ShortcutPlan, trajectory: Trajectory, latents: Tensor, noised: Tensor, given: Tensor | None
) -> tuple[ShortcutPlan, Tensor, Tensor]:
    """Put the plan's trajectory rows onto their paths.

    Args:
        plan: its trajectory rows know grid and interval, but not yet their sigmas.
        trajectory: of all rows; only the plan's are used. Every grid of the plan divides its intervals.
        latents: ends of the paths, [B, ...].
        noised: where the other rows start, [B, ...].
        given: target velocities of flow-matching rows, [B, ...].

    Returns:
        the plan with the sigmas and the guidance of the paths, the starts, and the given velocities.
    """
    rows, nodes = plan.is_trajectory, trajectory.sigmas.shape[1] - 1
    grid = torch.where(rows, plan.grid, nodes)
    first = plan.interval * (nodes // grid)
    last = first + nodes // grid
    state, velocity = trajectory.jump(latents, first, last)
    start, end = (trajectory.sigmas.gather(1, node[:, None])[:, 0] for node in (first, last))
    moved = dataclasses.replace(
        plan,
        sigma_start=torch.where(rows, start, plan.sigma_start),
        sigma_mid=torch.where(rows, start, plan.sigma_mid),
        sigma_end=torch.where(rows, end, plan.sigma_end),
        guidance=torch.where(rows, trajectory.guidance, plan.guidance),
    )
    mask = per_sample(rows, noised)
    velocity = velocity.to(noised.dtype)
    return (
        moved,
        torch.where(mask, state.to(noised.dtype), noised),
        velocity if given is None else torch.where(mask, velocity, given),
    )
