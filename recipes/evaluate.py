"""`scfm evaluate`: student, undistilled base and teacher at the same step counts, from the same noise."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.runs import load_trained, open_run
from recipes.sample import generate
from scfm_core.data.loader import open_dataset
from scfm_core.errors import UserError
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.protocol import Conditioning
from scfm_core.models.student import FullModel, LoRAModel
from scfm_core.train.build import BatchEncoder, compute_dtype, read_prompts, resolve_device
from scfm_core.train.config import RunConfig
from scfm_core.train.features import extract, frechet_distance, load_features
from scfm_core.train.metrics import progress_bar
from scfm_core.train.validate import decode, save_grid, to_uint8

Result = dict[str, dict[str, dict[str, float]]]
GRID_COLUMNS = 10


def evaluate(run_dir: Path, overrides: list[str]) -> Result:
    """Measure and write `RUN_DIR/evaluation.json` and `RUN_DIR/samples/evaluation.png`.

    Every figure starts from the same noise, so that `mse_teacher` compares image by image, and a Frechet distance
    below that of two independent teacher sets says that the samples agree noise by noise.

    Returns:
        `{"student": {"3": {...}}, "base": {...}, "teacher": {"32": {...}}}`, each with `fid_teacher` and
        `mse_teacher` (not for the teacher), `fid_data`, `seconds_per_image`, and `clip_score` if CLIP is given.
    """
    config = open_run(run_dir, overrides)
    settings, device = config.evaluate, resolve_device(config.run.device)
    features = load_features(settings, device)
    clip = _clip_score(settings.clip_path, device)
    model, _ = load_trained(run_dir, config)
    if isinstance(model, FullModel) and "teacher" not in model.networks:
        raise UserError("this run has no teacher (method.teacher_fraction is 0), so there is nothing to compare with")
    dtype = compute_dtype(config)
    dataset = open_dataset(config.data)
    prompts = _prompts(config, dataset)
    vae = Autoencoder(model.family.folder, dtype, device)
    text = TextEncoders(model.family.folder, config.model.text_length, dtype, device)
    cond = _encode(text, prompts, config)
    seeds = [config.sample.seed + i for i in range(len(prompts))]
    real = extract(features, _real_images(config, model, dataset, vae), device, settings.batch_size)

    def measure(role: str, steps: int, reference: Tensor | None) -> tuple[dict[str, float], Tensor, Tensor]:
        began = time.perf_counter()
        images = generate(config, model, role, vae, cond, seeds, steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - began) / len(images)
        found = extract(features, images, device, settings.batch_size)
        row = {"fid_data": frechet_distance(found, real), "seconds_per_image": seconds}
        if reference is not None:
            row["fid_teacher"] = frechet_distance(found, reference)
        if clip is not None:
            row["clip_score"] = clip(images, prompts)
        return row, images, found

    jobs = [(kind, steps) for steps in settings.steps for kind in ("student", "base")]
    result: Result = {"student": {}, "base": {}, "teacher": {}}
    grids: dict[tuple[str, int], Tensor] = {}
    with progress_bar("evaluate", len(jobs) + 1, unit="figure") as bar:
        row, teacher_images, reference = measure("teacher", settings.teacher_steps, None)
        result["teacher"][str(settings.teacher_steps)] = row
        bar.update()
        for kind, steps in jobs:
            role = config.sample.weights if kind == "student" else "teacher"
            row, images, _ = measure(role, steps, reference)
            row["mse_teacher"] = float((images - teacher_images).square().mean())
            result[kind][str(steps)] = row
            grids[kind, steps] = images[:GRID_COLUMNS]
            bar.update()
    rows = [(f"{kind} {steps}", grids[kind, steps]) for kind in ("student", "base") for steps in settings.steps]
    rows.append((f"teacher {settings.teacher_steps}", teacher_images[:GRID_COLUMNS]))
    save_grid(run_dir / "samples" / "evaluation.png", rows, prompts[:GRID_COLUMNS])
    path = run_dir / "evaluation.json"
    path.with_suffix(".tmp").write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".tmp").replace(path)
    return result


def _prompts(config: RunConfig, dataset: Any) -> list[str]:
    """`evaluate.samples` prompts: those of the file, else the data's captions, repeated as needed."""
    count = config.evaluate.samples
    if config.evaluate.prompts is not None:
        given = read_prompts(config.evaluate.prompts, "evaluate.prompts")
        return [given[i % len(given)] for i in range(count)]
    return [dataset.caption(i % len(dataset)) for i in range(count)]


