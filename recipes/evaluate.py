"""`scfm evaluate`: compare student, undistilled base and teacher, from the same noise."""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recipes.unfinished import UnfinishedEvaluation
from scfm_core.data.corpus import Corpus
from scfm_core.data.image import unit_range
from scfm_core.data.schema import collate
from scfm_core.data.uri import is_remote
from scfm_core.errors import UserError
from scfm_core.files import check_writable, saving, written_whole
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.fingerprint import encoder_fingerprint
from scfm_core.models.student import FullModel
from scfm_core.models.weights import save_tensors
from scfm_core.train.config import RunConfig
from scfm_core.train.device import compute_dtype, resolve_device
from scfm_core.train.features import extract, frechet_distance, load_features
from scfm_core.train.grid import save_grid
from scfm_core.train.inputs import check_cache
from scfm_core.train.metrics import progress_bar
from scfm_core.train.parse import dump_config, with_absolute_paths
from scfm_core.train.prompts import read_prompts
from scfm_core.train.run_dir import MANIFEST, newest_complete
from scfm_core.train.runs import load_trained, open_run
from scfm_core.train.sampling import generate, to_uint8
from scfm_core.wording import count, duration, number

Result = dict[str, dict[str, dict[str, float]]]
_SAMPLER = 2
"""Changes with what a model's images are made of. 2: Flux's timesteps in bf16 are those of diffusers' pipeline."""
GRID_COLUMNS = 10
SINGULAR = (
    "there are no more samples than features, so the covariance is singular: these Frechet distances can be compared with each "
    "other, not with published ones"
)
_ADVICE = "Make room there, or evaluate a copy of the run in another folder"
_PARTS = 64
"""Number of contiguous parts of the data from which samples are taken."""


def evaluate(run_dir: Path, overrides: list[str]) -> Result:
    """Measure and write `RUN_DIR/evaluation.json`, `evaluation.yaml` (the settings) and `samples/evaluation.png`.

    All sets of images start from the same noise. So `mse_teacher` compares images one by one, and a student whose Frechet
    distance is below that of two independent sets of the teacher follows the teacher for each noise. A run from scratch has
    no teacher and no base: its samples are only compared with the data.

    Returns:
        `{"student": {"3": {...}}, "base": {...}, "teacher": {"32": {...}}}`, each with `fid_teacher` and
        `mse_teacher` (not for the teacher), `fid_data`, `seconds_per_image` (with decoding), with `evaluate.clip_path`
        `clip_score`, and with `evaluate.noise_floor` the teacher's `fid_floor`. `samples`, `data_samples` and `features` are the
        numbers of images, of the data's images, and of features of an image.
    """
    config = open_run(run_dir, overrides)
    settings = config.evaluate
    check_writable(run_dir, "RUN_DIR", _ADVICE)
    if settings.keep is not None:
        check_writable(Path(settings.keep).expanduser(), "evaluate.keep", "Choose another folder")
    evaluator = Evaluator(run_dir, config)
    kinds = ("student", "base") if evaluator.has_teacher else ("student",)
    jobs = [(kind, steps) for steps in settings.steps for kind in kinds]
    if evaluator.has_teacher:
        jobs.insert(0, ("teacher", settings.teacher_steps))
    floors = int(evaluator.has_teacher and settings.noise_floor)
    result: Result = {kind: {} for kind in (*kinds, *(["teacher"] if evaluator.has_teacher else []))}
    grids: dict[str, Tensor] = {}
    print(evaluator.plan([*(steps for _, steps in jobs), *([settings.teacher_steps] * floors)]))
    kept = UnfinishedEvaluation(evaluator.folder, evaluator.key)
    with progress_bar("evaluate", evaluator.count * (len(jobs) + floors), unit="image") as bar:
        evaluator.advance = bar.update
        for kind, steps in jobs:
            bar.set_postfix_str(f"{kind}, {count(steps, 'step')}")
            name, before = f"{kind} {steps}", kept.load(f"{kind} {steps}")
            if before is not None and kind != "teacher":  # measured before this command was interrupted
                result[kind][str(steps)], grids[name] = before
                bar.update(evaluator.count)
                continue
            role = config.sample.weights if kind == "student" else "teacher"
            row = evaluator.measure(role, steps)
            if kind == "teacher":
                evaluator.set_reference()
                if settings.noise_floor:
                    row["fid_floor"] = evaluator.noise_floor(steps) if before is None else before[0]["fid_floor"]
            result[kind][str(steps)], grids[name] = row, evaluator.images[:GRID_COLUMNS] / 255
            kept.save(name, row, grids[name])
    order = sorted(grids, key=lambda name: list(result).index(name.split()[0]))
    try:
        with saving(run_dir / "evaluation.json", "RUN_DIR", _ADVICE):
            rows = [(name, grids[name]) for name in order]
            _write(run_dir, config, evaluator.checkpoint, result, rows, evaluator.prompts)
    except UserError:
        print(format_evaluation(result))  # hours of work must not be lost
        raise
    kept.remove()
    return result


