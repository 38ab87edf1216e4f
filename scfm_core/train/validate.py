"""Sampling from a shortcut model, and the grids that show it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scfm_core.flow.sampler import euler_sample
from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.encoders import Autoencoder
from scfm_core.models.protocol import Conditioning
from scfm_core.models.student import FullModel, LoRAModel
from scfm_core.scfm.plan import PlanConfig, sampling_strength
from scfm_core.train.build import compute_dtype, sampling_shift

if TYPE_CHECKING:
    from scfm_core.train.trainer import Trainer

MIN_CELL = 96  # pixels: smaller images are enlarged in grids


def initial_noise(shape: tuple[int, int, int], seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The noise that a diffusers pipeline draws from `torch.Generator().manual_seed(seed)` on the CPU, [B, C, H, W]."""
    return torch.cat(
        [torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds]
    )


@torch.no_grad()
def sample_latents(
    model: LoRAModel | FullModel,
    role: str,
    noise: Tensor,
    cond: Conditioning,
    *,
    method: PlanConfig,
    num_steps: int,
    shift: float,
    strength: float | None = None,
) -> Tensor:
    """Plain Euler from `noise` [B, C, H, W]; latents at sigma 0, at least fp32.

    Args:
        model: and the `role` whose weights are taken.
        noise: where it starts.
        cond: one row an image.
        method: what the weights were trained with: it says how they are told the step size.
        num_steps: Euler steps.
        shift: timestep shift.
        strength: of the adapter; None: what `method` says for so many steps.
    """
    if strength is None:
        strength = sampling_strength(method.step_gain, num_steps)
    strengths = torch.full((noise.shape[0],), strength, device=noise.device)
    if method.step_embedding:
        cond = cond.with_guidance(torch.full_like(strengths, 1 / num_steps))
    if method.distil_guidance and role != "teacher":
        cond = cond.with_guidance(None)  # it has learned the teacher's

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return model.velocity(role, x, sigma, cond, strengths)

    return euler_sample(velocity, noise, sigma_grid(num_steps, shift))


def decode(vae: Autoencoder, latents: Tensor, batch_size: int) -> Tensor:
    """Images fp32 [B, 3, H, W] in [0, 1] on the CPU, decoded `batch_size` at a time."""
    return torch.cat([vae.decode(part).cpu() for part in latents.split(batch_size)])


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] -> uint8, rounded to nearest as diffusers does."""
    return (images * 255).round().to(torch.uint8)


def save_grid(path: Path, rows: Sequence[tuple[str, Tensor]], columns: Sequence[str] = ()) -> None:
    """A labelled picture: one row of images [N, 3, H, W] in [0, 1] for each (label, images), aligned by column."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = rows[0][1].shape[-2:]
    zoom = max(1, -(-MIN_CELL // max(height, width)))
    cell_h, cell_w, gap, font = height * zoom, width * zoom, 4, ImageFont.load_default(size=14)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max(int(probe.textlength(label, font=font)) for label, _ in rows) + 4 * gap
    top = 24 if columns else gap
    count = max(len(images) for _, images in rows)
    canvas = Image.new("RGB", (left + count * (cell_w + gap), top + len(rows) * (cell_h + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for number, text in enumerate(_distinct_parts(columns[:count])):
        shown = text
        while len(shown) > 1 and probe.textlength(shown, font=font) > cell_w:
            shown = shown[:-2].rstrip() + "…"
        pen.text((left + number * (cell_w + gap), gap), shown, fill="black", font=font)
    for row, (label, images) in enumerate(rows):
        y = top + row * (cell_h + gap)
        pen.text((2 * gap, y + cell_h // 2 - 7), label, fill="black", font=font)
        for column, image in enumerate(to_uint8(images)):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((cell_w, cell_h), Image.Resampling.BICUBIC)
            canvas.paste(tile, (left + column * (cell_w + gap), y))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _distinct_parts(prompts: Sequence[str]) -> list[str]:
    """Prompts without the words that all of them begin with: what tells one column from the next."""
    words = [prompt.split() for prompt in prompts]
    shared = 0
    while len(words) > 1 and all(len(w) > shared + 1 and w[shared] == words[0][shared] for w in words):
        shared += 1
    return [" ".join(w[shared:]) for w in words]


class Validation:
    """The grid of samples at an interval, of prompts that `BatchEncoder` has encoded."""

    def __init__(self, trainer: "Trainer", prompts: list[str]) -> None:
        config, family = trainer.config, trainer.family
        dtype = compute_dtype(config)
        self.prompts, self.every, self.last = prompts, config.sample.every, config.train.steps
        assert trainer.encoder.prompts is not None
        self.cond = trainer.encoder.prompts
        self.vae = trainer.encoder.vae or Autoencoder(family, dtype, trainer.device)
        height, width = config.data.resolution
        seeds = [config.sample.seed + i for i in range(len(prompts))]
        self.noise = initial_noise(family.latent_shape(height, width), seeds, dtype).to(trainer.device)
        self.shift = sampling_shift(config.sample, family, height, width)
        self.teacher: Tensor | None = None
        """The teacher's latents, once they are needed."""

    def due(self, step: int) -> bool:
        """Whether a grid belongs to this step: every `sample.every` steps, and the last."""
        return step > 0 and (step % self.every == 0 or step == self.last)

    def path(self, trainer: "Trainer") -> Path:
        """Where the grid of the present step goes."""
        return trainer.run_dir / "samples" / f"step_{trainer.progress.step:08d}.png"

    def missing(self, trainer: "Trainer") -> bool:
        """Whether the present step should have a grid and has none."""
        there = trainer.world.from_main(self.path(trainer).is_file())  # ranks must not differ: all sample or none
        return self.due(trainer.progress.step) and not there

    def grid(self, trainer: "Trainer") -> Path:
        """Sample every prompt at every step count, save the picture, and beside it how far the latents are from the
        teacher's of the same noise (mean squared, by step count)."""
        config, path = trainer.config, self.path(trainer)
        role, rows, apart = config.sample.weights, [], {}
        if config.sample.teacher_steps and self.teacher is None:
            self.teacher = self._sampled(trainer, "teacher", config.sample.teacher_steps)
        for num_steps in config.sample.steps:
            latents = self._sampled(trainer, role, num_steps)
            if self.teacher is not None:
                apart[str(num_steps)] = float((latents - self.teacher).square().mean())
            if trainer.world.is_main:
                images = decode(self.vae, latents, config.train.micro_batch_size)
                rows.append((f"{num_steps} step{'s' if num_steps > 1 else ''}", images))
        if trainer.world.is_main:
            if apart:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_suffix(".json").write_text(json.dumps({"mse_teacher": apart}) + "\n")
            save_grid(path, rows, self.prompts)
        return path

    def _sampled(self, trainer: "Trainer", role: str, num_steps: int) -> Tensor:
        """All prompts' latents; every rank computes them, for sharded weights are gathered by all."""
        latents: Tensor = trainer.engine.forward(lambda: self._latents(trainer, role, num_steps))
        return latents

    def _latents(self, trainer: "Trainer", role: str, num_steps: int) -> Tensor:
        config, size = trainer.config, trainer.config.train.micro_batch_size
        parts = [
            sample_latents(
                trainer.model,
                role,
                self.noise[at : at + size],
                self.cond[at : at + size],
                method=config.method,
                num_steps=num_steps,
                shift=self.shift,
            )
            for at in range(0, len(self.prompts), size)
        ]
        return torch.cat(parts)
