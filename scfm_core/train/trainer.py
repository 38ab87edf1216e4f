"""The step and the loop."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm_core.data.corpus import Corpus
from scfm_core.data.loader import batches
from scfm_core.data.schema import Batch
from scfm_core.distributed.watchdog import Watchdog
from scfm_core.distributed.world import World
from scfm_core.errors import UserError
from scfm_core.flow.path import flow_velocity, noise_latents, per_sample
from scfm_core.flow.random import sample_noise
from scfm_core.models.graphs import GraphedVelocity
from scfm_core.models.protocol import Conditioning
from scfm_core.models.weights import network_fingerprint
from scfm_core.scfm.ema import DualEMA
from scfm_core.scfm.loss import LossMeter, scfm_loss
from scfm_core.scfm.plan import ShortcutPlan, sample_plan
from scfm_core.scfm.restart import restart_due
from scfm_core.scfm.target import scfm_target
from scfm_core.scfm.trajectory import Trajectory, on_trajectories, take_paths
from scfm_core.train.build import (
    BatchEncoder,
    build_engine,
    build_family,
    build_layout,
    build_model,
    check_paths,
    micro_batches,
    refuse_other_intervals,
    resolve_device,
    validation_prompts,
)
from scfm_core.train.checkpoint import Checkpoint, CheckpointWriter, load_checkpoint, newest_complete, verify_checkpoint
from scfm_core.train.config import RunConfig, TrainConfig
from scfm_core.train.guard import Guard
from scfm_core.train.kernels import Kernels, choose_kernels
from scfm_core.train.metrics import RunLog
from scfm_core.train.parse import parse_config, to_plain, without_gone_keys
from scfm_core.train.resume import refuse_other_recipe
from scfm_core.train.stop import SIGNALS, StopRequest
from scfm_core.train.validate import Validation


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimizer step `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class Progress:
    """What a run has done."""

    step: int = 0
    """Steps, skipped ones included."""
    updates: int = 0
    """Steps that were applied: the optimizer's own count."""
    samples: int = 0
    """Samples consumed: the data cursor, and the next global sample index."""
    data_start: int = 0
    """Samples consumed before the present data recipe began; its own stream starts there."""
    bad_samples: int = 0
    """How many of the samples could not be used and were replaced."""
    seconds: float = 0.0
    """Time spent in steps, over all starts."""
    rollbacks: int = 0
    """How often the run went back to an earlier checkpoint on its own."""


_FEW_SAMPLES = 1000
"""Of fewer, as many may be unusable as of these: a share says little of a handful."""


class SkippedTooOften(RuntimeError):
    """More steps in a row were skipped than `train.max_skips`; raised on every rank."""


