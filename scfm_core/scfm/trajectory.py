"""Teacher trajectories: the exact mean velocity between two nodes of a path that the frozen teacher was rolled along.

No image is needed, no EMA and no near or far pass: the path is stored once (`scfm data generate --trajectories`) and used
many times. A row jumps one interval of an N-step grid whose points are nodes of the path.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from scfm_core.flow.path import per_sample
from scfm_core.scfm.plan import ShortcutPlan


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
    assert plan.is_trajectory is not None and plan.grid is not None and plan.interval is not None
    rows, nodes = plan.is_trajectory, trajectory.sigmas.shape[1] - 1
    grid = torch.where(rows, plan.grid, nodes)
    first = plan.interval * (nodes // grid)
    last = first + nodes // grid
    state, velocity = trajectory.jump(latents, first, last)
    start, end = (trajectory.sigmas.gather(1, node[:, None])[:, 0] for node in (first, last))
    guidance = plan.guidance if plan.guidance is None else torch.where(rows, trajectory.guidance, plan.guidance)
    moved = dataclasses.replace(
        plan,
        sigma_start=torch.where(rows, start, plan.sigma_start),
        sigma_mid=torch.where(rows, start, plan.sigma_mid),
        sigma_end=torch.where(rows, end, plan.sigma_end),
        guidance=guidance,
    )
    mask = per_sample(rows, noised)
    velocity = velocity.to(noised.dtype)
    return (
        moved,
        torch.where(mask, state.to(noised.dtype), noised),
        velocity if given is None else torch.where(mask, velocity, given),
    )
