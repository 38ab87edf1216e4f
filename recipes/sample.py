"""`scfm sample`: images from a run's weights, the same as from a diffusers pipeline."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.runs import load_trained, open_run
from scfm_core.errors import UserError
from scfm_core.files import check_writable, written_whole
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.protocol import Conditioning
from scfm_core.models.student import ShortcutModel
from scfm_core.train.config import RunConfig
from scfm_core.train.device import compute_dtype, resolve_device
from scfm_core.train.prompts import read_prompts
from scfm_core.train.sampling import decode, initial_noise, sample_latents, sampling_shift, to_uint8


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
    """
    from PIL import Image

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
    check_writable(folder, "scfm sample", advice)
    model = load_trained(run_dir, config, with_teacher=False)
    device, dtype = resolve_device(config.run.device), compute_dtype(config)
    cond = TextEncoders(model.family, config.model.text_length, dtype, device).encode(prompts, config.sample.guidance)
    vae = Autoencoder(model.family, dtype, device)
    seeds = [config.sample.seed + i for i in range(len(prompts))]
    images = generate(config, model, config.sample.weights, vae, cond, seeds, num_steps, strength)
    paths = [folder / f"{number:04d}.png" for number in range(len(prompts))]
    for path, image in zip(paths, to_uint8(images), strict=True):
        with written_whole(path, "scfm sample", advice) as partial:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(partial)
    return paths


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
        noise = initial_noise(shape, seeds[at : at + batch], compute_dtype(config)).to(rows.text.device)
        shift = sampling_shift(config.sample, model.family.image_tokens(noise))
        settings: dict[str, Any] = {"num_steps": num_steps, "shift": shift, "strength": strength}
        latents.append(sample_latents(model, role, noise, rows, method=config.method, **settings))
    with torch.no_grad():
        return decode(vae, torch.cat(latents), batch)
