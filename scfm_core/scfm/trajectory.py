"""Teacher trajectories: the exact mean velocity between two nodes of a path that the frozen teacher sampled.

They need no image, no EMA and no near or far pass. A path is stored once (`scfm data generate --trajectories`) and used many
times, or computed for one row during training (`take_paths`). A row jumps one interval of an N-step grid, whose points are
nodes of the path.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scfm_core.flow.path import per_sample
from scfm_core.flow.rows import put_rows, take_rows
from scfm_core.flow.sampler import roll_out
from scfm_core.flow.schedule import shift_sigma
from scfm_core.scfm.plan import ShortcutPlan
from scfm_core.scfm.target import Velocity


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Paths of B samples from noise to data over K intervals.

    Mean velocities are stored, not states: from states in bf16, the difference of two close ones has an error of 10 %.
    """

    velocities: Tensor
    """Mean velocity of each interval, [B, K, ...]."""
    sigmas: Tensor
    """Sigmas of the nodes, decreasing to 0, fp32 [B, K + 1]."""
    guidance: Tensor
    """Guidance with which the teacher sampled the path, fp32 [B]."""

    def to(self, device: torch.device | str) -> "Trajectory":
        """The same paths on `device`."""
        return Trajectory(**{name: part.to(device, non_blocking=True) for name, part in vars(self).items()})

    def jump(self, latents: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """A jump from one node to another.

        Args:
            latents: the ends of the paths, at sigma 0, [B, ...].
            first, last: numbers of the nodes, int64 [B], first < last.

        Returns:
            the state at `first` and the mean velocity from there to `last`, both fp32 [B, ...].
        """
        lengths = self.sigmas[:, :-1] - self.sigmas[:, 1:]
        interval = torch.arange(lengths.shape[1], device=lengths.device)
        to_end = lengths * (interval >= first[:, None])
        within = to_end * (interval < last[:, None])
        velocities = self.velocities.float()
        with torch.autocast(velocities.device.type, enabled=False):  # DeepSpeed puts the whole step under autocast
            state = latents.float() + torch.einsum("bk,bk...->b...", to_end, velocities)
            return state, torch.einsum("bk,bk...->b...", within / within.sum(1, keepdim=True), velocities)


def take_paths(
    plan: ShortcutPlan,
    latents: Tensor,
    noise: Tensor,
    cond: Any,
    teacher: Velocity,
    num_steps: int,
    *,
    is_sharded: bool = True,
) -> tuple[Trajectory, Tensor]:
    """The teacher's paths from `noise`, by Euler's method at each row's own shift; no gradient.

    Only the plan's trajectory rows go through the network.

    Args:
        plan: gives the trajectory rows, shifts and guidance.
        latents, noise: all rows, [B, ...].
        cond: the conditioning for `teacher`, with the plan's guidance; `cond[rows]` must select rows, a list of their numbers.
        teacher: called with strength 0.
        num_steps: K, the Euler steps of each path; each is an interval.
        is_sharded: one row goes through the network if no row needs it: in a sharded run every process must enter the network
            equally often.

    Returns:
        the paths, which are meaningful on trajectory rows only, and their ends [B, ...]; on other rows these are `latents`.
    """
    u = 1 - torch.arange(num_steps + 1, dtype=torch.float64, device=noise.device) / num_steps
    sigmas = shift_sigma(u, plan.shift[:, None].double()).float()
    all_velocities = noise.new_zeros(len(plan), num_steps, *noise.shape[1:])
    ends = latents.to(noise.dtype)
    rows = plan.trajectory_rows or [0] * is_sharded
    if rows:
        row_cond, strength = cond[rows], torch.zeros(len(rows))
        reached, velocities = roll_out(
            lambda x, sigma: teacher(x, sigma, row_cond, strength),
            take_rows(noise, rows),
            take_rows(sigmas, rows),
            intervals=num_steps,
        )
        all_velocities = put_rows(all_velocities, plan.trajectory_rows, velocities)
        ends = put_rows(latents.to(reached.dtype), plan.trajectory_rows, reached)
    return Trajectory(velocities=all_velocities, sigmas=sigmas, guidance=plan.guidance), ends


def on_trajectories(
    plan: ShortcutPlan, trajectory: Trajectory, latents: Tensor, noised: Tensor, flow_velocity: Tensor | None
) -> tuple[ShortcutPlan, Tensor, Tensor]:
    """Put the plan's trajectory rows onto their paths.

    Args:
        plan: its trajectory rows have a grid and an interval, but no sigmas yet.
        trajectory: paths of all rows; only those of trajectory rows are used. Every trajectory grid divides their intervals.
        latents: ends of the paths, [B, ...].
        noised: x at the start of the other rows, [B, ...].
        flow_velocity: targets of flow-matching rows, [B, ...]; None if there are no such rows.

    Returns:
        the plan with sigmas and guidance of the paths, x at the start of all rows, and the known targets of all rows.
    """
    rows, nodes = plan.is_trajectory, trajectory.sigmas.shape[1] - 1
    grid = torch.where(rows, plan.grid, nodes)
    first = plan.interval * (nodes // grid)
    last = first + nodes // grid
    state, velocity = trajectory.jump(latents, first, last)
    start, end = (trajectory.sigmas.gather(1, node[:, None])[:, 0] for node in (first, last))
    placed = dataclasses.replace(
        plan,
        sigma_start=torch.where(rows, start, plan.sigma_start),
        sigma_mid=torch.where(rows, start, plan.sigma_mid),
        sigma_end=torch.where(rows, end, plan.sigma_end),
        guidance=torch.where(rows, trajectory.guidance, plan.guidance),
    )
    mask = per_sample(rows, noised)
    velocity = velocity.to(noised.dtype)
    return (
        placed,
        torch.where(mask, state.to(noised.dtype), noised),
        velocity if flow_velocity is None else torch.where(mask, velocity, flow_velocity),
    )
