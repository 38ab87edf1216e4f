"""The step and the loop."""

import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from scfm_core.data.loader import batches, open_dataset
from scfm_core.data.schema import Batch
from scfm_core.distributed.engine import LocalEngine, NonFiniteGradient
from scfm_core.errors import UserError
from scfm_core.flow.path import flow_velocity, noise_latents
from scfm_core.flow.random import sample_noise
from scfm_core.models.weights import network_fingerprint
from scfm_core.scfm.ema import DualEMA
from scfm_core.scfm.loss import LossMeter, scfm_loss
from scfm_core.scfm.plan import sample_plan, sampling_strength
from scfm_core.scfm.target import scfm_target
from scfm_core.train.build import (
    BatchEncoder,
    build_family,
    build_model,
    compute_dtype,
    resolve_device,
    sampling_shift,
    validation_prompts,
)
from scfm_core.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from scfm_core.train.config import RunConfig, TrainConfig, to_plain
from scfm_core.train.metrics import MetricsFile, WandbLog, progress_bar
from scfm_core.train.validate import decode, initial_noise, sample_latents, save_grid

# What may change between two starts of a run.
_FREE_KEYS = (
    "run.dir",
    "run.device",
    "model.path",  # of these the content's fingerprints are compared
    "data.path",
    "data.num_workers",
    "data.verify",
    "train.steps",
    "train.lr",  # these two change the run, and a line says so
    "train.clip_norm",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "checkpoint",
    "sample",
    "evaluate",
    "wandb",
)


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
    """Optimizer steps."""
    samples: int = 0
    """Samples consumed: the data cursor, and the next global sample index."""
    seconds: float = 0.0
    """Time spent in steps, over all starts."""


