"""`scfm evaluate`: compare student, undistilled base and teacher, from the same noise."""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recipes import advice
from recipes.comparison import Comparison, Described
from recipes.figures import FIGURES, FLOOR, SINGULAR, Result, format_evaluation, is_singular
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
from scfm_core.train.config import EvaluateConfig, RunConfig
from scfm_core.train.device import compute_dtype, resolve_device
from scfm_core.train.grid import save_grid
from scfm_core.train.inputs import check_cache
from scfm_core.train.metrics import progress_bar
from scfm_core.train.parse import dump_config, with_absolute_paths
from scfm_core.train.prompts import read_prompts
from scfm_core.train.run_dir import MANIFEST, newest_complete
from scfm_core.train.runs import build_trained, open_run, open_trained
from scfm_core.train.sampling import generate, to_uint8
from scfm_core.wording import count, duration

_SAMPLER = 2
"""Changes with what a model's images are made of. 2: Flux's timesteps in bf16 are those of diffusers' pipeline."""
GRID_COLUMNS = 10
_ADVICE = "Make room there, or evaluate a copy of the run in another folder"
_PARTS = 64
"""Number of contiguous parts of the data from which samples are taken."""


def evaluate(run_dir: Path, overrides: list[str], *, student_alone: bool = False) -> Result:
    """Measure and write `RUN_DIR/evaluation.json`, `evaluation.yaml` (the settings) and `samples/evaluation.png`.

    All sets of images start from the same noise. So `mse_teacher` compares images one by one, and a student whose Frechet
    distance is below that of two independent sets of the teacher follows the teacher for each noise. A run from scratch has
    no teacher and no base: its samples are only compared with the data.

    Args:
        run_dir: the run.
        overrides: of its settings.
        student_alone: leave out the undistilled model at few steps and the noise floor, which other runs of a study have.

    Returns:
        `{"student": {"3": {...}}, "base": {...}, "teacher": {"32": {...}}}`: the figures of `recipes.figures`, those that compare
        with the teacher not for the teacher itself, and `seconds_per_image` (with decoding). `samples`, `data_samples` and `features`
        are the numbers of images, of the data's images, and of features of an image.
    """
    config = open_run(run_dir, overrides)
    settings = config.evaluate
    check_writable(run_dir, "RUN_DIR", _ADVICE)
    if settings.keep is not None:
        check_writable(Path(settings.keep).expanduser(), "evaluate.keep", "Choose another folder")
    evaluator = Evaluator(run_dir, config)
    kinds = ("student", "base") if evaluator.has_teacher and not student_alone else ("student",)
    jobs = [(kind, steps) for steps in settings.steps for kind in kinds]
    if evaluator.has_teacher:
        jobs.insert(0, ("teacher", settings.teacher_steps))
    has_floor = evaluator.has_teacher and settings.noise_floor and not student_alone
    result: Result = {kind: {} for kind in (*kinds, *(["teacher"] if evaluator.has_teacher else []))}
    grids: dict[str, Tensor] = {}
    print(evaluator.plan([*(steps for _, steps in jobs), *([settings.teacher_steps] * has_floor)]))
    kept = UnfinishedEvaluation(evaluator.folder, evaluator.key)
    with progress_bar("evaluate", evaluator.count * (len(jobs) + has_floor), unit="image") as bar:
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
                if has_floor:
                    known = {key: value for key, value in (before or ({},))[0].items() if key.endswith(FLOOR)}
                    row |= known or evaluator.noise_floor(steps)
            result[kind][str(steps)], grids[name] = row, evaluator.images[:GRID_COLUMNS] / 255
            kept.save(name, row, grids[name])
    rows = sorted(grids.items(), key=lambda row: list(result).index(row[0].split()[0]))
    try:
        with saving(run_dir / "evaluation.json", "RUN_DIR", _ADVICE):
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
        self.comparison = Comparison(settings, self.device)
        trained, family = open_trained(run_dir, config)
        dtype = compute_dtype(config)
        corpus, items, self.prompts = planned(config)
        distinct = sorted(set(self.prompts))
        # Before the network: a card may hold only one of the two.
        self.cond = self._encode(
            TextEncoders(family, config.model.text_length, dtype, self.device, config.model.encoders), distinct
        )
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        self.rows = torch.tensor([row_of[prompt] for prompt in self.prompts])
        self.model = build_trained(trained, family, config, with_teacher=True)
        self.has_teacher = not isinstance(self.model, FullModel) or "teacher" in self.model.networks
        self.folder = run_dir / ".evaluation"
        """Of an evaluation that has not ended."""
        weights = newest_complete(run_dir)
        self.checkpoint = "" if weights is None else weights.name
        known = [
            dump_config(config),
            corpus.fingerprint,
            self.prompts,
            weights and (weights / MANIFEST).read_text(encoding="utf-8"),
            list(FIGURES),
        ]
        self.key = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        """A hash of everything that the figures depend on."""
        self.vae = Autoencoder(self.model.family, dtype, self.device)
        described = self.comparison.describe(self._data_images(corpus, items))
        self.comparison.set_data(described)
        self.real = described.features
        if len(self.real) < self.count:
            print(
                f"note: fid_data compares {self.count} images with {len(self.real)}: the data have no more of this size"
            )
        if is_singular(len(self.real), self.real.shape[1]):
            print(f"note: {SINGULAR}. Raise evaluate.samples above {self.real.shape[1]}")
        self.images = torch.empty(0, dtype=torch.uint8)
        """The images of the last `measure`, uint8 [N, 3, H, W]."""
        self._last: Described | None = None
        self._has_reference = False
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
        elif role == "teacher" and not self._has_reference:
            self.images, seconds = self._load_or_make(self.folder, steps)
        else:
            self.images, seconds = self._make(role, steps)
        row, self._last = self.comparison.measure(self.images, self.prompts)
        return row | {
            "seconds_per_image": seconds / len(self.images),
            "samples": len(self.images),
            "data_samples": len(self.real),
            "features": self.real.shape[1],
        }

    def set_reference(self) -> None:
        """Compare later rows with the row that was just measured."""
        assert self._last is not None
        self.comparison.set_teacher(self.images, self._last, self.prompts)
        self._has_reference = True

    def noise_floor(self, steps: int) -> dict[str, float]:
        """The distances between the reference and the teacher's samples of the same prompts from other noise."""
        first, keep = len(self.prompts), self.config.evaluate.keep
        if keep is None:
            other, _ = self._make("teacher", steps, first)
        else:
            other, _ = self._load_or_make(Path(keep).expanduser(), steps, first)
        return self.comparison.floor(other)

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
        path = folder / f"teacher-{steps}-{self._images_key(steps, first)[:16]}.safetensors"
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

    def _images_key(self, steps: int, first: int) -> str:
        """A hash of everything that the frozen model's images depend on."""
        config, folder, sample = self.config, self.model.family.folder, self.config.sample
        known: list[Any] = [
            _SAMPLER,
            self.model.family.fingerprint,
            encoder_fingerprint(folder),
            self.prompts,
            str(self.device),
        ]
        shift = advice.shift(config, self.model.family, steps)  # a dynamic one depends on the model's scheduler
        known += [first, sample.seed, shift, sample.guidance, self.model.family.has_learned_guidance]
        noise = self.model.family.noise_dtype
        known += [str(noise)] if noise not in (None, compute_dtype(config)) else []
        known += [config.run.seed] if config.model.init == "random" else []
        formats = [sample.base, config.model.encoders]
        known += formats if formats != ["bfloat16", "bfloat16"] else []
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

    def _data_images(self, corpus: Corpus, items: list[int]) -> Iterator[Tensor]:
        """At most `evaluate.samples` images of the data, in batches in [0, 1]; cached latents are decoded."""
        if corpus.is_cached:
            check_cache(self.config, self.model.family, corpus)  # type: ignore[arg-type]
        items = items[: self.config.evaluate.samples]
        for at in range(0, len(items), self.size):
            part = collate(items[at : at + self.size], [corpus.record(item) for item in items[at : at + self.size]])
            if part.images is not None:
                yield unit_range(part.images) / 2 + 0.5
            else:
                assert part.latents is not None
                with torch.no_grad():
                    yield self.vae.decode(part.latents)


