"""The method: from a micro-batch to its loss."""

import functools

import torch
from torch import Tensor

from scfm_core.data.schema import Batch
from scfm_core.flow.path import flow_velocity, noise_latents, per_sample
from scfm_core.flow.random import sample_noise
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.graphs import GraphedVelocity
from scfm_core.models.student import ShortcutModel
from scfm_core.scfm.flow_map import flow_map_velocity
from scfm_core.scfm.loss import scfm_loss
from scfm_core.scfm.meter import LossMeter
from scfm_core.scfm.plan import ShortcutPlan, sample_plan
from scfm_core.scfm.starts import own_starts
from scfm_core.scfm.target import scfm_target
from scfm_core.scfm.trajectory import Trajectory, on_trajectories, take_paths
from scfm_core.train.config import RunConfig
from scfm_core.train.inputs import BatchEncoder, check_intervals
from scfm_core.train.matching_step import MatchingStep


class Objective:
    """The loss that a run minimises.

    Args:
        config: the run.
        model: student, EMAs and teacher.
        encoder: encodes the batches.
        is_sharded: the weights are gathered for each pass. Then every process runs the same passes, also without a row for
            them. Otherwise the passes without gradient run in inference mode: weights gathered in it could not be used by a
            pass with gradient.
    """

    def __init__(self, config: RunConfig, model: ShortcutModel, encoder: BatchEncoder, *, is_sharded: bool) -> None:
        self.model, self.encoder = model, encoder
        self._method, self._seed = config.method, config.run.seed
        self._is_sharded, self._in_inference_mode = is_sharded, not is_sharded
        self._near, self._far = model.near_velocity, model.far_velocity
        self._student = functools.partial(model.velocity, "student")  # without gradient, at any strength
        self._teacher = functools.partial(model.velocity, "teacher")
        self.matching = MatchingStep(config, model) if config.method.has_matching else None
        if config.method.near == "student":
            self._near = model.teacher_velocity
        if config.kernels.cuda_graphs:
            self._near = GraphedVelocity(self._near)
            self._far = GraphedVelocity(self._far, shared=self._near)

    def micro_step(self, batch: Batch, meter: LossMeter) -> Tensor:
        """Loss of one micro-batch.

        Args:
            batch: its samples.
            meter: accumulates the losses by slice and by sigma.

        Returns:
            the mean loss, a scalar in fp32, ready for the backward pass.
        """
        method, device = self._method, self.encoder.device
        if device.type == "cuda":
            batch = batch.pinned()
        latents, cond = self.encoder.encode(batch)
        family = self.model.family
        dynamic_shift = functools.partial(family.shift, family.image_tokens(latents))
        plan = sample_plan(method, batch.sample_ids, self._seed, dynamic_shift=dynamic_shift)
        dropped = plan.is_dropped.nonzero()[:, 0].tolist()
        plan = plan.to(device, with_strengths=not self.model.reads_strengths)
        noise = sample_noise(latents, plan.sample_ids, self._seed)
        noised = noise_latents(latents, noise, plan.sigma_start)
        velocity = flow_velocity(latents, noise) if method.has_flow else None  # of the rows with a known target
        if method.has_trajectory:
            paths, ends = self._paths(batch, plan, latents, noise, cond)
            plan, noised, velocity = on_trajectories(plan, paths, ends, noised, velocity)
        if method.caption_dropout > 0:
            assert family.unconditional is not None
            cond = cond.without_captions(dropped, family.unconditional)
        student_guidance, target_guidance = self._embedded_guidance(plan)
        if method.has_own_starts:
            noised = self._own_starts(plan, noised, noise, cond.with_guidance(target_guidance))
        inputs = noised, plan.sigma_start, cond.with_guidance(student_guidance), plan.student_strength
        # First if a target is computed from it; else last, so that its activations are not in memory during the target's passes.
        prediction = self.model.student_velocity(*inputs) if method.is_student_first else None
        if self.matching is not None and prediction is not None:
            self.matching.begin(plan, noised, prediction, cond)
        with torch.inference_mode(self._in_inference_mode):
            if method.distil_guidance and method.has_flow:
                assert velocity is not None
                velocity = self._guided(plan, noised, cond, velocity)
            cond = cond.with_guidance(target_guidance)
            if method.has_flow_map:
                assert prediction is not None
                velocity = flow_map_velocity(
                    plan, noised, cond, prediction, self._student, velocity, is_sharded=self._is_sharded
                )
            if self.matching is not None and prediction is not None:
                velocity = self.matching.targets(plan, prediction, velocity, int(batch.sample_ids[0]))
            target = scfm_target(
                plan, noised, cond, self._near, self._far, flow_velocity=velocity,
                student=prediction if method.near == "student" else None, is_sharded=self._is_sharded,
            )  # fmt: skip
        if self._in_inference_mode:
            target = target.clone()  # an ordinary tensor, which autograd may save for the backward pass
        if prediction is None:
            prediction = self.model.student_velocity(*inputs)
        meter.add(prediction, target, plan)
        return scfm_loss(prediction, target, plan)

    def fake_step(self, meter: LossMeter) -> Tensor:
        """Loss of the fake score on the student's images of the last micro-batch, after its backward pass; see `MatchingStep.fake_loss`."""
        assert self.matching is not None
        return self.matching.fake_loss(meter)

    def _embedded_guidance(self, plan: ShortcutPlan) -> tuple[Tensor | None, Tensor | None]:
        """Guidance for the student's pass and for the target's passes, fp32 [B]; None: no guidance."""
        if self._method.step_embedding:
            return plan.step_size, plan.step_size / 2
        if self.model.family.passes == 1:
            return plan.guidance, plan.guidance
        if not self._method.student_is_guided:
            return None, None
        guidance = torch.where(
            plan.is_flow, self.model.family.neutral_guidance, plan.guidance
        )  # the data's own velocity is not guided
        return guidance, guidance

    def _paths(
        self, batch: Batch, plan: ShortcutPlan, latents: Tensor, noise: Tensor, cond: Conditioning
    ) -> tuple[Trajectory, Tensor]:
        """The teacher's paths of a micro-batch, stored or computed now, and their ends [B, C, H, W]."""
        num_steps = self._method.trajectory_steps
        if num_steps is None:
            assert batch.path is not None
            check_intervals(self._method, batch.path["velocities"].shape[1])
            return Trajectory(**batch.path).to(latents.device), latents
        with torch.inference_mode(self._in_inference_mode):
            cond = cond.with_guidance(plan.guidance)
            return take_paths(plan, latents, noise, cond, self._teacher, num_steps, is_sharded=self._is_sharded)

    def _own_starts(self, plan: ShortcutPlan, noised: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
        """x at the start of all rows, with flow-map and matching rows where the student's own jumps end, fp32 [B, C, H, W]."""
        with torch.inference_mode(self._in_inference_mode):
            noised = own_starts(plan, noised, noise, cond, self._student, is_sharded=self._is_sharded)
        return noised.clone() if self._in_inference_mode else noised  # autograd may save an ordinary tensor alone

    @torch.no_grad()
    def _guided(self, plan: ShortcutPlan, noised: Tensor, cond: Conditioning, velocity: Tensor) -> Tensor:
        """`velocity`, with the teacher's guided velocity on flow-matching rows. All rows run through the teacher on every rank."""
        cond = cond.with_guidance(plan.guidance)
        guided = self._teacher(noised, plan.sigma_start, cond, plan.student_strength).to(noised.dtype)
        return torch.where(per_sample(plan.is_flow, guided), guided, velocity)
