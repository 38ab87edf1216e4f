"""Distribution matching: images of the student that the teacher's and the student's own scores cannot tell apart.

A regression onto the teacher's paths blurs at one or two steps: where a jump has several possible ends, its mean is none of them. A
matching row asks for an image of the teacher's distribution instead, whichever the noise (DMD2: Yin et al., arXiv 2405.14867).

The row jumps to the image y = x - sigma_start V. Noised to a level t, y gets two velocities: the teacher's, and that of the fake score,
a network that learns the distribution of the student's own images by plain flow matching. They give two clean images,
x0 = x_t - t v, and the student is pulled from the fake one to the real one:

    pull = (x0_real - x0_fake) / mean |y - x0_real|

With the target V - weight * sigma_start * pull, the gradient of the squared error in V is 2 * weight times that of DMD's loss
0.5 |y - (y + pull)|^2. It is 0 where both scores agree.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scfm_core.flow.path import euler_step, flow_velocity, noise_latents, per_sample
from scfm_core.flow.random import Stream, sample_noise
from scfm_core.flow.rows import put_rows, take_rows
from scfm_core.scfm.plan import ShortcutPlan
from scfm_core.scfm.target import Velocity

SMALLEST = 1e-3
"""The least mean of |y - x0_real| to divide by, in units of the latents, whose standard deviation is about 1."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """The student's images of the n matching rows of a micro-batch, without gradient; of row 0 if there is none."""

    rows: list[int]
    """Their numbers in the micro-batch."""
    share: float
    """n over the rows of the micro-batch; 0 if row 0 stands for none."""
    clean: Tensor
    """fp32 [n, ...]."""
    sample_ids: Tensor
    """int64 [n], as the tensors below [n]."""
    sigma_start: Tensor
    """Where the jumps began; they end at 0."""
    strength: Tensor
    """Of the adapter that made them, and of the fake score."""
    level: Tensor
    fake_level: Tensor


def student_images(plan: ShortcutPlan, noised: Tensor, prediction: Tensor) -> Images:
    """Where the jumps of matching rows end.

    Args:
        plan: gives the rows and their jumps.
        noised: x at `plan.sigma_start`, [B, ...].
        prediction: the student's velocity there, [B, ...]; its gradient is not used.
    """
    rows = plan.matching_rows or [0]
    names = ("sample_ids", "sigma_start", "level", "fake_level")
    of_rows = {name: take_rows(getattr(plan, name), rows) for name in names}
    clean = euler_step(take_rows(noised, rows), take_rows(prediction.detach(), rows), of_rows["sigma_start"])
    return Images(
        rows=rows,
        share=len(plan.matching_rows) / len(plan),
        clean=clean,
        strength=take_rows(plan.student_strength, rows),
        **of_rows,
    )


@torch.no_grad()
def matching_velocity(
    plan: ShortcutPlan,
    images: Images,
    prediction: Tensor,
    real: tuple[Velocity, Any],
    fake: tuple[Velocity, Any],
    seed: int,
    known: Tensor | None = None,
) -> Tensor:
    """The targets of matching rows; no gradient. Only these rows go through the networks.

    Args:
        plan: gives the settings.
        images: from `student_images`.
        prediction: the student's velocity, [B, ...].
        real: the teacher's velocity, and its conditioning of all rows, with guidance; `cond[rows]` must select rows.
        fake: the same of the fake score.
        seed: the run's seed.
        known: targets of other rows, [B, ...].

    Returns:
        `known` with the targets of matching rows, fp32 [B, ...]; rows of other slices are zero without `known`.
    """
    known = torch.zeros_like(prediction, dtype=torch.float32) if known is None else known
    clean, level = images.clean, images.level
    noise = sample_noise(clean, images.sample_ids, seed, Stream.SCORES)
    noised = noise_latents(clean, noise, level)

    def image(score: tuple[Velocity, Any], strength: Tensor) -> Tensor:
        velocity, cond = score
        return euler_step(noised, velocity(noised, level, cond[images.rows], strength), level)

    real_image = image(real, torch.zeros_like(images.strength))
    distance = (clean - real_image).abs().flatten(1).mean(1).clamp(min=SMALLEST)
    pull = (real_image - image(fake, images.strength)) / per_sample(distance, clean)
    weight = per_sample(plan.config.matching.weight * images.sigma_start, clean)
    target = take_rows(prediction, images.rows).to(clean.dtype) - weight * pull
    return put_rows(known, plan.matching_rows, target.to(known.dtype))


def fake_losses(images: Images, fake: tuple[Velocity, Any], seed: int) -> Tensor:
    """The fake score's losses: plain flow matching on the student's images, fp32 [n], with gradient.

    Args:
        images: from `student_images`.
        fake: the fake score's velocity, and its conditioning of all rows.
        seed: the run's seed.
    """
    velocity, cond = fake
    noise = sample_noise(images.clean, images.sample_ids, seed, Stream.FAKE)
    noised = noise_latents(images.clean, noise, images.fake_level)
    predicted = velocity(noised, images.fake_level, cond[images.rows], images.strength)
    return (predicted.to(noise.dtype) - flow_velocity(images.clean, noise)).square().flatten(1).mean(1)