def spread(items: list[int], count: int) -> list[int]:
    """Select `count` items from evenly spaced runs of consecutive items.

    From all parts of the data, because samples of one prompt may be neighbours; in few runs, because every shard that is
    read is hashed first.
    """
    left_out, runs = max(0, len(items) - count), min(_PARTS, count)
    of_runs = (range(run * count // runs, (run + 1) * count // runs) for run in range(runs))
    chosen = [number + run * left_out // runs for run, numbers in enumerate(of_runs) for number in numbers]
    return [items[number] for number in chosen] if left_out else items


def planned(config: RunConfig, note: Callable[[str], Any] = print) -> tuple[Corpus, list[int], list[str]]:
    """What an evaluation compares: the data, the numbers of their samples of this size, and the prompt of each image.

    Args:
        config: of the run.
        note: is called if prompts are repeated, or if the data are the teacher's own images.

    Raises:
        UserError: if the data cannot be read, or have no sample of this size.
    """
    settings, data = config.evaluate, config.data
    if settings.data is not None:
        data = replace(data, path=str(Path(settings.data).expanduser()), format="auto", sources=())
    corpus = Corpus(data)
    if any(network is not None for network in corpus.networks().values()):
        note("note: the data are paths of the teacher, so fid_data compares with its images; give evaluate.data=FOLDER")
    items = corpus.items_of(config.data.resolution).tolist()
    if not items:
        raise UserError(
            f"data: no sample has data.resolution {config.data.resolution}, the size at which images are compared. "
            f"Set data.resolution to one of {corpus.sizes}"
        )
    if not any(is_remote(source.uri) for source in data.mixture()):  # remote: it would download all shards
        items = spread(items, settings.samples)
    return corpus, items, _prompts(settings, corpus, items, note)


def _prompts(settings: EvaluateConfig, corpus: Corpus, items: list[int], note: Callable[[str], Any]) -> list[str]:
    """`evaluate.samples` prompts, each `evaluate.per_prompt` times, from the file or else the data's captions; repeated if too few."""
    wanted = math.ceil(settings.samples / settings.per_prompt)
    if settings.prompts is not None:
        given = read_prompts(settings.prompts, "evaluate.prompts")
        origin = f"evaluate.prompts has {count(len(given), 'prompt')}"
    else:
        given = [corpus.caption(item) for item in spread(items[: settings.samples], wanted)]
        origin = f"the data have {count(len(given), 'caption')}"
    if len(given) < wanted:
        note(f"note: {origin}; they are repeated for evaluate.samples={settings.samples}")
    return repeated(given, settings)


def repeated(prompts: list[str], settings: EvaluateConfig) -> list[str]:
    """The prompt of each of `evaluate.samples` images: each `evaluate.per_prompt` times, and again from the first if they are too few."""
    return [prompts[i // settings.per_prompt % len(prompts)] for i in range(settings.samples)]
