"""`scfm sample`: images from a run's weights, the same as from a diffusers pipeline."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from recipes.runs import load_trained, open_run
from scfm_core.errors import UserError
from scfm_core.files import check_writable, written_whole
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.student import ShortcutModel
from scfm_core.scfm.method import sampling_strength
from scfm_core.train.config import RunConfig
from scfm_core.train.device import compute_dtype, resolve_device
from scfm_core.train.prompts import read_prompts
from scfm_core.train.run_dir import newest_complete
from scfm_core.train.sampling import decode, initial_noise, sample_latents, sampling_shift, to_uint8

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
    model = load_trained(run_dir, config, with_teacher=False)
    device, dtype = resolve_device(config.run.device), compute_dtype(config)
    cond = TextEncoders(model.family, config.model.text_length, dtype, device).encode(prompts, config.sample.guidance)
    vae = Autoencoder(model.family, dtype, device)
    seeds = [config.sample.seed + i for i in range(len(prompts))]
    images = generate(config, model, config.sample.weights, vae, cond, seeds, num_steps, strength)
    if strength is None:
        strength = sampling_strength(config.method.step_gain, num_steps)
    settings = _settings(run_dir, config, model.family, num_steps, strength)
    paths = []
    for prompt, seed, image in zip(prompts, seeds, to_uint8(images), strict=True):
        own = settings | {"prompt": prompt, "seed": seed}
        paths.append(_free_path(folder, own))
        with written_whole(paths[-1], "the images", advice) as partial:
            _save(partial, image, own)
    return paths


def _settings(run_dir: Path, config: RunConfig, family: ModelFamily, num_steps: int, strength: float) -> dict[str, Any]:
    """What an image depends on, except for its prompt and seed."""
    checkpoint = newest_complete(run_dir)
    height, width = config.data.resolution
    latents = torch.empty(1, *family.latent_shape(height, width), device="meta")
    return {
        "steps": num_steps,
        "strength": strength,
        "guidance": config.sample.guidance,
        "shift": sampling_shift(config.sample, family, latents, num_steps),
        "width": width,
        "height": height,
        "model": Path(config.model.path).name if Path(config.model.path).is_dir() else config.model.path,
        "run": run_dir.absolute().name,
        "weights": config.sample.weights,
        "checkpoint": checkpoint.name if checkpoint else None,
    }


def _free_path(folder: Path, settings: dict[str, Any]) -> Path:
    """A file's name from prompt and seed; one that is taken by an image of other settings gets a number."""
    words = (
        re.sub(r"[^\w]+", "-", settings["prompt"]).strip("-").encode()[:_NAME_BYTES].decode(errors="ignore").strip("-")
    )
    words = words or "image"
    name, number = f"{words}_seed{settings['seed']}", 1
    path = folder / f"{name}.png"
    while path.exists() and read_settings(path) != settings:
        number += 1
        path = folder / f"{name}_{number}.png"
    return path


def _save(path: Path, image: Tensor, settings: dict[str, Any]) -> None:
    """Write an image [3, H, W] (uint8) with its settings."""
    info = PngInfo()
    # The first is for programs. The second has the form that viewers of generated images show (Stable Diffusion web UI).
    info.add_itxt("scfm", json.dumps(settings, ensure_ascii=False))
    info.add_itxt("parameters", _readable(settings))
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, format="png", pnginfo=info)


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


def generate(
    config: RunConfig,
    model: ShortcutModel,
    role: str,
    vae: Autoencoder,
    cond: Conditioning,
    seeds: list[int],
    num_steps: int,
    strength: float | None = None,
) -> Tensor:
    """Images from the weights of `role`, one for each row of `cond` and seed; fp32 [N, 3, H, W] in [0, 1] on the CPU."""
    shape, batch = model.family.latent_shape(*config.data.resolution), config.evaluate.batch_size
    latents = []
    for at in range(0, len(seeds), batch):
        rows = cond[at : at + batch]
        noise = initial_noise(shape, seeds[at : at + batch], compute_dtype(config)).to(rows.device)
        shift = sampling_shift(config.sample, model.family, noise, num_steps)
        settings: dict[str, Any] = {"num_steps": num_steps, "shift": shift, "strength": strength}
        latents.append(sample_latents(model, role, noise, rows, method=config.method, **settings))
    with torch.no_grad():
        return decode(vae, torch.cat(latents), batch)
