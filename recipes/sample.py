"""`scfm sample`: images from a run's weights, the same as from a diffusers pipeline."""

import json
import math
import re
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from scfm_core.api import RunModel
from scfm_core.errors import UserError
from scfm_core.files import check_writable, written_whole
from scfm_core.train.config import RunConfig
from scfm_core.train.prompts import read_prompts
from scfm_core.train.run_dir import newest_complete
from scfm_core.train.runs import open_run

_NAME_BYTES = 60
"""Bytes of the prompt in a file's name, of which most file systems allow 255."""


def sample(
    run_dir: Path,
    overrides: list[str],
    *,
    prompts: list[str],
    prompt_file: str | None,
    num_steps: int,
    strength: float | None,
    output: Path | None,
) -> list[Path]:
    """Write one PNG for each prompt; returns their paths.

    Args:
        run_dir: the run.
        overrides: changes of its configuration (`sample.seed=7`, `sample.guidance=3`, `data.resolution=[1024,1024]`).
        prompts: prompts of the command line; if empty: those of `prompt_file`, else of the configuration.
        num_steps: Euler steps.
        strength: strength of the adapter; None: the one that the run trained for this step count.
        output: folder of the images; None: `RUN_DIR/samples/N_steps`.

    A file's name has the prompt's first words and the seed, and the PNG has all settings in its metadata, so that images of several
    calls can share a folder. No image of other settings is overwritten.
    """
    config = open_run(run_dir, overrides)
    if num_steps < 1:
        raise UserError(f"--steps must be at least 1, got {num_steps}")
    if strength is not None and not math.isfinite(strength):
        raise UserError(f"--strength must be a finite number, got {strength}")
    if strength is not None and config.train.weights == "full" and strength != 1:
        raise UserError("full weights only have strength 1: omit --strength")
    prompts = prompts or read_prompts(prompt_file or config.sample.prompts, "--prompts")
    if not prompts:
        raise UserError("there is no prompt: give --prompt TEXT or --prompts FILE, or set sample.prompts")
    folder, advice = output or run_dir / "samples" / f"{num_steps}_steps", "Choose another folder with --output"
    check_writable(folder, "the images", advice)
    model = RunModel(run_dir, overrides, with_teacher=False)
    settings = model.settings(steps=num_steps, strength=strength)
    images = model.sample(prompts, steps=num_steps, seed=config.sample.seed, strength=strength)
    settings |= origin(run_dir, config)
    paths = []
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        own = settings | {"prompt": prompt, "seed": config.sample.seed + number}
        paths.append(_free_path(folder, own))
        with written_whole(paths[-1], "the images", advice) as partial:
            save_image(partial, image, own)
    return paths


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


def save_image(target: Path | BinaryIO, image: Image.Image, settings: dict[str, Any]) -> None:
    """Write an image with its settings, as PNG."""
    info = PngInfo()
    # The first is for programs. The second has the form that viewers of generated images show (Stable Diffusion web UI).
    info.add_itxt("scfm", json.dumps(settings, ensure_ascii=False))
    info.add_itxt("parameters", _readable(settings))
    image.save(target, format="png", pnginfo=info)


def _readable(settings: dict[str, Any]) -> str:
    rows = {
        "Steps": settings["steps"],
        "Sampler": "Euler",
        "CFG scale": settings["guidance"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings["model"],
        "LoRA strength": settings["strength"],
        "Shift": settings["shift"],
    }
    return f"{settings['prompt']}\n" + ", ".join(f"{name}: {value}" for name, value in rows.items())


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in the metadata of an image of `scfm sample`; None if the file has none."""
    try:
        with Image.open(path) as image:
            found = json.loads(image.info["scfm"])
    except (OSError, KeyError, ValueError):
        return None
    return found if isinstance(found, dict) else None
