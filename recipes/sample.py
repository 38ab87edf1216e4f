"""`scfm sample`: images from a run's weights, the same as from a diffusers pipeline."""

import math
import re
from pathlib import Path
from typing import Any

from data_tools.job import processes
from recipes.image_files import ADVICE, read_settings, save_image
from recipes.sample_set import LAYOUTS, ImageSet
from scfm_core.api import RunModel
from scfm_core.errors import UserError
from scfm_core.files import check_writable, written_whole
from scfm_core.train.config import RunConfig
from scfm_core.train.prompts import read_records
from scfm_core.train.run_dir import newest_complete
from scfm_core.train.runs import open_run

_NAME_BYTES = 60
"""Bytes of the prompt in a file's name, of which most file systems allow 255."""
_BATCHES = 16
"""Batches whose prompts are encoded at once."""


def sample(
    run_dir: Path,
    overrides: list[str],
    *,
    prompts: list[str],
    prompt_file: str | None,
    per_prompt: int = 1,
    layout: str | None = None,
    num_steps: int,
    strength: float | None,
    output: Path | None,
) -> tuple[int, Path]:
    """Write `per_prompt` PNGs for each prompt; returns their number and their folder.

    Args:
        run_dir: the run.
        overrides: changes of its configuration (`sample.seed=7`, `sample.guidance=3`, `data.resolution=[1024,1024]`).
        prompts: prompts of the command line; if empty: those of `prompt_file`, else of the configuration.
        per_prompt: images of each prompt.
        layout: a name of `sample_set.LAYOUTS`: places for another tool, in which existing images are kept; this process makes its share.
        num_steps: Euler steps.
        strength: strength of the adapter; None: the one that the run trained for this step count.
        output: folder of the images; None: `RUN_DIR/samples/N_steps`, with the layout's name.

    Without a layout, a file's name has the prompt's first words and the seed, and the PNG has all settings in its metadata, so that
    images of several calls can share a folder. No image of other settings is overwritten.
    """
    config = open_run(run_dir, overrides)
    for name, value in (("--steps", num_steps), ("--per-prompt", per_prompt)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if strength is not None and not math.isfinite(strength):
        raise UserError(f"--strength must be a finite number, got {strength}")
    if strength is not None and config.train.weights == "full" and strength != 1:
        raise UserError("full weights only have strength 1: omit --strength")
    records = [{"prompt": prompt} for prompt in prompts]
    records = records or read_records(prompt_file or config.sample.prompts, "--prompts")
    if not records:
        raise UserError("there is no prompt: give --prompt TEXT or --prompts FILE, or set sample.prompts")
    if layout is not None:
        LAYOUTS[layout].check(records)
    folder = output or run_dir / "samples" / "_".join([f"{num_steps}_steps", *([layout] if layout else [])])
    check_writable(folder, "the images", ADVICE)
    model = RunModel(run_dir, overrides, with_teacher=False)
    settings = model.settings(steps=num_steps, strength=strength) | origin(run_dir, config)
    if layout is not None:
        images = ImageSet(folder, LAYOUTS[layout], records, per_prompt, settings, config.sample.seed)
        rank, size = processes("images")
        return images.make(model, strength, config.evaluate.batch_size, rank, size), folder
    texts = [record["prompt"] for record in records for _ in range(per_prompt)]
    part = _BATCHES * config.evaluate.batch_size  # embeddings of all prompts of a large file would fill the memory
    for first in range(0, len(texts), part):
        seed = config.sample.seed + first
        prompts = texts[first : first + part]
        made = model.sample(prompts, steps=num_steps, seed=seed, strength=strength)
        for number, (prompt, image) in enumerate(zip(prompts, made, strict=True)):
            own = settings | {"prompt": prompt, "seed": seed + number}
            with written_whole(_free_path(folder, own), "the images", ADVICE) as partial:
                save_image(partial, image, own)
    return len(texts), folder


def origin(run_dir: Path, config: RunConfig) -> dict[str, Any]:
    """The weights of an image."""
    checkpoint = newest_complete(run_dir)
    return {
        "model": Path(config.model.path).name if Path(config.model.path).is_dir() else config.model.path,
        "adapters": {Path(adapter.path).name: adapter.weight for adapter in config.model.adapters},
        "run": run_dir.absolute().name,
        "weights": config.sample.weights,
        "checkpoint": checkpoint.name if checkpoint else None,
    }


def file_name(settings: dict[str, Any]) -> str:
    """The name of an image, from prompt and seed, without suffix."""
    words = (
        re.sub(r"[^\w]+", "-", settings["prompt"]).strip("-").encode()[:_NAME_BYTES].decode(errors="ignore").strip("-")
    )
    return f"{words or 'image'}_seed{settings['seed']}"


def _free_path(folder: Path, settings: dict[str, Any]) -> Path:
    """The path of an image; one that is taken by an image of other settings gets a number."""
    name, number = file_name(settings), 1
    path = folder / f"{name}.png"
    while path.exists() and read_settings(path) != settings:
        number += 1
        path = folder / f"{name}_{number}.png"
    return path