def _write(
    run_dir: Path,
    config: RunConfig,
    checkpoint: str,
    result: Result,
    rows: list[tuple[str, Tensor]],
    prompts: list[str],
) -> None:
    save_grid(run_dir / "samples" / "evaluation.png", rows, prompts[:GRID_COLUMNS])
    for name, text in (
        ("evaluation.yaml", f"# checkpoint {checkpoint}\n{dump_config(with_absolute_paths(config))}"),
        ("evaluation.json", json.dumps(result, indent=2) + "\n"),
    ):
        with written_whole(run_dir / name, "RUN_DIR", _ADVICE) as path:
            path.write_text(text, encoding="utf-8")


class Evaluator:
    """Samples images and compares them. Images (uint8) and one embedding for each distinct prompt are kept on the CPU."""

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        settings = config.evaluate
        self.config, self.device, self.size = config, resolve_device(config.run.device), settings.batch_size
        self.features = load_features(settings, self.device)
        self.clip = _clip_score(settings.clip_path, self.device)
        self.model = load_trained(run_dir, config, with_teacher=True)
        self.has_teacher = not isinstance(self.model, FullModel) or "teacher" in self.model.networks
        dtype = compute_dtype(config)
        corpus = Corpus(config.data)
        items = corpus.items_of(config.data.resolution).tolist()
        if not items:
            raise UserError(
                f"data: no sample has data.resolution {config.data.resolution}, the size at which images are compared. "
                f"Set data.resolution to one of {corpus.sizes}"
            )
        if not any(is_remote(source.uri) for source in config.data.mixture()):  # remote: it would download all shards
            items = spread(items, settings.samples)
        self.prompts = _prompts(config, corpus, items)
        self.folder = run_dir / ".evaluation"
        """Of an evaluation that has not ended."""
        weights = newest_complete(run_dir)
        self.checkpoint = "" if weights is None else weights.name
        known = [
            dump_config(config),
            corpus.fingerprint,
            self.prompts,
            weights and (weights / MANIFEST).read_text(encoding="utf-8"),
        ]
        self.key = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        """A hash of everything that the figures depend on."""
        self.vae = Autoencoder(self.model.family, dtype, self.device)
        distinct = sorted(set(self.prompts))
        self.cond = self._encode(
            TextEncoders(self.model.family, config.model.text_length, dtype, self.device, config.model.encoders),
            distinct,
        )
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        self.rows = torch.tensor([row_of[prompt] for prompt in self.prompts])
        self.real = self._real_features(corpus, items)
        if len(self.real) < self.count:
            print(
                f"note: fid_data compares {self.count} images with {len(self.real)}: the data have no more of this size"
            )
        if is_singular(len(self.real), self.real.shape[1]):
            print(f"note: {SINGULAR}. Raise evaluate.samples above {self.real.shape[1]}")
        self.images = torch.empty(0, dtype=torch.uint8)
        """The images of the last `measure`, uint8 [N, 3, H, W]."""
        self._last_features = torch.empty(0)
        self._reference: tuple[Tensor, Tensor] | None = None
        self.advance: Callable[[int], Any] = lambda images: None
        """Called with the number of images after each batch."""
        self._generate(config.sample.weights, 1, 0)  # warm-up: the first call on a device is slow

    @property
    def count(self) -> int:
        """Number of images of each set."""
        return len(self.prompts)

    def plan(self, sets: list[int]) -> str:
        """What will be made, and about how long it takes. It times a batch at one step and at three.

        Args:
            sets: the step count of each set of images. Those that `evaluate.keep` may have are counted too.
        """
        seconds = []
        for steps in (1, 3):
            began = time.perf_counter()
            self._generate(self.config.sample.weights, steps, 0)
            seconds.append(time.perf_counter() - began)
        a_step = max(0.0, seconds[1] - seconds[0]) / 2
        batches = math.ceil(self.count / self.size)
        total = batches * sum(seconds[0] + (steps - 1) * a_step for steps in sets)
        return f"evaluate: {count(len(sets), 'set')} of {count(self.count, 'image')}, about {duration(total)} on {self.device}"

    def measure(self, role: str, steps: int) -> dict[str, float]:
        """Measure one row of the table; its images are in `images` until the next call."""
        kept = self.config.evaluate.keep if role == "teacher" else None
        if kept is not None:
            self.images, seconds = self._load_or_make(Path(kept).expanduser(), steps)
        elif role == "teacher" and self._reference is None:
            self.images, seconds = self._load_or_make(self.folder, steps)
        else:
            self.images, seconds = self._make(role, steps)
        self._last_features = self._features(self.images)
        row = {
            "fid_data": frechet_distance(self._last_features, self.real),
            "seconds_per_image": seconds / len(self.images),
            "samples": len(self.images),
            "data_samples": len(self.real),
            "features": self.real.shape[1],
        }
        if self._reference is not None:
            reference_images, reference_found = self._reference
            row["fid_teacher"] = frechet_distance(self._last_features, reference_found)
            pairs = zip(self.images.split(self.size), reference_images.split(self.size), strict=True)
            total = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
            row["mse_teacher"] = total / self.images.numel() / 255**2
        if self.clip is not None:
            starts = range(0, len(self.images), self.size)
            parts = [(self.images[at : at + self.size], self.prompts[at : at + self.size]) for at in starts]
            row["clip_score"] = float(torch.cat([self.clip(*part) for part in parts]).mean())
        return row

    def set_reference(self) -> None:
        """Compare later rows with the row that was just measured."""
        self._reference = self.images, self._last_features

    def noise_floor(self, steps: int) -> float:
        """Frechet distance between the reference and the teacher's samples of the same prompts from other noise."""
        assert self._reference is not None
        first, keep = len(self.prompts), self.config.evaluate.keep
        if keep is None:
            other, _ = self._make("teacher", steps, first)
        else:
            other, _ = self._load_or_make(Path(keep).expanduser(), steps, first)
        return frechet_distance(self._features(other), self._reference[1])

    def _features(self, images: Tensor) -> Tensor:
        parts = images.split(self.size)
        return torch.cat([extract(self.features, part / 255, self.device, self.size) for part in parts])

    def _make(self, role: str, steps: int, first: int = 0) -> tuple[Tensor, float]:
        """Images of `role` for all prompts, from the noise of the seeds from `first` on; and the time in seconds."""
        began = time.perf_counter()
        parts = []
        for at in range(0, self.count, self.size):
            parts.append(to_uint8(self._generate(role, steps, at, first)))
            self.advance(len(parts[-1]))
        return torch.cat(parts), time.perf_counter() - began

    def _load_or_make(self, folder: Path, steps: int, first: int = 0) -> tuple[Tensor, float]:
        """The frozen model's images, made once for all runs with the same model, prompts and settings; and their time."""
        path = folder / f"teacher-{steps}-{self._images_key(first)[:16]}.safetensors"
        if path.is_file():
            try:
                with safe_open(path, "pt") as file:
                    images, seconds = file.get_tensor("images"), float(file.metadata()["seconds"])
                self.advance(len(images))
                return images, seconds
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"evaluate.keep: {path} is damaged ({error}). Delete it; it will be made again"
                ) from error
        images, seconds = self._make("teacher", steps, first)
        # In the run's own folder they only serve a second start: a full disk is no reason to end.
        with (
            contextlib.suppress(UserError) if folder == self.folder else contextlib.nullcontext(),
            written_whole(path, "evaluate.keep", "Make room, or choose another folder") as partial,
        ):
            save_tensors(partial, {"images": images}, {"seconds": repr(seconds)})
        return images, seconds

    def _images_key(self, first: int) -> str:
        """A hash of everything that the frozen model's images depend on."""
        config, folder, sample = self.config, self.model.family.folder, self.config.sample
        known: list[Any] = [
            _SAMPLER,
            self.model.family.fingerprint,
            encoder_fingerprint(folder),
            self.prompts,
            str(self.device),
        ]
        known += [first, sample.seed, sample.shift, sample.guidance, self.model.family.has_learned_guidance]
        known += [config.run.seed] if config.model.init == "random" else []
        known += [config.data.resolution, config.model.text_length, config.train.compute_dtype]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    @torch.no_grad()
    def _generate(self, role: str, steps: int, at: int, first: int = 0) -> Tensor:
        rows = self.rows[at : at + self.size]
        seeds = [self.config.sample.seed + first + at + i for i in range(len(rows))]
        return generate(self.config, self.model, role, self.vae, self.cond[rows.tolist()].to(self.device), seeds, steps)

    def _encode(self, text: TextEncoders, prompts: list[str]) -> Conditioning:
        guidance = self.config.sample.guidance
        starts = range(0, len(prompts), self.size)
        parts = [text.encode(prompts[at : at + self.size], guidance).to("cpu") for at in starts]
        return Conditioning.cat(parts)

    @torch.no_grad()
    def _real_features(self, corpus: Corpus, items: list[int]) -> Tensor:
        """Features of at most `evaluate.samples` images of the data; cached latents are decoded."""
        if corpus.is_cached:
            check_cache(self.config, self.model.family, corpus)  # type: ignore[arg-type]
        found, items = [], items[: self.config.evaluate.samples]
        for at in range(0, len(items), self.size):
            part = collate(items[at : at + self.size], [corpus.record(item) for item in items[at : at + self.size]])
            if part.images is not None:
                images = unit_range(part.images) / 2 + 0.5
            else:
                assert part.latents is not None
                images = self.vae.decode(part.latents)
            found.append(extract(self.features, images, self.device, self.size))
        return torch.cat(found)


