"""Matching rows in the training step: which networks and which guidance give their scores, and when the student learns."""

import functools

import torch
from torch import Tensor

from scfm_core.flow.path import per_sample
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.student import ShortcutModel
from scfm_core.scfm.matching import Images, fake_losses, matching_velocity, student_images
from scfm_core.scfm.meter import LossMeter
from scfm_core.scfm.plan import ShortcutPlan
from scfm_core.train.config import RunConfig


class MatchingStep:
    """The part of a micro-batch that matches the teacher's distribution: `begin`, `targets`, and after the student's backward `fake_loss`.

    Without matching rows its passes run on row 0, and nothing comes of them: every process enters the networks equally often, and
    computes gradients in the same order. Sharded weights need that, and so does ZeRO-2.

    Args:
        config: the run, with matching rows.
        model: with a fake score.
    """

    def __init__(self, config: RunConfig, model: ShortcutModel) -> None:
        self._settings, self._family = config.method.matching, model.family
        self._seed, self._batch = config.run.seed, config.train.global_batch_size
        self.real = functools.partial(model.velocity, "teacher")
        self.fake = functools.partial(model.velocity, "fake")
        self._images: tuple[Images, Conditioning] | None = None

    def begin(self, plan: ShortcutPlan, noised: Tensor, prediction: Tensor, cond: Conditioning) -> None:
        """Keep the student's images of a micro-batch, made from its pass with gradient.

        Args:
            plan, noised, prediction: see `student_images`.
            cond: of all rows. The fake score takes one pass, so it is guided only if guidance is an input of the network.
        """
        of_fake = cond.with_guidance(plan.guidance if self._family.passes == 1 else None)
        self._images = student_images(plan, noised, prediction), of_fake

    def targets(self, plan: ShortcutPlan, prediction: Tensor, known: Tensor | None, first_sample: int) -> Tensor:
        """`known` with the targets of matching rows, fp32 [B, ...]; no gradient.

        Args:
            plan, prediction, known: see `matching_velocity`.
            first_sample: number of any sample of the step. It gives the step, so that resuming and skipped steps need no counter.
        """
        if not self._settings.teaches_student(first_sample // self._batch):
            known = torch.zeros_like(prediction, dtype=torch.float32) if known is None else known
            return torch.where(per_sample(plan.is_matching, known), prediction.detach().to(known.dtype), known)
        assert self._images is not None, "begin comes first"
        images, cond = self._images
        guidance: Tensor | None = plan.guidance
        if self._family.passes == 2:
            share, neutral = self._settings.guidance_share, self._family.neutral_guidance
            guidance = neutral + share * (plan.guidance - neutral) if share > 0 else None
        real, fake = (self.real, cond.with_guidance(guidance)), (self.fake, cond)
        return matching_velocity(plan, images, prediction, real, fake, self._seed, known)

    def fake_loss(self, meter: LossMeter) -> Tensor:
        """The fake score's loss on the student's images: the sum over the matching rows divided by all rows, a scalar in fp32."""
        assert self._images is not None, "begin comes first"
        images, cond = self._images
        losses = fake_losses(images, (self.fake, cond), self._seed)
        if images.share > 0:
            meter.add_fake(losses)
        return losses.mean() * images.share
