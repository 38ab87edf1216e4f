"""Validation grids: pictures of samples at regular steps, and their distance from the teacher's samples."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scfm_core.distributed.engine import Engine
from scfm_core.distributed.world import World
from scfm_core.files import written_whole
from scfm_core.models.encoders import Autoencoder
from scfm_core.models.student import ShortcutModel
from scfm_core.train.config import RunConfig
from scfm_core.train.device import compute_dtype
from scfm_core.train.inputs import BatchEncoder
from scfm_core.train.sampling import decode, initial_noise, sample_latents, sampling_shift, to_uint8

MIN_CELL = 96  # pixels; smaller images are enlarged in grids


class Validation:
    """Samples of the validation prompts, at every step count of `sample.steps`.

    Args:
        config: the run.
        model: the networks.
        engine: runs the forward passes.
        encoder: provides the encoded prompts, and the VAE if the data are images.
        world: the processes. All of them sample, because sharded weights are gathered by all; rank 0 writes.
    """

    def __init__(
        self, config: RunConfig, model: ShortcutModel, engine: Engine, encoder: BatchEncoder, world: World
    ) -> None:
        self._config, self._model, self._engine, self._world = config, model, engine, world
        assert encoder.prompt_cond is not None
        self._prompts, self._cond = encoder.prompts, encoder.prompt_cond
        dtype, family = compute_dtype(config), model.family
        self._vae = encoder.vae
        if self._vae is None and world.is_main:  # rank 0 alone decodes
            self._vae = Autoencoder(family, dtype, encoder.device)
        shape = family.latent_shape(*config.data.resolution)
        seeds = [config.sample.seed + i for i in range(len(self._prompts))]
        self._noise = initial_noise(shape, seeds, family.noise_dtype or dtype).to(encoder.device)
        self._teacher: Tensor | None = None
        """The teacher's latents. They are sampled once, for the first grid."""

    def is_due(self, step: int) -> bool:
        """Whether this step has a grid: every `sample.every` steps, and at the last step."""
        return step > 0 and (step % self._config.sample.every == 0 or step == self._config.train.steps)

    def is_missing(self, step: int) -> bool:
        """Whether the grid of this step is due but missing; the same on every rank, because all ranks sample together."""
        return self.is_due(step) and not self._world.from_main(self._path(step).is_file())

    def save_grid(self, step: int) -> Path:
        """Sample every prompt at every step count and save the picture `samples/step_XXXXXXXX.png`.

        With `sample.teacher_steps`, a JSON file with the same name contains the mean squared distance between the latents and
        the teacher's latents of the same noise, by step count.
        """
        sample, path, is_main = self._config.sample, self._path(step), self._world.is_main
        if sample.teacher_steps and self._teacher is None:
            self._teacher = self._sample("teacher", sample.teacher_steps)
        rows, distances = [], {}
        for num_steps in sample.steps:
            latents = self._sample(sample.weights, num_steps)
            if self._teacher is not None:
                distances[str(num_steps)] = float((latents - self._teacher).square().mean())
            if is_main:
                assert self._vae is not None
                images = decode(self._vae, latents, self._config.train.micro_batch_size)
                rows.append((f"{num_steps} step{'s' if num_steps > 1 else ''}", images))
        if is_main:
            if distances:
                with written_whole(
                    path.with_suffix(".json"), "the distances", "Make room, or choose another run.dir"
                ) as partial:
                    partial.write_text(json.dumps({"mse_teacher": distances}) + "\n", encoding="utf-8")
            save_grid(path, rows, self._prompts)
        return path

    def _path(self, step: int) -> Path:
        return Path(self._config.run.dir) / "samples" / f"step_{step:08d}.png"

    def _sample(self, role: str, num_steps: int) -> Tensor:
        """Latents of all prompts, sampled in micro-batches."""
        config, size = self._config, self._config.train.micro_batch_size
        shift = sampling_shift(config.sample, self._model.family, self._noise, num_steps)

        def call() -> Tensor:
            parts = [
                sample_latents(
                    self._model,
                    role,
                    self._noise[at : at + size],
                    self._cond[at : at + size],
                    method=config.method,
                    num_steps=num_steps,
                    shift=shift,
                )
                for at in range(0, len(self._prompts), size)
            ]
            return torch.cat(parts)

        return self._engine.forward(call)


def save_grid(path: Path, rows: Sequence[tuple[str, Tensor]], columns: Sequence[str] = ()) -> None:
    """Save a labelled picture: one row for each (label, images [N, 3, H, W] in [0, 1]), with `columns` as column titles."""
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
    with written_whole(path, "the picture", "Make room, or choose another run.dir") as partial:
        canvas.save(partial)


def _distinct_parts(prompts: Sequence[str]) -> list[str]:
    """Prompts without the first words that all of them share."""
    words = [prompt.split() for prompt in prompts]
    shared = 0
    while len(words) > 1 and all(len(w) > shared + 1 and w[shared] == words[0][shared] for w in words):
        shared += 1
    return [" ".join(w[shared:]) for w in words]