class Trainer:
    """One run: its model, data, engine, EMAs and where they stand.

    Args:
        config: the run.
        resume: the checkpoint to go on from, if any; already verified.

    Raises:
        UserError: if model, data, prompts or checkpoint do not fit the configuration.
    """

    def __init__(self, config: RunConfig, resume: Path | None = None) -> None:
        self.config = config
        self.run_dir = Path(config.run.dir)
        self.device = resolve_device(config.run.device)
        prompts = validation_prompts(config)
        self.dataset = open_dataset(config.data)
        self.family = build_family(config)
        self.encoder = BatchEncoder(config, self.family, self.dataset, self.device)
        self.model = build_model(config, self.family, self.device)
        self.progress = Progress()
        train = config.train
        self.engine = LocalEngine(
            self.model.parameters("student"),
            lr=lambda step: learning_rate(train, step),
            betas=train.betas,
            weight_decay=train.weight_decay,
            clip_norm=train.clip_norm,
            accumulation=train.global_batch_size // train.micro_batch_size,
        )
        self.emas = DualEMA(
            self.model.parameters("student"),
            self.model.parameters("ema_fast"),
            self.model.parameters("ema_slow"),
            config=config.ema,
        )
        if resume is not None:
            self._restore(load_checkpoint(resume, verify=False))
        self.validation = Validation(self, prompts) if prompts else None

    def micro_step(self, batch: Batch, meter: LossMeter) -> Tensor:
        """Forward of one micro-batch: its loss, ready for the backward."""
        config, model = self.config, self.model
        latents, cond = self.encoder.encode(batch)
        tokens = self.family.image_tokens(latents)
        plan = sample_plan(config.method, batch.sample_ids, config.run.seed, image_tokens=tokens).to(self.device)
        cond = cond.with_guidance(plan.guidance)
        noise = sample_noise(latents, batch.sample_ids, config.run.seed)
        noised = noise_latents(latents, noise, plan.sigma_start)
        velocity = flow_velocity(latents, noise) if plan.has_flow else None
        target = scfm_target(plan, noised, cond, model.near_velocity, model.far_velocity, flow_velocity=velocity)
        prediction = model.student_velocity(noised, plan.sigma_start, cond, plan.student_strength)
        meter.add(prediction, target, plan)
        return scfm_loss(prediction, target, plan)

    def train_steps(self) -> Iterator[dict[str, Any]]:
        """Run to `train.steps`, yielding each step's row of metrics once the step is applied."""
        train = self.config.train
        stream = batches(
            self.dataset,
            self.config.data,
            seed=self.config.run.seed,
            micro_batch_size=train.micro_batch_size,
            start=self.progress.samples,
            stop=train.steps * train.global_batch_size,
        )
        meter, began = LossMeter(self.device), time.perf_counter()
        for batch in stream:
            loss = self.micro_step(batch, meter)
            self.engine.backward(loss)
            try:
                applied = self.engine.step()
            except NonFiniteGradient as error:
                raise UserError(self._non_finite(error)) from error
            if not applied:
                continue
            self.emas.update()
            self.progress.step += 1
            self.progress.samples += train.global_batch_size
            if self.emas.restart_due(self.progress.step):
                self.emas.restart()
            losses = meter.compute()
            seconds = time.perf_counter() - began
            self.progress.seconds += seconds
            yield {
                "step": self.progress.step,
                **losses,
                "grad_norm": self.engine.grad_norm,
                "lr": self.engine.lr,
                "samples": self.progress.samples,
                "seconds": round(self.progress.seconds, 4),
                "samples_per_second": round(train.global_batch_size / seconds, 3),
            }
            meter, began = LossMeter(self.device), time.perf_counter()

    def _non_finite(self, error: Exception) -> str:
        first = self.progress.samples
        return (
            f"step {self.progress.step + 1} stopped: {error}. Its samples are {first}..."
            f"{first + self.config.train.global_batch_size - 1}; weights and EMAs are as after step "
            f"{self.progress.step}. Look at those samples, or go back: --resume with an earlier checkpoint and a lower "
            f"train.lr or train.clip_norm"
        )

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        tensors: dict[str, Mapping[str, Tensor]] = {
            "student": self.model.parameters("student"),
            "ema_fast": self.emas.fast,
            "ema_slow": self.emas.slow,
            "optimizer": self.engine.state_dict(),
        }
        state = {
            **dataclasses.asdict(self.progress),
            "data_fingerprint": self.dataset.fingerprint,
            "base_fingerprint": network_fingerprint(self.family.folder),
            "config": to_plain(self.config),
        }
        return save_checkpoint(self.run_dir, self.progress.step, tensors, state, self.config.checkpoint.keep)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        refuse_other_recipe(state["config"], to_plain(self.config), checkpoint.path)
        if state["base_fingerprint"] != network_fingerprint(self.family.folder):
            raise UserError(
                f"checkpoint {checkpoint.path} was trained on another model than model.path={self.config.model.path} "
                f"holds now. Resume with the same one, or start over with --resume never"
            )
        if state["data_fingerprint"] != self.dataset.fingerprint:
            raise UserError(
                f"checkpoint {checkpoint.path} was trained on other data than data.path={self.config.data.path} "
                f"(fingerprint {state['data_fingerprint'][:12]} and {self.dataset.fingerprint[:12]}). Resume with "
                f"the same data, or start over with --resume never"
            )
        self.progress = Progress(**{name: state[name] for name in ("step", "samples", "seconds")})
        load_weights(self.model.parameters("student"), checkpoint.tensors["student"])
        self.emas.load_state_dict({"fast": checkpoint.tensors["ema_fast"], "slow": checkpoint.tensors["ema_slow"]})
        self.engine.load_state_dict(checkpoint.tensors["optimizer"], self.progress.step)


@torch.no_grad()
def load_weights(parameters: dict[str, torch.nn.Parameter], saved: dict[str, Tensor]) -> None:
    """Copy saved tensors into the parameters of the same names."""
    assert parameters.keys() == saved.keys(), parameters.keys() ^ saved.keys()
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def refuse_other_recipe(saved: dict[str, Any], current: dict[str, Any], where: Path) -> None:
    """A run goes on only with the recipe that it began with.

    Raises:
        UserError: with every difference.
    """
    left, right = _flat(json.loads(json.dumps(saved))), _flat(json.loads(json.dumps(current)))
    if left.get("train.lr_schedule") == "cosine" and left.get("train.steps") != right.get("train.steps"):
        raise UserError(
            f"checkpoint {where} decays its learning rate over train.steps={left['train.steps']}; with "
            f"train.steps={right['train.steps']} the rate would jump. Keep train.steps, or start over with --resume never"
        )
    keys = [key for key in sorted({*left, *right}) if left.get(key) != right.get(key)]
    changed = [k for k in keys if not any(k == free or k.startswith(f"{free}.") for free in _FREE_KEYS)]
    if changed:
        lines = "\n".join(f"  {key}: {left.get(key)} there, {right.get(key)} now" for key in changed)
        raise UserError(
            f"checkpoint {where} is of another recipe:\n{lines}\n"
            f"Use another run.dir, put the values back, or start over with --resume never"
        )
    for key in ("train.lr", "train.clip_norm"):
        if key in keys:
            print(f"{key} changes here from {left.get(key)} to {right.get(key)}")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


