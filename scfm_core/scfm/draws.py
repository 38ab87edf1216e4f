"""From uniform draws to the slices, shifts, jumps and sigmas of a plan, each for a whole batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from scfm_core.flow.schedule import shift_sigma
from scfm_core.scfm.method import PlanConfig
from scfm_core.scfm.slices import FlowMap, Matching

COLUMNS = (
    "slice", "grid", "start", "shift", "dynamic", "guidance", "flow", "dropout", "jump", "at_noise", "place", "level", "fake_level",
)  # fmt: skip
"""One column of uniform draws each. The order determines a run's random numbers: append new columns at the end."""

LEVELS = (0.02, 0.98)
"""Sigmas of the noise on the images of matching rows, as in DMD (Yin et al., arXiv 2311.18828): at the ends a score says nothing."""


def draw_shifts(
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


def draw_grids(config: PlanConfig, draw: Tensor, is_teacher: Tensor, is_trajectory: Tensor) -> Tensor:
    """Step counts of the grids, int64 [B], for rows that have one."""
    self_grid, path_grid = (
        torch.tensor(grids, device=draw.device)[(draw * len(grids)).long()]
        for grids in (config.self_grids, config.trajectory_grids)
    )
    return torch.where(is_teacher, config.teacher_grid, torch.where(is_trajectory, path_grid, self_grid))


def draw_points(
    config: PlanConfig,
    draw: dict[str, Tensor],
    grid: Tensor,
    jump: Tensor,
    slices: dict[str, Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Lengths of the jumps, and u at their start, middle and end, fp64 [B] each: of a pair of intervals on each row's grid; of a jump of
    any length on flow-map rows, and of one that ends at the image on matching rows. Their middle is the start."""
    first = 2 * (draw["start"] * (grid // 2)).long()  # pairs start at even points
    pair = [1 - (first + offset).double() / grid for offset in (0, 1, 2)]
    length, start = _any_jump(config.flow_map, draw)
    last, (is_flow_map, is_matching) = _length(config.matching, draw), (slices["flow_map"], slices["matching"])
    length = torch.where(is_matching, last, torch.where(is_flow_map, length, jump))
    points = [
        torch.where(is_flow_map, point, on_grid)
        for point, on_grid in zip((start, start, start - length), pair, strict=True)
    ]
    to_image = (last, last, torch.zeros_like(last))
    return length, [torch.where(is_matching, own, point) for own, point in zip(to_image, points, strict=True)]


def draw_sigmas(
    config: PlanConfig, draw: dict[str, Tensor], u: list[Tensor], shift: Tensor, is_flow: Tensor
) -> list[Tensor]:
    """Sigmas of the points `u`, fp32 [B] each; on flow-matching rows one random sigma."""
    flow_sigma = shift_sigma(config.flow_sigma.quantile(draw["flow"]), shift)
    sigmas = [torch.where(is_flow, flow_sigma, shift_sigma(point, shift)) for point in u]
    return [sigma.clamp(max=config.sigma_max).float() for sigma in sigmas]


def draw_levels(draw: Tensor, shift: Tensor) -> Tensor:
    """Sigmas of the noise on the images of matching rows, fp32 [B]: uniform before the row's shift, within `LEVELS`."""
    return shift_sigma(draw, shift).clamp(*LEVELS).float()


def _length(settings: FlowMap | Matching, draw: dict[str, Tensor]) -> Tensor:
    """Length h of a jump, in u, fp64 [B]: the whole way, or log-uniform."""
    is_whole = draw["jump"] >= 1 - settings.whole_fraction
    share = draw["jump"] / (1 - settings.whole_fraction) if settings.whole_fraction < 1 else draw["jump"]
    return torch.where(is_whole, 1.0, settings.shortest ** (1 - share))


def _any_jump(settings: FlowMap, draw: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Length h and start of a flow-map row's jump, in u, fp64 [B] each: h <= start <= 1."""
    length = _length(settings, draw)
    start = torch.where(draw["at_noise"] < settings.noise_fraction, 1.0, length + (1 - length) * draw["place"])
    return length, start


def draw_slices(config: PlanConfig, draw: Tensor) -> dict[str, Tensor]:
    """Masks of all slices but self, whose rows are the others, by name, from a uniform draw [B]."""
    masks, taken, end = {}, torch.zeros_like(draw, dtype=torch.bool), 0.0
    for name in ("flow", "trajectory", "flow_map", "matching", "teacher"):
        end += getattr(config, f"{name}_fraction")
        masks[name] = ~taken & (draw < end)
        taken = taken | masks[name]
    return masks


def strengths(config: PlanConfig, jump: Tensor, is_teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Strengths of student, near and far pass, fp64 [B] each. The teacher has strength 0."""
    ones = torch.ones_like(jump)
    student, half = (ones, ones) if config.step_gain is None else map(config.step_gain.strength, (jump, jump / 2))
    return student, torch.where(is_teacher, 0.0, half), half
