"""The settings of the method: slices, grids, ranges, and how the network is given the step size."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from scfm_core.flow.schedule import shift_sigma
from scfm_core.scfm.slices import FlowMap, FlowSigma, Matching


@dataclass(frozen=True, kw_only=True)
class StepGain:
    """Step-scaled adapters: a jump over the fraction `jump` of the grid has adapter strength `jump ** gamma`."""

    gamma: float = 0.5
    """Exponent. 0.5 is the value of the measurements on the digits, 1 is the first-order law; 0, which is not allowed, would be
    the paper."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 4:
            raise ValueError(f"step_gain.gamma must be in (0, 4], got {self.gamma}")

    def strength(self, jump: Tensor) -> Tensor:
        """Strength of jumps [B], each a fraction of the grid in u (1/N for one step of an N-step sampler)."""
        return jump**self.gamma


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How jumps are drawn (paper, Sec. 4 and App. B). The defaults are the paper's."""

    teacher_fraction: float = 0.4
    """Share of the batch whose near half is the frozen teacher, on neighbouring points of `teacher_grid`."""
    near: Literal["ema", "student"] = "ema"
    """Near half of the self rows. `ema`: the fast EMA (the paper). `student`: the student's own velocity, without gradient, which
    is computed anyway for the loss at the same point: one pass less on self rows. Not with `step_gain` or `step_embedding`: there
    a near pass jumps half as far as the student's pass, so it is another velocity."""
    flow_fraction: float = 0.0
    """Share of the batch with the plain flow-matching target (`distil_guidance` changes this target). The rows that remain
    after the teacher, flow-matching, trajectory, flow-map and matching rows are the self slice."""
    flow_sigma: FlowSigma = field(default_factory=FlowSigma)
    """Density of sigma on flow-matching rows."""
    trajectory_fraction: float = 0.0
    """Share of the batch that learns mean velocities on the teacher's paths. The paths are stored in data made with
    `scfm data generate --trajectories`, or computed during training (`trajectory_steps`)."""
    trajectory_steps: int | None = None
    """Compute the paths during training: this number of Euler steps of the teacher for each row, from its noise, at its
    shift and guidance. Of the data only the captions are used. none: stored paths, which are used many times."""
    trajectory_grids: tuple[int, ...] = (1, 2, 3, 4, 6, 12)
    """Step counts of the grids on these paths, drawn uniformly. Each divides the number of intervals of a stored path, or
    `trajectory_steps`."""
    flow_map_fraction: float = 0.0
    """Share of the batch that learns jumps of any length from the derivative of the student's own jumps. It needs `step_gain`, and
    neither stored paths nor averages."""
    flow_map: FlowMap = field(default_factory=FlowMap)
    """How flow-map rows are drawn and what their target is."""
    matching_fraction: float = 0.0
    """Share of the batch whose images match the teacher's distribution, a second stage of the training: see docs/method.md. It needs
    `step_gain`, and trains one more adapter, the fake score. The other rows regress."""
    matching: Matching = field(default_factory=Matching)
    """How matching rows are drawn and learned."""
    teacher_grid: int = 32
    """Step count of the teacher slice's grid."""
    self_grids: tuple[int, ...] = (16, 8, 4)
    """Step counts of the self slice's grids, drawn uniformly. The authors' code adds 2."""
    shift: tuple[float, float] = (2.5, 4.5)
    """Range of the timestep shift, drawn uniformly for each sample; equal ends fix it."""
    dynamic_shift_fraction: float = 0.0
    """Share of samples that use the shift of the model's own sampler instead, as `sample.shift: dynamic` does (the authors' code:
    0.1 for Flux)."""
    guidance: tuple[float, float] = (0.0, 8.0)
    """Range of the guidance, drawn uniformly for each sample and the same in all three passes: Flux's embedded guidance (the
    paper: 0 to 8), or the scale of classifier-free guidance as in diffusers' pipeline. For SD3.5 the paper has 3.5 to 5; in the
    authors' code the scale counts from the conditional velocity, so that this is 4.5 to 6 here."""
    distil_guidance: bool = False
    """Train the student to predict, in one pass, the teacher's velocity with classifier-free guidance (two passes) at the scale
    `guidance`. The target of flow-matching rows is the teacher's guided velocity in place of the data's; stored paths were
    already guided. This is a stage before the distillation to few steps: it allows no pairs."""
    step_gain: StepGain | None = None
    """Condition on the step size through the adapter's strength; none: strength 1 (the paper)."""
    step_embedding: bool = False
    """Condition on the step size through the network's input of embedded guidance, which then gets the fraction of the grid
    that the row jumps: the original shortcut models (Frans et al., arXiv 2410.12557), trained from scratch."""
    caption_dropout: float = 0.0
    """Share of samples that get an empty caption, so that the network learns the unconditional velocity of classifier-free
    guidance. Trajectory rows keep their captions."""
    sigma_max: float = 1 - 1e-5
    """Upper limit of sigma: the first point of a grid is clamped to it."""

    def __post_init__(self) -> None:
        slices = ("teacher", "flow", "trajectory", "flow_map", "matching")
        for name in (*(f"{part}_fraction" for part in slices), "dynamic_shift_fraction", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"method.{name} must be in [0, 1], got {getattr(self, name)}")
        shares = {f"{name}_fraction": getattr(self, f"{name}_fraction") for name in slices}
        if sum(shares.values()) > 1 + 1e-9:
            taken = {name: share for name, share in shares.items() if share > 0}
            raise ValueError(
                f"{' + '.join(f'method.{name}' for name in taken)} must be at most 1, got "
                f"{' + '.join(str(share) for share in taken.values())}"
            )
        if not self.trajectory_grids or any(n < 1 for n in self.trajectory_grids):
            raise ValueError(f"method.trajectory_grids needs step counts of at least 1, got {self.trajectory_grids}")
        self._check_trajectory_steps()
        self._check_flow_map()
        self._check_matching()
        if self.flow_sigma.density != "uniform" and not self.has_flow:
            raise ValueError(
                f"method.flow_sigma.density={self.flow_sigma.density} has no effect without flow-matching rows: set "
                "method.flow_fraction, or method.flow_sigma.density=uniform"
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
        if self.step_embedding and self.step_gain is not None:
            raise ValueError(
                "method.step_embedding and method.step_gain both condition on the step size: use only one of them"
            )
        if self.step_embedding and self.teacher_fraction > 0:
            raise ValueError(
                "method.step_embedding is for training from scratch: a teacher has no input for step sizes. Set "
                "method.teacher_fraction to 0"
            )
        if self.distil_guidance:
            self._check_guidance_distillation()
        if self.near == "student":
            self._check_near_student()
        if not 0.9 < self.sigma_max <= 1:
            raise ValueError(f"method.sigma_max must be in (0.9, 1], got {self.sigma_max}")
        self.check_pairs_at(self.shift[1])

    def _check_trajectory_steps(self) -> None:
        steps = self.trajectory_steps
        if steps is None:
            return
        if not self.has_trajectory:
            raise ValueError(
                f"method.trajectory_steps={steps} has no effect without trajectory rows: set method.trajectory_fraction, or "
                "method.trajectory_steps=none"
            )
        if steps < 1 or any(steps % grid for grid in self.trajectory_grids):
            raise ValueError(
                f"method.trajectory_steps={steps} must be a common multiple of method.trajectory_grids="
                f"{list(self.trajectory_grids)}, e.g. {math.lcm(*self.trajectory_grids)}"
            )
        if self.step_embedding:
            raise ValueError(
                "method.step_embedding is for training from scratch: there is no teacher for method.trajectory_steps"
            )

    def _check_flow_map(self) -> None:
        if self.has_flow_map and self.step_gain is None:
            raise ValueError(
                "method.flow_map_fraction needs method.step_gain: the length of a jump reaches the network through the adapter's "
                "strength alone, and the target is its derivative. Set method.step_gain.gamma=0.5, or method.flow_map_fraction=0"
            )
        if not self.has_flow_map and self.flow_map != FlowMap():
            raise ValueError(
                "method.flow_map has no effect without flow-map rows: set method.flow_map_fraction, or remove method.flow_map"
            )
        if self.flow_map_fraction == 1 and self.flow_map.weight != 1:
            raise ValueError(
                "method.flow_map.weight has no effect with method.flow_map_fraction=1, since Adam does not see the size of a loss: remove it"
            )

    def _check_matching(self) -> None:
        if self.has_matching and self.step_gain is None:
            raise ValueError(
                "method.matching_fraction needs method.step_gain: a jump to the image has any length, which reaches the network through "
                "the adapter's strength alone. Set method.step_gain.gamma=0.5, or method.matching_fraction=0"
            )
        if not self.has_matching and self.matching != Matching():
            raise ValueError(
                "method.matching has no effect without matching rows: set method.matching_fraction, or remove method.matching"
            )

    def _check_near_student(self) -> None:
        for name in ("step_gain", "step_embedding"):
            if getattr(self, name):
                raise ValueError(
                    f"method.near=student takes the student's velocity as the near pass, but with method.{name} a near pass jumps "
                    f"half as far as the student, and needs a pass of its own. Set method.near=ema"
                )
        if not self.has_self:
            raise ValueError("method.near=student has no effect: there are no self rows. Set method.near=ema")

    def _check_guidance_distillation(self) -> None:
        if self.has_pairs or self.has_flow_map or self.has_matching:
            raise ValueError(
                "method.distil_guidance together with pairs, flow-map or matching rows would learn guidance and shortcuts at once, which over-saturates images. "
                "Set method.teacher_fraction=0 and method.flow_fraction=1 (or trajectory_fraction=1); export the result with "
                "--merged, and distil that model to few steps"
            )
        if self.step_gain is not None:
            raise ValueError(
                "method.distil_guidance and method.step_gain are two stages: at strength 0 there would be no guidance. Set "
                "step_gain to none here, and use it in the next run, which distils the result of this one to few steps"
            )
        low, high = self.guidance
        if not 0 < low == high:
            raise ValueError(
                f"method.distil_guidance teaches one scale, because the network has no input for the scale: give method.guidance "
                f"equal ends, e.g. [4.5, 4.5], got {[low, high]}"
            )

    def check_pairs_at(self, shift: float) -> None:
        """ValueError if `sigma_max` also clamps the second point of the finest grid: a pair would then have no length."""
        shortest = min(1 / grid for grid in (self.teacher_grid, *self.self_grids))
        if self.has_flow_map:
            shortest = min(shortest, self.flow_map.shortest)
        second = float(shift_sigma(torch.tensor(1 - shortest, dtype=torch.float64), shift))
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
    def has_trajectory(self) -> bool:
        """Whether any row can be a trajectory row."""
        return self.trajectory_fraction > 0

    @property
    def has_flow_map(self) -> bool:
        """Whether any row can be a flow-map row."""
        return self.flow_map_fraction > 0

    @property
    def has_matching(self) -> bool:
        """Whether any row can be a matching row; then there is a fake score."""
        return self.matching_fraction > 0

    @property
    def has_known(self) -> bool:
        """Whether any row can have a target that needs no near or far pass."""
        return self.has_flow or self.has_trajectory or self.has_flow_map or self.has_matching

    @property
    def has_own_starts(self) -> bool:
        """Whether any row starts where a jump of the student from pure noise ends."""
        own = self.has_flow_map and self.flow_map.has_own_starts
        return own or (self.has_matching and self.matching.whole_fraction < 1)

    @property
    def is_student_first(self) -> bool:
        """Whether a target is computed from the student's velocity: then its pass comes before those of the target."""
        return self.near == "student" or self.has_flow_map or self.has_matching

    @property
    def has_stored_paths(self) -> bool:
        """Whether the data must contain paths."""
        return self.has_trajectory and self.trajectory_steps is None

    @property
    def has_pairs(self) -> bool:
        """Whether any row can be a pair; without pairs no near or far pass is needed."""
        return self._pairs > 1e-9

    @property
    def _pairs(self) -> float:
        """Share of the batch that are pairs."""
        return 1 - self.flow_fraction - self.trajectory_fraction - self.flow_map_fraction - self.matching_fraction

    @property
    def has_self(self) -> bool:
        """Whether any row can be of the self slice."""
        return self._pairs - self.teacher_fraction > 1e-9

    @property
    def has_teacher(self) -> bool:
        """Whether any target needs a pass of the frozen teacher."""
        takes_path = self.trajectory_steps is not None
        known = takes_path or self.has_flow_map or self.has_matching or (self.distil_guidance and self.has_flow)
        return self.teacher_fraction > 0 or known

    @property
    def follows_teacher(self) -> bool:
        """Whether the student imitates a frozen network, through passes or stored paths; results can be compared with it."""
        return self.has_teacher or self.has_trajectory

    @property
    def student_is_guided(self) -> bool:
        """Whether the student uses classifier-free guidance too, if its teacher does."""
        jumps = self.has_pairs or self.has_trajectory or self.has_flow_map or self.has_matching
        return not self.distil_guidance and jumps

    def strength(self, length: Tensor) -> Tensor:
        """Strengths of jumps of any length [B], in u; only with `step_gain`."""
        assert self.step_gain is not None, "PlanConfig checks it"
        return self.step_gain.strength(length)

    def passes(self, guided: int) -> tuple[float, float]:
        """Passes of the network for one sample: those of the student, with gradient, and those for the target. The fake score's own
        pass with gradient, of a share `matching_fraction` of the samples, is not among them.

        Args:
            guided: passes for a guided velocity: 2 with classifier-free guidance, else 1.
        """
        velocity = guided if self.student_is_guided else 1
        near = self.teacher_fraction if self.near == "student" else self._pairs
        known = self.trajectory_fraction * (self.trajectory_steps or 0) + self.flow_map_fraction * self.flow_map.passes
        matched = self.matching_fraction * self.matching.passes(guided)
        # The teacher computes its guided velocity for the whole batch, not only for the flow-matching rows.
        distilled = guided if self.distil_guidance and self.has_flow else 0
        return velocity, velocity * (near + self._pairs) + guided * known + matched + distilled


def sampling_strength(step_gain: StepGain | None, num_steps: int) -> float:
    """The adapter strength for an N-step sampler: g(1/N), or 1 without step-scaling."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return 1.0 if step_gain is None else float(step_gain.strength(torch.tensor(1 / num_steps, dtype=torch.float64)))
