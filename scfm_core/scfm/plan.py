"""The plan: which pair of neighbouring sigmas each sample learns to jump, and at which adapter strength."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scfm_core.flow.random import Stream, uniform
from scfm_core.flow.schedule import dynamic_shift, shift_sigma

# One column of uniform draws each; the order is part of the run's randomness and only grows at the end.
_DRAWS = ("slice", "rung", "start", "shift", "dynamic", "guidance", "flow")


@dataclass(frozen=True, kw_only=True)
class StepGain:
    """Step-scaled adapters: a jump over the share `jump` of the grid runs at strength `jump ** gamma`."""

    gamma: float = 0.5
    """Exponent; 0.5 is what was measured on the digits, 1 is the first-order law, 0 would be the paper."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 4:
            raise ValueError(f"step_gain.gamma must be in (0, 4], got {self.gamma}")

    def strength(self, jump: Tensor) -> Tensor:
        """Strength for jumps [B], each the share of the grid in u (1/N for one step of an N-step sampler)."""
        return jump**self.gamma


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How jumps are drawn (paper, Sec. 4 and App. B). The defaults are the paper's."""

    teacher_fraction: float = 0.4
    """Share of the batch whose near half is the frozen teacher, on neighbouring points of `teacher_grid`."""
    flow_fraction: float = 0.0
    """Share of the batch with the plain flow-matching target; the rest, after the teacher's, is the self slice."""
    teacher_grid: int = 32
    """Steps of the teacher slice's grid."""
    self_grids: tuple[int, ...] = (16, 8, 4)
    """Rungs of the self slice: its grids' numbers of steps, drawn uniformly. The authors' code adds 2."""
    shift: tuple[float, float] = (2.5, 4.5)
    """Range of the timestep shift, drawn per sample; equal ends fix it."""
    dynamic_shift_fraction: float = 0.0
    """Share of samples that take Flux's resolution-dependent shift instead (the authors' code: 0.1)."""
    guidance: tuple[float, float] = (0.0, 8.0)
    """Range of the embedded guidance, drawn per sample, the same in all three passes."""
    step_gain: StepGain | None = None
    """Condition on the step size through the adapter's strength; none is the paper."""
    sigma_max: float = 1 - 1e-5
    """Clamp of the grid's first point."""

    def __post_init__(self) -> None:
        for name in ("teacher_fraction", "flow_fraction", "dynamic_shift_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"method.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.teacher_fraction + self.flow_fraction > 1 + 1e-9:
            raise ValueError(
                f"method.teacher_fraction + method.flow_fraction must be at most 1, got "
                f"{self.teacher_fraction} + {self.flow_fraction}"
            )
        for name, grids in (("teacher_grid", (self.teacher_grid,)), ("self_grids", self.self_grids)):
            if not grids or any(n < 2 or n % 2 for n in grids):
                raise ValueError(f"method.{name} needs even step counts of at least 2 (jumps are pairs), got {grids}")
        for name, lowest in (("shift", 1e-6), ("guidance", 0.0)):
            low, high = getattr(self, name)
            if not lowest <= low <= high < math.inf:
                raise ValueError(
                    f"method.{name} must be [low, high] with {lowest:g} <= low <= high, finite, got {[low, high]}"
                )
        if not 0.9 < self.sigma_max <= 1:
            raise ValueError(f"method.sigma_max must be in (0.9, 1], got {self.sigma_max}")
        self._refuse_collapsed_pairs(self.shift[1])

    def _refuse_collapsed_pairs(self, shift: float) -> None:
        """The clamp may move a grid's first point alone: a pair that it shortened to nothing has no velocity."""
        second = float(
            shift_sigma(torch.tensor(1 - 1 / max(self.teacher_grid, *self.self_grids), dtype=torch.float64), shift)
        )
        if second >= self.sigma_max:
            raise ValueError(
                f"method: at shift {shift:g} the finest grid's second point, {second:.6f}, reaches sigma_max "
                f"{self.sigma_max:g}. Lower the shift or raise method.sigma_max"
            )

    @property
    def has_flow(self) -> bool:
        """Whether any row can be a flow-matching row."""
        return self.flow_fraction > 0

    @property
    def has_pairs(self) -> bool:
        """Whether any row can be a shortcut pair: if not, no near or far pass is needed."""
        return self.flow_fraction < 1


@dataclass(frozen=True, kw_only=True)
class ShortcutPlan:
    """One row a sample. 1-D tensors [B]; floating ones are fp32.

    `sigma_start > sigma_mid > sigma_end` on pairs; a flow-matching row is a jump of length zero, all three equal.
    """

    sigma_start: Tensor
    sigma_mid: Tensor
    sigma_end: Tensor
    student_strength: Tensor
    near_strength: Tensor
    far_strength: Tensor
    is_teacher: Tensor
    is_flow: Tensor
    sample_ids: Tensor | None = None
    guidance: Tensor | None = None
    shift: Tensor | None = None
    grid: Tensor | None = None
    """int64: steps of the grid that the pair lies on; 0 on flow-matching rows."""
    has_flow: bool | None = None
    """Whether rows may be flow-matching rows, and `has_pairs`: whether they may be pairs. Given by the configuration,
    so that every process of a run takes the same way; None: looked up in `is_flow`."""
    has_pairs: bool | None = None

    def __post_init__(self) -> None:
        if self.has_flow is None:
            object.__setattr__(self, "has_flow", bool(self.is_flow.any()))
        if self.has_pairs is None:
            object.__setattr__(self, "has_pairs", not bool(self.is_flow.all()))

    def __len__(self) -> int:
        return self.sigma_start.shape[0]

    def to(self, device: torch.device | str) -> "ShortcutPlan":
        """The same plan with its tensors on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def sample_plan(config: PlanConfig, sample_ids: Tensor, seed: int, *, image_tokens: int | None = None) -> ShortcutPlan:
    """Draw each sample's jump from (seed, sample id) alone: its place in the batch and its rank do not matter.

    Args:
        config: fractions, grids, ranges.
        sample_ids: global sample indices, int64 [B].
        seed: the run's seed.
        image_tokens: packed image tokens, for Flux's dynamic shift; needed if `dynamic_shift_fraction` > 0.

    Returns:
        the plan, on the device of `sample_ids`.

    Raises:
        ValueError: if a dynamic shift is asked for without `image_tokens`.
    """
    draws = uniform(seed, sample_ids, Stream.PLAN, len(_DRAWS))
    draw = dict(zip(_DRAWS, draws.unbind(1), strict=True))
    is_flow = draw["slice"] < config.flow_fraction
    is_teacher = ~is_flow & (draw["slice"] < config.flow_fraction + config.teacher_fraction)

    rungs = torch.tensor(config.self_grids, device=sample_ids.device)
    self_grid = rungs[(draw["rung"] * len(rungs)).long()]
    grid = torch.where(is_teacher, config.teacher_grid, self_grid)
    k = 2 * (draw["start"] * (grid // 2)).long()  # starts are aligned to pairs

    low, high = config.shift
    shift = low + (high - low) * draw["shift"]
    if config.dynamic_shift_fraction > 0:
        if image_tokens is None:
            raise ValueError("dynamic_shift_fraction > 0 needs image_tokens, the number of packed image tokens")
        config._refuse_collapsed_pairs(dynamic_shift(image_tokens))
        is_dynamic = draw["dynamic"] < config.dynamic_shift_fraction
        shift = torch.where(is_dynamic, dynamic_shift(image_tokens), shift)

    def sigma_at(index: Tensor) -> Tensor:
        return shift_sigma(1 - index.double() / grid, shift)

    flow_sigma = shift_sigma(draw["flow"], shift)
    start, mid, end = (torch.where(is_flow, flow_sigma, sigma_at(k + offset)) for offset in (0, 1, 2))
    student, near, far = _strengths(config, grid, is_teacher, is_flow)
    guidance_low, guidance_high = config.guidance
    return ShortcutPlan(
        sigma_start=start.clamp(max=config.sigma_max).float(),
        sigma_mid=mid.clamp(max=config.sigma_max).float(),
        sigma_end=end.clamp(max=config.sigma_max).float(),
        student_strength=student.float(),
        near_strength=near.float(),
        far_strength=far.float(),
        guidance=(guidance_low + (guidance_high - guidance_low) * draw["guidance"]).float(),
        shift=shift.float(),
        grid=torch.where(is_flow, 0, grid),
        is_teacher=is_teacher,
        is_flow=is_flow,
        sample_ids=sample_ids,
        has_flow=config.has_flow,
        has_pairs=config.has_pairs,
    )


def _strengths(config: PlanConfig, grid: Tensor, is_teacher: Tensor, is_flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Strengths of student, near and far pass, fp64 [B] each. The teacher is strength 0."""
    ones = torch.ones(grid.shape, dtype=torch.float64, device=grid.device)
    if config.step_gain is None:
        return ones, torch.where(is_teacher, 0.0, ones), ones
    # The student jumps two grid intervals, near and far one each. A flow-matching row has no length; it trains the
    # adapter where a many-step sampler uses it, one interval of the teacher's grid.
    interval = torch.where(is_flow, 0.5 / config.teacher_grid, 1 / grid.double())
    half = config.step_gain.strength(interval)
    return config.step_gain.strength(2 * interval), torch.where(is_teacher, 0.0, half), half


def sampling_strength(step_gain: StepGain | None, num_steps: int) -> float:
    """The adapter strength for an N-step sampler: g(1/N), or 1 without step-scaling."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return 1.0 if step_gain is None else float(step_gain.strength(torch.tensor(1 / num_steps, dtype=torch.float64)))