def is_singular(samples: int, features: int) -> bool:
    """Whether the covariance of so many samples is singular."""
    return samples <= features


def spread(items: list[int], count: int) -> list[int]:
    """Select `count` items from evenly spaced runs of consecutive items.

    From all parts of the data, because samples of one prompt may be neighbours; in few runs, because every shard that is
    read is hashed first.
    """
    left_out, runs = max(0, len(items) - count), min(_PARTS, count)
    of_runs = (range(run * count // runs, (run + 1) * count // runs) for run in range(runs))
    chosen = [number + run * left_out // runs for run, numbers in enumerate(of_runs) for number in numbers]
    return [items[number] for number in chosen] if left_out else items


def _prompts(config: RunConfig, corpus: Corpus, items: list[int]) -> list[str]:
    """`evaluate.samples` prompts, from the file or else the data's captions, repeated if there are too few."""
    wanted = config.evaluate.samples
    if config.evaluate.prompts is not None:
        given = read_prompts(config.evaluate.prompts, "evaluate.prompts")
        origin = f"evaluate.prompts has {count(len(given), 'prompt')}"
    else:
        given = [corpus.caption(item) for item in items[:wanted]]
        origin = f"the data have {count(len(given), 'caption')}"
    if len(given) < wanted:
        print(f"note: {origin}; they are repeated for evaluate.samples={wanted}")
    return [given[i % len(given)] for i in range(wanted)]


def _clip_score(path: str | None, device: torch.device) -> Callable[[Tensor, list[str]], Tensor] | None:
    """100 x the cosine of image and prompt, [N] (Hessel et al., arXiv 2104.08718, without their factor 2.5)."""
    if path is None:
        return None
    from transformers import CLIPModel, CLIPProcessor

    try:
        clip = CLIPModel.from_pretrained(path, use_safetensors=True).to(device).eval()
        processor = CLIPProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"evaluate.clip_path: {path!r} holds no CLIP model in transformers' format: {error}") from error

    @torch.no_grad()
    def score(images: Tensor, prompts: list[str]) -> Tensor:
        inputs = processor(text=prompts, images=list(images), return_tensors="pt", padding=True, truncation=True)
        output = clip(**inputs.to(device))
        return 100 * torch.cosine_similarity(output.image_embeds, output.text_embeds).cpu()

    return score


def format_evaluation(result: Result) -> str:
    """The result as a table."""
    names = [("fid_teacher", "FID to teacher"), ("mse_teacher", "MSE to teacher"), ("fid_data", "FID to data"), ("fid_floor", "noise floor"),
             ("clip_score", "CLIP score"), ("seconds_per_image", "s/image")]  # fmt: skip
    present = [
        (key, title) for key, title in names if any(key in row for kind in result.values() for row in kind.values())
    ]
    lines = [f"{'':16}" + "".join(f"{title:>16}" for _, title in present)]
    for kind, rows in result.items():
        for steps, row in rows.items():
            cells = "".join(f"{number(row[key]) if key in row else '-':>16}" for key, _ in present)
            lines.append(f"{kind + ' ' + steps:16}{cells}")
    return "\n".join(lines)
