"""The plan: over which pair of grid intervals each sample learns to jump, and at which adapter strength."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scfm_core.flow.random import Stream, uniform
from scfm_core.flow.schedule import shift_sigma
from scfm_core.readback import to_device
from scfm_core.scfm.method import PlanConfig

# One column of uniform draws each. The order determines a run's random numbers: append new columns at the end.
_DRAWS = ("slice", "grid", "start", "shift", "dynamic", "guidance", "flow", "dropout")

SLICES = ("teacher", "self", "flow", "trajectory")


@dataclass(frozen=True, kw_only=True)
class ShortcutPlan:
    """One jump for each sample of a batch, made by `sample_plan`. Tensors are [B]; the row numbers at the end are on the host.

    `sigma_start > sigma_mid > sigma_end` on pairs. A flow-matching row is a jump of length zero: all three are equal. A
    trajectory row gets its sigmas from its path (`on_trajectories`), with sigma_mid equal to sigma_start.
    """

    config: PlanConfig
    """The configuration of the draws. In a sharded run it alone decides which passes a batch needs: all processes run the same."""
    sample_ids: Tensor
    """Global sample indices, int64."""
    sigma_start: Tensor
    """fp32, like every floating-point tensor here."""
    sigma_mid: Tensor
    sigma_end: Tensor
    student_strength: Tensor
    near_strength: Tensor
    """0 on teacher rows."""
    far_strength: Tensor
    guidance: Tensor
    shift: Tensor
    step_size: Tensor
    """Fraction of the grid that the student jumps; near and far pass each jump half of it."""
    grid: Tensor
    """int64: step count of the grid of the jump; 0 on flow-matching rows."""
    interval: Tensor
    """int64: which interval of `grid` a trajectory row jumps, counted from the noise; 0 on other rows."""
    is_teacher: Tensor
    """bool, like the other slices."""
    is_flow: Tensor
    is_trajectory: Tensor
    slice_number: Tensor
    """int64: place of the row's slice in `SLICES`."""
    is_dropped: Tensor
    """bool: rows without their caption."""
    pair_rows: list[int]
    """Numbers of the rows that need near and far passes. They are known where the plan is drawn, on the host: to read them from a
    GPU would wait for its queue."""
    teacher_rows: list[int]
    trajectory_rows: list[int]

    def __len__(self) -> int:
        return self.sigma_start.shape[0]

    def to(self, device: torch.device | str, *, with_strengths: bool = True) -> "ShortcutPlan":
        """The same plan on `device`, by one copy that does not wait. Strengths may stay where they are: full weights read them."""
        moved = {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and (with_strengths or not name.endswith("_strength"))
        }
        moved = dict(
            sorted(moved.items(), key=lambda item: -item[1].element_size())
        )  # each part is aligned in the packed bytes
        packed = to_device(torch.cat([value.view(torch.uint8) for value in moved.values()]), device)
        parts = zip(moved.items(), packed.split([value.nbytes for value in moved.values()]), strict=True)
        return dataclasses.replace(self, **{name: part.view(value.dtype) for (name, value), part in parts})


