"""The plan: over which pair of grid intervals each sample learns to jump, and at which adapter strength."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scfm_core.flow.random import Stream, uniform
from scfm_core.readback import to_device
from scfm_core.scfm.draws import (
    COLUMNS,
    draw_grids,
    draw_levels,
    draw_points,
    draw_shifts,
    draw_sigmas,
    draw_slices,
    strengths,
)
from scfm_core.scfm.method import PlanConfig

SLICES = ("teacher", "self", "flow", "trajectory", "flow_map", "matching")


@dataclass(frozen=True, kw_only=True)
class ShortcutPlan:
    """One jump for each sample of a batch, made by `sample_plan`. Tensors are [B]; the row numbers at the end are on the host.

    `sigma_start > sigma_mid > sigma_end` on pairs. A flow-matching row is a jump of length zero: all three are equal. A
    trajectory row gets its sigmas from its path (`on_trajectories`), with sigma_mid equal to sigma_start, as on flow-map and matching
    rows.
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
    u_start: Tensor
    """Where the jump of a flow-map or matching row starts, before the shift: 1 is noise. It has no meaning on other rows."""
    level: Tensor
    """Sigma to which the image of a matching row is noised, to compare its scores. It has no meaning on other rows."""
    fake_level: Tensor
    """The same, for the fake score to learn from."""
    grid: Tensor
    """int64: step count of the grid of the jump; 0 on flow-matching, flow-map and matching rows."""
    interval: Tensor
    """int64: which interval of `grid` a trajectory row jumps, counted from the noise; 0 on other rows."""
    is_teacher: Tensor
    """bool, like the other slices."""
    is_flow: Tensor
    is_trajectory: Tensor
    is_flow_map: Tensor
    is_matching: Tensor
    is_from_noise: Tensor
    """bool: rows that start at pure noise, or where a jump of the student from there ends. Of the data they use captions alone."""
    slice_number: Tensor
    """int64: place of the row's slice in `SLICES`."""
    is_dropped: Tensor
    """bool: rows without their caption."""
    pair_rows: list[int]
    """Numbers of the rows that need near and far passes. They are known where the plan is drawn, on the host: to read them from a
    GPU would wait for its queue."""
    teacher_rows: list[int]
    trajectory_rows: list[int]
    flow_map_rows: list[int]
    matching_rows: list[int]
    moved_rows: list[int]
    """Rows that start where a jump of the student from pure noise ends."""

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
        dynamic_shift: the shift of the model's own sampler with a number of steps; needed if `dynamic_shift_fraction` > 0.

    Returns:
        the plan, on the device of `sample_ids`.

    Raises:
        ValueError: if `dynamic_shift` is needed but missing, or so large that `sigma_max` clamps two points of a grid.
    """
    draw = dict(zip(COLUMNS, uniform(seed, sample_ids, Stream.PLAN, len(COLUMNS)).unbind(1), strict=True))
    slices = draw_slices(config, draw["slice"])
    is_flow, is_trajectory, is_teacher = slices["flow"], slices["trajectory"], slices["teacher"]
    has_grid = ~is_flow & ~slices["flow_map"] & ~slices["matching"]
    grid = draw_grids(config, draw["grid"], is_teacher, is_trajectory)
    # Rows without a grid have the dynamic shift of a sampler with the teacher's steps; flow-matching rows its strength too.
    shift = draw_shifts(config, draw, torch.where(has_grid, grid, config.teacher_grid), dynamic_shift)
    # The student jumps two grid intervals; near and far pass jump one each. A flow-matching row has no length: its strength
    # is that of one interval of the teacher's grid, as in a sampler of many steps. A trajectory row jumps one interval.
    jump = torch.where(is_flow, 1 / config.teacher_grid, torch.where(is_trajectory, 1, 2) / grid.double())
    jump, points = draw_points(config, draw, grid, jump, slices)
    start, mid, end = draw_sigmas(config, draw, points, shift, is_flow)
    student, near, far = strengths(config, jump, is_teacher)
    low, high = config.guidance
    is_from_noise = slices["matching"] | slices["flow_map"] if config.flow_map.starts == "own" else slices["matching"]
    return ShortcutPlan(
        config=config,
        sample_ids=sample_ids,
        sigma_start=start,
        sigma_mid=mid,
        sigma_end=end,
        student_strength=student.float(),
        near_strength=near.float(),
        far_strength=far.float(),
        guidance=(low + (high - low) * draw["guidance"]).float(),
        shift=shift.float(),
        step_size=jump.float(),
        u_start=points[0].float(),
        level=draw_levels(draw["level"], shift),
        fake_level=draw_levels(draw["fake_level"], shift),
        grid=torch.where(has_grid, grid, 0),
        interval=torch.where(is_trajectory, (draw["start"] * grid).long(), 0),
        **{f"is_{name}": mask for name, mask in slices.items()},
        is_from_noise=is_from_noise,
        slice_number=_slice_numbers(slices),
        is_dropped=(draw["dropout"] < config.caption_dropout) & ~is_trajectory,
        pair_rows=_numbers(has_grid & ~is_trajectory),
        teacher_rows=_numbers(is_teacher),
        trajectory_rows=_numbers(is_trajectory),
        flow_map_rows=_numbers(slices["flow_map"]),
        matching_rows=_numbers(slices["matching"]),
        moved_rows=_numbers(is_from_noise & (points[0] < 1)),
    )


def _slice_numbers(slices: dict[str, Tensor]) -> Tensor:
    """Places in `SLICES`, int64 [B]; rows of no mask are the self slice."""
    is_self = ~torch.stack(list(slices.values())).any(0)
    return torch.stack([SLICES.index(name) * mask for name, mask in {**slices, "self": is_self}.items()]).sum(0)


def _numbers(mask: Tensor) -> list[int]:
    """Numbers of the rows where `mask` is true."""
    return [row for row, chosen in enumerate(mask.tolist()) if chosen]