class Validation:
    """The grid of samples at an interval: prompts encoded once, then the text encoders are dropped."""

    def __init__(self, trainer: Trainer, prompts: list[str]) -> None:
        from scfm_core.models.encoders import Autoencoder, TextEncoders

        config, family = trainer.config, trainer.family
        dtype = compute_dtype(config)
        self.prompts, self.every, self.last = prompts, config.sample.every, config.train.steps
        text = trainer.encoder.text or TextEncoders(family.folder, config.model.text_length, dtype, trainer.device)
        self.cond = text.encode(prompts, guidance=config.sample.guidance)
        self.vae = trainer.encoder.vae or Autoencoder(family.folder, dtype, trainer.device)
        height, width = config.data.resolution
        seeds = [config.sample.seed + i for i in range(len(prompts))]
        self.noise = initial_noise(family.latent_shape(height, width), seeds, dtype).to(trainer.device)
        self.shift = sampling_shift(config.sample, family, height, width)

    def due(self, step: int) -> bool:
        """Whether a grid belongs to this step: every `sample.every` steps, and the last."""
        return step > 0 and (step % self.every == 0 or step == self.last)

    def path(self, trainer: Trainer) -> Path:
        """Where the grid of the present step goes."""
        return trainer.run_dir / "samples" / f"step_{trainer.progress.step:08d}.png"

    def missing(self, trainer: Trainer) -> bool:
        """Whether the present step should have a grid and has none."""
        return self.due(trainer.progress.step) and not self.path(trainer).is_file()

    def grid(self, trainer: Trainer) -> Path:
        """Sample every prompt at every step count and save the picture."""
        config, rows = trainer.config, []
        for num_steps in config.sample.steps:
            latents = [
                sample_latents(
                    trainer.model,
                    config.sample.weights,
                    self.noise[at : at + config.train.micro_batch_size],
                    self.cond[at : at + config.train.micro_batch_size],
                    num_steps=num_steps,
                    shift=self.shift,
                    strength=sampling_strength(config.method.step_gain, num_steps),
                )
                for at in range(0, len(self.prompts), config.train.micro_batch_size)
            ]
            images = decode(self.vae, torch.cat(latents), config.train.micro_batch_size)
            rows.append((f"{num_steps} step{'s' if num_steps > 1 else ''}", images))
        save_grid(self.path(trainer), rows, self.prompts)
        return self.path(trainer)


class StopRequest:
    """SIGTERM, SIGINT and USR2 ask for a stop at the next step boundary; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Install the handlers; the old ones come back afterwards."""
        caught = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
        previous = {number: signal.signal(number, self._handle) for number in caught}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def fit(trainer: Trainer) -> int | None:
    """The whole run: steps, metrics, grids, checkpoints.

    Returns:
        the number of the signal that stopped it, or None if it reached `train.steps`.
    """
    config = trainer.config
    total = config.train.steps
    trainer.run_dir.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(trainer.run_dir / "metrics.jsonl", trainer.progress.step)
    wandb = WandbLog(config.wandb, trainer.run_dir, to_plain(config))
    bar = progress_bar(trainer.run_dir.name, total, trainer.progress.step)
    stop = StopRequest()
    try:
        with stop.listening(), bar:
            if trainer.validation and trainer.validation.missing(trainer):  # killed between checkpoint and grid
                trainer.validation.grid(trainer)
            for row in trainer.train_steps():
                metrics.write(row)
                wandb.log(row)
                bar.set_postfix(
                    loss=f"{row['loss']:.4f}", samples_per_s=f"{row['samples_per_second']:.1f}", refresh=False
                )
                bar.update()
                step = row["step"]
                if step % config.checkpoint.every == 0 or step == total or stop.signal is not None:
                    trainer.save()
                if trainer.validation and trainer.validation.due(step):
                    wandb.image("samples", trainer.validation.grid(trainer), step)
                if stop.signal is not None and step < total:
                    return stop.signal
    finally:
        metrics.close()
        wandb.close()
    return None