def sample_plan(
    config: PlanConfig, sample_ids: Tensor, seed: int, *, dynamic_shift: Callable[[int], float] | None = None
) -> ShortcutPlan:
    """Draw each sample's jump from (seed, sample id) alone, independently of its position in the batch and its rank.

    Args:
        config: fractions, grids, ranges.
        sample_ids: global sample indices, int64 [B].
        seed: the run's seed.
        dynamic_shift: the family's shift of a sampler with a number of steps; needed if `dynamic_shift_fraction` > 0.

    Returns:
        the plan, on the device of `sample_ids`.

    Raises:
        ValueError: if `dynamic_shift` is needed but missing, or so large that `sigma_max` clamps two points of a grid.
    """
    draws = uniform(seed, sample_ids, Stream.PLAN, len(_DRAWS))
    draw = dict(zip(_DRAWS, draws.unbind(1), strict=True))
    is_flow, is_trajectory, is_teacher = _slices(config, draw["slice"])
    self_grid, path_grid = (
        torch.tensor(grids, device=sample_ids.device)[(draw["grid"] * len(grids)).long()]
        for grids in (config.self_grids, config.trajectory_grids)
    )
    grid = torch.where(is_teacher, config.teacher_grid, torch.where(is_trajectory, path_grid, self_grid))
    # A flow-matching row has no grid; like its strength, its dynamic shift is that of a sampler with the teacher's steps.
    shift = _shifts(config, draw, torch.where(is_flow, config.teacher_grid, grid), dynamic_shift)
    start, mid, end = _sigmas(config, draw, grid, shift, is_flow)
    # The student jumps two grid intervals; near and far pass jump one each. A flow-matching row has no length: its strength
    # is that of one interval of the teacher's grid, as in a sampler of many steps. A trajectory row jumps one interval.
    jump = torch.where(is_flow, 1 / config.teacher_grid, torch.where(is_trajectory, 1, 2) / grid.double())
    student, near, far = _strengths(config, jump, is_teacher)
    guidance_low, guidance_high = config.guidance
    return ShortcutPlan(
        config=config,
        sample_ids=sample_ids,
        sigma_start=start,
        sigma_mid=mid,
        sigma_end=end,
        student_strength=student.float(),
        near_strength=near.float(),
        far_strength=far.float(),
        guidance=(guidance_low + (guidance_high - guidance_low) * draw["guidance"]).float(),
        shift=shift.float(),
        step_size=jump.float(),
        grid=torch.where(is_flow, 0, grid),
        interval=torch.where(is_trajectory, (draw["start"] * path_grid).long(), 0),
        is_teacher=is_teacher,
        is_flow=is_flow,
        is_trajectory=is_trajectory,
        slice_number=1 - is_teacher.long() + is_flow.long() + 2 * is_trajectory.long(),
        is_dropped=(draw["dropout"] < config.caption_dropout) & ~is_trajectory,
        pair_rows=_rows(~is_flow & ~is_trajectory),
        teacher_rows=_rows(is_teacher),
        trajectory_rows=_rows(is_trajectory),
    )


def _shifts(
    config: PlanConfig, draw: dict[str, Tensor], num_steps: Tensor, dynamic_shift: Callable[[int], float] | None
) -> Tensor:
    """Timestep shifts, fp64 [B]. `num_steps`, int64 [B], is the step count of each row's grid: a dynamic shift depends on it."""
    low, high = config.shift
    shift = low + (high - low) * draw["shift"]
    if config.dynamic_shift_fraction == 0:
        return shift
    if dynamic_shift is None:
        raise ValueError("dynamic_shift_fraction > 0 needs dynamic_shift, the family's shift for a number of steps")
    path_grids = config.trajectory_grids if config.has_trajectory else ()
    counts = sorted({config.teacher_grid, *config.self_grids, *path_grids})
    shifts = [dynamic_shift(count) for count in counts]
    for distinct in sorted(set(shifts)):
        config.check_pairs_at(distinct)
    device = num_steps.device
    of_row = torch.tensor(shifts, dtype=torch.float64, device=device)[
        torch.searchsorted(torch.tensor(counts, device=device), num_steps)
    ]
    return torch.where(draw["dynamic"] < config.dynamic_shift_fraction, of_row, shift)


def _sigmas(
    config: PlanConfig, draw: dict[str, Tensor], grid: Tensor, shift: Tensor, is_flow: Tensor
) -> tuple[Tensor, ...]:
    """Start, middle and end of a pair of intervals on each row's grid, fp32 [B] each; on flow-matching rows one random sigma."""
    first = 2 * (draw["start"] * (grid // 2)).long()  # pairs start at even points
    flow_sigma = shift_sigma(config.flow_sigma.quantile(draw["flow"]), shift)
    on_grid = (shift_sigma(1 - (first + offset).double() / grid, shift) for offset in (0, 1, 2))
    return tuple(torch.where(is_flow, flow_sigma, sigma).clamp(max=config.sigma_max).float() for sigma in on_grid)


def _rows(mask: Tensor) -> list[int]:
    """Numbers of the rows where `mask` is true."""
    return [row for row, chosen in enumerate(mask.tolist()) if chosen]


def _slices(config: PlanConfig, draw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of flow-matching, trajectory and teacher rows, from a uniform draw [B]; the other rows are the self slice."""
    known = config.flow_fraction + config.trajectory_fraction
    is_flow = draw < config.flow_fraction
    is_trajectory = ~is_flow & (draw < known)
    return is_flow, is_trajectory, ~is_flow & ~is_trajectory & (draw < known + config.teacher_fraction)


def _strengths(config: PlanConfig, jump: Tensor, is_teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Strengths of student, near and far pass, fp64 [B] each. The teacher has strength 0."""
    ones = torch.ones_like(jump)
    student, half = (ones, ones) if config.step_gain is None else map(config.step_gain.strength, (jump, jump / 2))
    return student, torch.where(is_teacher, 0.0, half), half