class Trainer:
    """One run: its model, data, engine, EMAs and where they stand.

    Args:
        config: the run.
        resume: the checkpoint to go on from, if any; already verified.
        world: the processes; each of them has a trainer.
        data_may_change: go on with other data than the checkpoint's; their order begins at its start.

    Raises:
        UserError: on every rank, if model, data, prompts, engine or checkpoint do not fit the configuration.
    """

    def __init__(
        self,
        config: RunConfig,
        resume: Path | None = None,
        world: World | None = None,
        *,
        data_may_change: bool = False,
    ) -> None:
        self.config = config
        self.world = world or World()
        self.run_dir = Path(config.run.dir)
        self.device = resolve_device(config.run.device)
        self.stop = StopRequest()
        self.stopping: int | None = None
        """The signal by which any rank was asked to stop, the same on every rank at the same step."""
        self.data_error: UserError | None = None
        """Why the next step has no data, or may not go on with it; the same on every rank at the same step."""
        with self.world.together():
            self.family = build_family(config)
            kernels = choose_kernels(config, self.family, self.device)
        self.kernels: Kernels = self.world.from_main(kernels)  # times differ a little from GPU to GPU
        with self.world.together():
            self._build()
        self.progress = Progress()
        self.guard = Guard(config.train.spike_factor, config.train.max_skips)
        self.emas = DualEMA(
            *(self.engine.ema_tensors(role) for role in ("student", "ema_fast", "ema_slow")), config=config.ema
        )
        self.engine.after_ema_update()
        self.writer = CheckpointWriter(
            self.run_dir, config.checkpoint.keep, self.world, on_thread=config.checkpoint.asynchronous
        )
        self.data_change: dict[str, Any] | None = None
        """What changed in the data since the checkpoint, for the log."""
        if resume is not None:
            with self.world.together():
                self._restore(load_checkpoint(resume, verify=False), data_may_change)
        self.validation = Validation(self, self._prompts) if self._prompts else None

    def _build(self) -> None:
        config = self.config
        self._prompts = validation_prompts(config)
        accumulation = micro_batches(config.train, self.world)
        self.corpus = Corpus(config.data, with_paths=config.method.has_stored_paths)
        self.corpus.order(config.train.global_batch_size, config.run.seed)  # refuses partitions that do not divide it
        if config.method.has_stored_paths:
            check_paths(config, self.family, self.corpus)
        self.encoder = BatchEncoder(config, self.family, self.corpus, self.device, self._prompts)
        layout = build_layout(config, self.world, self.device, accumulation)
        # What a sharded network gathers in such a pass could not be used by one with gradient.
        self._in_inference_mode = not layout.is_sharded
        self.model = build_model(config, self.family, self.device, kernels=self.kernels, layout=layout)
        self.engine = build_engine(config, self.model, layout, self.world, accumulation)
        self._near, self._far = self.model.near_velocity, self.model.far_velocity
        if config.kernels.cuda_graphs:
            self._near, self._far = GraphedVelocity(self._near), GraphedVelocity(self._far)

    def micro_step(self, batch: Batch, meter: LossMeter) -> Tensor:
        """Forward of one micro-batch: its loss, ready for the backward."""
        config, model = self.config, self.model
        if self.device.type == "cuda":
            batch = batch.pinned()
        latents, cond = self.encoder.encode(batch)
        tokens = self.family.image_tokens(latents)
        plan = sample_plan(config.method, batch.sample_ids, config.run.seed, image_tokens=tokens).to(self.device)
        noise = sample_noise(latents, batch.sample_ids, config.run.seed)
        noised = noise_latents(latents, noise, plan.sigma_start)
        velocity = flow_velocity(latents, noise) if plan.has_flow else None
        if plan.has_trajectory:
            paths, ends = self._paths(batch, plan, latents, noise, cond)
            plan, noised, velocity = on_trajectories(plan, paths, ends, noised, velocity)
        if plan.is_dropped is not None:
            assert self.family.unconditional is not None
            cond = cond.without_captions(plan.is_dropped, self.family.unconditional)
        told, told_target = self._scalars(plan)
        target_cond = cond.with_guidance(told_target)
        with torch.inference_mode(self._in_inference_mode):
            if config.method.distil_guidance and plan.has_flow:
                velocity = self._guided(plan, noised, cond, velocity)
            target = scfm_target(plan, noised, target_cond, self._near, self._far, flow_velocity=velocity)
        if self._in_inference_mode:
            target = target.clone()  # an ordinary tensor, which the loss may keep for its backward
        cond = cond.with_guidance(told)
        prediction = model.student_velocity(noised, plan.sigma_start, cond, plan.student_strength)
        meter.add(prediction, target, plan)
        return scfm_loss(prediction, target, plan)

    def _paths(
        self, batch: Batch, plan: ShortcutPlan, latents: Tensor, noise: Tensor, cond: Conditioning
    ) -> tuple[Trajectory, Tensor]:
        """The teacher's paths of a micro-batch, and their ends."""
        num_steps = self.config.method.trajectory_steps
        if num_steps is None:
            assert batch.path is not None
            refuse_other_intervals(self.config.method, batch.path["velocities"].shape[1])
            return Trajectory(**batch.path).to(self.device), latents
        teacher = functools.partial(self.model.velocity, "teacher")
        with torch.inference_mode(self._in_inference_mode):
            return take_paths(plan, latents, noise, cond.with_guidance(plan.guidance), teacher, num_steps)

    def _scalars(self, plan: ShortcutPlan) -> tuple[Tensor | None, Tensor | None]:
        """What the network's guidance is told in the student's pass, and in those of the target."""
        if plan.step_size is not None:
            return plan.step_size, plan.step_size / 2
        guidance = plan.guidance
        if guidance is not None and self.family.passes == 2:
            # The data's own velocity is not guided.
            guidance = torch.where(plan.is_flow, 1.0, guidance) if self.config.method.student_is_guided else None
        return guidance, guidance

    @torch.no_grad()
    def _guided(self, plan: ShortcutPlan, noised: Tensor, cond: Conditioning, velocity: Tensor | None) -> Tensor:
        """The teacher's guided velocity, on stored paths `velocity`; all rows go through, on every rank."""
        cond = cond.with_guidance(plan.guidance)
        guided = self.model.velocity("teacher", noised, plan.sigma_start, cond, plan.student_strength).to(noised.dtype)
        assert velocity is not None
        return torch.where(per_sample(plan.is_flow, guided), guided, velocity)

    def train_steps(self) -> Iterator[dict[str, Any]]:
        """Run to `train.steps`, yielding each step's row of metrics once the step is done, on every rank the same.

        A step's data are taken before the step before it ends, so that all ranks learn of missing data together, where
        nothing is half done.

        Raises:
            SkippedTooOften: after more skipped steps in a row than are borne.
            UserError: on every rank, if any has no data, or too many samples were unusable.
        """
        train, world, progress = self.config.train, self.world, self.progress
        left = train.steps - progress.step
        stream = batches(
            self.corpus,
            seed=self.config.run.seed,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            start=progress.samples - progress.data_start,
            stop=progress.samples - progress.data_start + left * train.global_batch_size,
            rank=world.rank,
            world_size=world.size,
            sample_offset=progress.data_start,
        )
        with contextlib.closing(stream):
            with world.together():
                upcoming = self._take(stream, left)
                if isinstance(upcoming, UserError):
                    raise upcoming
            for number in range(left):
                assert not isinstance(upcoming, UserError)
                began, data = time.perf_counter(), upcoming
                meter = self._backward(data)
                waited = time.perf_counter()
                upcoming = self._take(stream, left - number - 1)
                waited = time.perf_counter() - waited
                yield self._finish_step(meter, data, upcoming, began) | {"data_seconds": round(waited, 4)}
                if self.data_error is not None:
                    raise self.data_error
                if self.guard.exhausted:
                    raise SkippedTooOften

    def _backward(self, data: list[Batch]) -> LossMeter:
        """Gradients of a step's micro-batches."""
        meter = LossMeter(self.device)
        for batch in data:
            self.engine.backward(self.engine.forward(lambda batch=batch: self.micro_step(batch, meter)))  # type: ignore[misc]
        return meter

    def _take(self, stream: Iterator[Batch], steps_left: int) -> list[Batch] | UserError:
        """The micro-batches of the next step, or why there are none."""
        if not steps_left:
            return []
        try:
            return [next(stream) for _ in range(micro_batches(self.config.train, self.world))]
        except UserError as error:
            return error

    def _finish_step(
        self, meter: LossMeter, data: list[Batch], upcoming: list[Batch] | UserError, began: float
    ) -> dict[str, Any]:
        """From the gradients to the next step: what is shared, decided and applied, and the row that says so."""
        train, progress = self.config.train, self.progress
        grad_norm = self.engine.reduce()
        bad = self._share(meter, data, upcoming)
        losses = meter.compute()
        lr = learning_rate(train, progress.step)
        first_sample = progress.samples
        progress.step += 1
        progress.samples += train.global_batch_size
        skipped = self.guard.judge(progress.step, losses["loss"], grad_norm)
        averages: dict[str, Any] = {}
        if skipped is None:
            self.engine.step(lr)
            progress.updates += 1
            averages = self._update_averages()
        else:
            self.engine.skip()
        seconds = time.perf_counter() - began
        progress.seconds += seconds
        row: dict[str, Any] = {
            "step": progress.step,
            **losses,
            "grad_norm": grad_norm,
            "lr": lr,
            "samples": progress.samples,
            "seconds": round(progress.seconds, 4),
            "samples_per_second": round(train.global_batch_size / seconds, 3),
            **averages,
        }
        if skipped is not None:
            ids = list(range(first_sample, progress.samples))
            row |= {"skipped": skipped, "sample_ids": ids, "suspects": self._suspects(meter)}
        if bad:
            row["bad_samples"] = bad
            self._judge_data()
        return row

    def _update_averages(self) -> dict[str, Any]:
        """Both EMAs, and a restart where one is due: what the step's row says of it."""
        self.emas.update()
        due, ratio = restart_due(self.emas, self.progress.step, self.world.sum_)
        if due:
            self.emas.restart()
        self.engine.after_ema_update()
        return ({} if ratio is None else {"ema_lag_ratio": ratio}) | ({"ema_restart": True} if due else {})

    def _share(self, meter: LossMeter, data: list[Batch], upcoming: list[Batch] | UserError) -> list[str]:
        """Losses of all ranks, whether any was asked to stop, and how their data are: one all-reduce of some 300 bytes.

        Returns:
            the samples of this step that could not be used, of all ranks.
        """
        bad = [reason for batch in data for reason in batch.bad]
        news = [*(self.stop.signal == number for number in SIGNALS), len(bad), isinstance(upcoming, UserError)]
        told = torch.tensor(news, dtype=meter.sums.dtype, device=meter.sums.device)
        shared = self.world.sum_(torch.cat([meter.sums.flatten(), told]))
        meter.sums = shared[: -len(news)].view_as(meter.sums)
        *asked, bad_samples, failed = shared[-len(news) :].tolist()
        self.stopping = next((number for number, count in zip(SIGNALS, asked, strict=True) if count), None)
        if failed:
            try:
                self.world.agree(upcoming if isinstance(upcoming, UserError) else None)
            except UserError as error:
                self.data_error = error
        if bad_samples:
            bad = [reason for rank in self.world.gather(bad) for reason in rank]
            self.progress.bad_samples += len(bad)
        return bad

    def _judge_data(self) -> None:
        """More unusable samples than the recipe bears end the run."""
        most, progress = self.config.data.max_bad_fraction, self.progress
        if self.data_error is None and progress.bad_samples > most * max(progress.samples, _FEW_SAMPLES):
            self.data_error = self._everywhere(
                f"data: {progress.bad_samples} of {progress.samples} samples could not be used, more than "
                f"data.max_bad_fraction={most} bears; {self.run_dir / 'incidents.jsonl'} names them. Look at the data with "
                f"`scfm data validate`, or raise the limit"
            )

    def _suspects(self, meter: LossMeter) -> list[int]:
        """The samples of a skipped step to look at first: those without a finite loss, else the largest losses."""
        rows = sorted((row for rank in self.world.gather(meter.by_sample()) for row in rank), key=lambda row: row[0])
        bad = [sample for sample, loss in rows if not math.isfinite(loss)]
        return bad or [sample for sample, _ in sorted(rows, key=lambda row: -row[1])[:4]]

    def save(self) -> Path:
        """Write a checkpoint of the present step; every rank calls it."""
        return self.writer.save(self.progress.step, self._write, self._state())

    def _write(self, folder: Path, world: World) -> Any:
        return self.engine.save(folder, world, on_thread=self.config.checkpoint.asynchronous)

    def _state(self) -> dict[str, Any]:
        engine = self.config.engine
        return {
            **dataclasses.asdict(self.progress),
            "guard": self.guard.state_dict(),
            "kind": self.engine.checkpoint_kind,
            "engine": f"ZeRO-{engine.zero_stage}" if engine.name == "deepspeed" else "fsdp2",
            "world_size": self.world.size,
            "shapes": {name: list(shape) for name, shape in self.model.shapes().items()},
            "data_fingerprint": self.corpus.fingerprint,
            "base_fingerprint": network_fingerprint(self.family.folder),
            "config": to_plain(self.config),
        }

    def _restore(self, checkpoint: Checkpoint, data_may_change: bool) -> None:
        state = checkpoint.state
        # What an earlier version did not know yet has its default.
        saved = to_plain(parse_config(without_gone_keys(state["config"]), str(checkpoint.path)))
        changes = refuse_other_recipe(
            saved,
            to_plain(self.config),
            checkpoint.path,
            data_may_change=data_may_change,
            quiet=not self.world.is_main,
        )
        if state["base_fingerprint"] != network_fingerprint(self.family.folder):
            raise UserError(
                f"checkpoint {checkpoint.path} was trained on another model than model.path={self.config.model.path} "
                f"holds now. Resume with the same one, or start over with --resume never"
            )
        before, now = state["data_fingerprint"], self.corpus.fingerprint
        if before != now:
            if not data_may_change:
                raise UserError(
                    f"checkpoint {checkpoint.path} was trained on other data than the recipe's shards hold now "
                    f"(fingerprint {before[:12]} and {now[:12]}). Resume with the same data; or go on with these, from "
                    f"their start, with --allow-data-change; or start over with --resume never"
                )
            changes.append(f"content: fingerprint {before[:12]} there, {now[:12]} now")
        self._load(checkpoint)
        if changes:
            self.progress.data_start = self.progress.samples
            self.data_change = {
                "event": "data_changed",
                "step": self.progress.step,
                "samples": self.progress.samples,
                "changes": changes,
            }

    def _load(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self.progress = Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
        self.guard.load_state_dict(state["guard"])
        checkpoint.reader.fill(self.engine.slots())
        self.engine.restored(self.progress.updates)

    def roll_back(self) -> dict[str, Any]:
        """Weights, optimizer and EMAs as before the row of skipped steps; the data goes on behind it.

        Returns:
            what was done, for the log.

        Raises:
            UserError: on every rank, if there is no such checkpoint, or it happened too often.
        """
        train, progress = self.config.train, self.progress
        first = self.guard.first_skipped
        assert first is not None
        self.writer.wait()
        start = self._intact_before(first)
        why = f"{train.max_skips + 1} steps in a row, {first} to {progress.step}, could not be applied"
        advice = (
            f"{self.run_dir / 'incidents.jsonl'} names the reasons and the samples; look at those, lower train.lr or "
            f"train.clip_norm, or raise train.max_skips"
        )
        if start is None:
            raise self._everywhere(f"{why}, and there is no checkpoint from before to go back to. {advice}")
        if progress.rollbacks >= train.max_rollbacks:
            raise self._everywhere(f"{why}, and the run has gone back {progress.rollbacks} times already. {advice}")
        samples, rollbacks, seconds, last = progress.samples, progress.rollbacks, progress.seconds, progress.step
        data_start, bad_samples = progress.data_start, progress.bad_samples
        with self.world.together():
            self._load(load_checkpoint(start, verify=False))
        self.progress.samples, self.progress.rollbacks, self.progress.seconds = samples, rollbacks + 1, seconds
        self.progress.data_start, self.progress.bad_samples = data_start, bad_samples
        return {
            "event": "rollback",
            "from_step": last,
            "to_step": self.progress.step,
            "next_sample": samples,
            "reason": why,
        }

    def _intact_before(self, step: int) -> Path | None:
        """The newest undamaged checkpoint of fewer steps than `step`, the same on every rank."""
        while True:
            path: Path | None = self.world.from_main(newest_complete(self.run_dir, before=step))
            if path is None:
                return None
            try:
                verify_checkpoint(path, self.world)
                return path
            except UserError:
                step = int(path.name.removeprefix("step_"))

    def _everywhere(self, message: str) -> UserError:
        error = UserError(message)
        error.agreed = True
        return error


def fit(trainer: Trainer) -> int | None:
    """The whole run: steps, metrics, grids, checkpoints; every rank calls it, rank 0 writes.

    Returns:
        the number of the signal that stopped it, or None if it reached `train.steps`.
    """
    with (
        RunLog(trainer.config, trainer.progress.step, trainer.world) as log,
        trainer.stop.listening(),
        Watchdog(trainer.world, trainer.config.engine.timeout) as watchdog,
    ):
        if trainer.data_change is not None:
            log.incident(trainer.data_change)
        if trainer.validation and trainer.validation.missing(trainer):  # killed between checkpoint and grid
            trainer.validation.grid(trainer)
        while True:
            try:
                stopped_by = _run_steps(trainer, log, watchdog)
                trainer.writer.wait()
                return stopped_by
            except SkippedTooOften:
                log.rolled_back(trainer.roll_back())


def _run_steps(trainer: Trainer, log: RunLog, watchdog: Watchdog) -> int | None:
    config, total = trainer.config, trainer.config.train.steps
    for row in trainer.train_steps():
        watchdog.beat(f"step {row['step'] + 1}")
        log.step(row)
        step, stopping = row["step"], trainer.stopping
        # Not within a row of skipped steps: it would push out the checkpoint that the run may have to go back to.
        due = step % config.checkpoint.every == 0 and trainer.guard.first_skipped is None
        if due or step == total or stopping is not None or trainer.data_error is not None:
            watchdog.beat(f"the checkpoint of step {step}")
            trainer.save()
            watchdog.beat(f"step {step + 1}")
        if trainer.validation and trainer.validation.due(step):
            picture = trainer.validation.grid(trainer)
            log.picture(picture, step)
            watchdog.beat(f"step {step + 1}")
        if stopping is not None and step < total:
            return stopping
    return None