def _encode(text: TextEncoders, prompts: list[str], config: RunConfig) -> Conditioning:
    """Each distinct prompt is encoded once."""
    distinct = sorted(set(prompts))
    size = config.evaluate.batch_size
    parts = [text.encode(distinct[at : at + size], config.sample.guidance) for at in range(0, len(distinct), size)]
    cond = Conditioning(
        text=torch.cat([part.text for part in parts]),
        pooled=torch.cat([part.pooled for part in parts]),
        guidance=torch.cat([part.guidance for part in parts if part.guidance is not None]),
    )
    where = {prompt: row for row, prompt in enumerate(distinct)}
    return cond[torch.tensor([where[prompt] for prompt in prompts], device=cond.text.device)]


def _real_images(config: RunConfig, model: LoRAModel | FullModel, dataset: Any, vae: Autoencoder) -> Tensor:
    """At most `evaluate.samples` images of the data, [N, 3, H, W] in [0, 1]; cached latents are decoded."""
    records = [dataset[i] for i in range(min(config.evaluate.samples, len(dataset)))]
    if records[0].image is not None:
        return torch.stack([record.image for record in records]) / 2 + 0.5
    BatchEncoder(config, model.family, dataset, torch.device("cpu"))  # type: ignore[arg-type]  # refuses another model's cache
    return decode(vae, torch.stack([record.latents for record in records]), config.evaluate.batch_size)


def _clip_score(path: str | None, device: torch.device) -> Callable[[Tensor, list[str]], float] | None:
    """100 x the mean cosine of image and prompt (Hessel et al., arXiv 2104.08718, without their factor 2.5)."""
    if path is None:
        return None
    from transformers import CLIPModel, CLIPProcessor

    try:
        clip = CLIPModel.from_pretrained(path, use_safetensors=True).to(device).eval()
        processor = CLIPProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"evaluate.clip_path: {path!r} holds no CLIP model in transformers' format: {error}") from error

    @torch.no_grad()
    def score(images: Tensor, prompts: list[str]) -> float:
        cosines = []
        for at in range(0, len(prompts), 64):
            pixels = list(to_uint8(images[at : at + 64]))
            inputs = processor(
                text=prompts[at : at + 64], images=pixels, return_tensors="pt", padding=True, truncation=True
            )
            output = clip(**inputs.to(device))
            cosines.append(torch.cosine_similarity(output.image_embeds, output.text_embeds))
        return float(100 * torch.cat(cosines).mean())

    return score


def format_evaluation(result: Result) -> str:
    """The result as a table."""
    names = [("fid_teacher", "FID to teacher"), ("mse_teacher", "MSE to teacher"), ("fid_data", "FID to data"),
             ("clip_score", "CLIP score"), ("seconds_per_image", "s/image")]  # fmt: skip
    present = [
        (key, title) for key, title in names if any(key in row for kind in result.values() for row in kind.values())
    ]
    lines = [f"{'':16}" + "".join(f"{title:>16}" for _, title in present)]
    for kind, rows in result.items():
        for steps, row in rows.items():
            cells = "".join(f"{row[key]:16.4f}" if key in row else f"{'-':>16}" for key, _ in present)
            lines.append(f"{kind + ' ' + steps:16}{cells}")
    return "\n".join(lines)
