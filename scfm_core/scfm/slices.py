"""The settings of single slices: flow-matching, flow-map and matching rows."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MODE_LIMIT = 2 / (math.pi - 2)
"""The mode density's largest scale: above it the sigma would no longer increase with the uniform draw."""


@dataclass(frozen=True, kw_only=True)
class FlowSigma:
    """Density of sigma on flow-matching rows, before the row's timestep shift (Esser et al., arXiv 2403.03206, Sec. 3.1)."""

    density: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """`logit_normal`: sigmoid of a normal variable, which draws the middle more often and the ends hardly ever; `mode`: more of the
    middle, but some of the ends; `uniform`: all alike."""
    location: float = 0.0
    """Mean of the normal variable (`logit_normal`): above 0 nearer to the noise, below 0 nearer to the data."""
    scale: float = 1.0
    """Standard deviation of the normal variable (`logit_normal`)."""
    mode_scale: float = 1.29
    """Scale s of the `mode` density, from -1 to 1.75: above 0 more of the middle, below 0 more of the ends, 0 is uniform."""

    def __post_init__(self) -> None:
        used = {"uniform": (), "logit_normal": ("location", "scale"), "mode": ("mode_scale",)}[self.density]
        for key in dataclasses.fields(self):
            if key.name not in ("density", *used) and getattr(self, key.name) != key.default:
                raise ValueError(
                    f"method.flow_sigma.{key.name} has no effect with method.flow_sigma.density={self.density}: remove it, or "
                    "choose the density that it belongs to"
                )
        if not math.isfinite(self.location):
            raise ValueError(f"method.flow_sigma.location must be finite, got {self.location}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"method.flow_sigma.scale must be positive and finite, got {self.scale}")
        if not -1 <= self.mode_scale <= MODE_LIMIT:
            raise ValueError(f"method.flow_sigma.mode_scale must be in [-1, {MODE_LIMIT:.4f}], got {self.mode_scale}")

    def quantile(self, p: Tensor) -> Tensor:
        """The density's inverse distribution function: `p` in (0, 1), fp64, to the sigma before the shift.

        The paper writes the mode density's as a decreasing function of a uniform draw u (Eq. 20); here it increases: u = 1 - p.
        """
        if self.density == "logit_normal":  # Eq. 19
            return torch.sigmoid(self.location + self.scale * torch.special.ndtri(p))
        if self.density == "mode":
            return p - self.mode_scale * ((math.pi / 2 * p).sin() ** 2 - p)
        return p


@dataclass(frozen=True, kw_only=True)
class FlowMap:
    """Flow-map rows: jumps of any length h, whose target needs the derivative of the student's velocity (`scfm/flow_map.py`)."""

    form: Literal["lagrangian", "eulerian"] = "lagrangian"
    """What the derivative follows. `lagrangian`: the end of the jump (Boffi et al., arXiv 2406.07507). `eulerian`: its start, along
    the teacher's velocity, as in MeanFlow (Geng et al., arXiv 2505.13447); it exists to be compared with."""
    difference: Literal["teacher_step", "central", "one_sided"] = "teacher_step"
    """How the derivative is computed. `teacher_step`: from h and the jump without its last `teacher_steps` of length `shortest`,
    which the teacher takes; exact for the teacher's sampler of 1 / `shortest` steps (with `eulerian` the teacher takes the first step).
    `central`: from the jumps of length (1 - epsilon) h and (1 + epsilon) h. `one_sided`: from (1 - epsilon) h and h itself. These two
    exist to be compared with."""
    epsilon: float = 0.1
    """Width of the `central` and `one_sided` differences as a share of h, to each side."""
    shortest: float = 1 / 32
    """h is drawn log-uniformly from here to 1, which is the whole way from noise to data. Also the length of a teacher's step."""
    teacher_steps: int = 1
    """The teacher's steps at the end of a Lagrangian jump, each of which costs a pass. More of them bring what is right at small h
    to larger h in fewer updates, and long jumps count less."""
    whole_fraction: float = 0.15
    """Share of these rows that jump the whole way, h = 1."""
    noise_fraction: float = 0.3
    """Share of these rows that start at pure noise; the others start anywhere that leaves room for h."""
    starts: Literal["own", "data"] = "own"
    """Where the others start. `own`: where one jump of the student from pure noise ends, without gradient; of the data only the
    captions are used. `data`: on noised data."""
    weight: float = 1.0
    """Factor of these rows' gradient beside other slices. At 1 it is about seven times that of a pair with the same error
    (`teacher_step`); on the digits that was better at 1 and 2 steps, and equal gradients at 8."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"method.flow_map.weight must be positive and finite, got {self.weight}")
        for name in ("whole_fraction", "noise_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"method.flow_map.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.difference == "teacher_step" and self.epsilon != type(self).epsilon:
            raise ValueError(
                "method.flow_map.epsilon has no effect with method.flow_map.difference=teacher_step, whose width is method.flow_map.shortest"
            )
        if not 0 < self.epsilon < 1:
            raise ValueError(f"method.flow_map.epsilon must be between 0 and 1, got {self.epsilon}")
        if not 1e-4 <= self.shortest <= 1:
            raise ValueError(f"method.flow_map.shortest must be in [0.0001, 1], got {self.shortest}")
        if not 1 <= self.teacher_steps <= 1 / self.shortest:
            raise ValueError(
                f"method.flow_map.teacher_steps must be in 1 to {1 / self.shortest:.0f} (1 / method.flow_map.shortest), got {self.teacher_steps}"
            )
        if self.teacher_steps > 1 and (self.form, self.difference) != ("lagrangian", "teacher_step"):
            raise ValueError(
                "method.flow_map.teacher_steps has no effect without method.flow_map.form=lagrangian and difference=teacher_step: remove it"
            )

    @property
    def has_own_starts(self) -> bool:
        """Whether any row starts where a jump of the student ends."""
        return self.starts == "own" and self.noise_fraction < 1 and self.whole_fraction < 1

    @property
    def passes(self) -> float:
        """Velocities for the target of one of these rows, without gradient."""
        own = (1 - self.whole_fraction) * (1 - self.noise_fraction) if self.has_own_starts else 0.0
        return own + (3 if self.difference == "central" else 1 + self.teacher_steps)

    @property
    def rows_of_a_call(self) -> int:
        """The most rows of a sample in one call of the network for the target."""
        if self.difference == "teacher_step":
            return 1
        return (2 if self.difference == "central" else 1) + (self.form == "lagrangian")


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Matching rows: jumps to the image, whose images follow the teacher's distribution (`scfm/matching.py`)."""

    weight: float = 0.3
    """Weight of these rows' gradient beside the other rows'; without others Adam does not see it. A half gives the loss of DMD2 (Yin et
    al., arXiv 2405.14867)."""
    whole_fraction: float = 0.25
    """Share of these rows that jump the whole way from pure noise, h = 1. The others start where one jump of the student from pure
    noise, of the length 1 - h, ends."""
    shortest: float = 1 / 8
    """h is drawn from here to 1: the last jump of a sampler of 1 / h steps."""
    guidance_share: float = 1.0
    """Share of the teacher's classifier-free guidance in its score, for models with two passes: 1 is the guided teacher, 0 the
    conditional one (guidance set apart, Liu et al., arXiv 2511.22677)."""
    fake_lr: float = 5.0
    """Learning rate of the fake score, as a multiple of `train.lr`. It has to follow the student."""
    every: int = 1
    """The student learns from matching rows only in each `every`-th step, the fake score in all of them (two time scales). Without rows
    that regress, the momentum of its optimizer moves the student between these steps too."""
    warmup: int = 0
    """In this number of first steps only the fake score learns from matching rows."""

    def __post_init__(self) -> None:
        for name in ("weight", "fake_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"method.matching.{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("whole_fraction", "guidance_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"method.matching.{name} must be in [0, 1], got {getattr(self, name)}")
        if not 1e-4 <= self.shortest <= 1:
            raise ValueError(f"method.matching.shortest must be in [0.0001, 1], got {self.shortest}")
        if self.every < 1:
            raise ValueError(f"method.matching.every must be at least 1, got {self.every}")
        if self.warmup < 0:
            raise ValueError(f"method.matching.warmup must be at least 0, got {self.warmup}")

    def passes(self, guided: int) -> float:
        """Velocities for the target of one of these rows, without gradient: of its start, the teacher and the fake score; on average over
        the steps after the warm-up. `guided`: see `PlanConfig.passes`."""
        real = guided if self.guidance_share > 0 else 1
        return guided * (1 - self.whole_fraction) + (real + 1) / self.every

    def teaches_student(self, step: int) -> bool:
        """Whether the student learns from matching rows in step `step`, counted from 0."""
        return step >= self.warmup and (step - self.warmup) % self.every == self.every - 1
