"""scfm from Python: images from a run or from an exported adapter, and pipelines of diffusers that sample in a few steps.

`scfm_core` offers `load` and `with_steps`; README.md shows their use.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from scfm_core.errors import UserError
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.families import family_of_pipeline
from scfm_core.models.fused_base import adapter_file
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.student import FullModel
from scfm_core.models.weights import resolve_folder
from scfm_core.scfm.method import sampling_strength
from scfm_core.train.config import RunConfig
from scfm_core.train.device import compute_dtype, on_device, resolve_device
from scfm_core.train.pipelines import load_fused, read_header, shift_of
from scfm_core.train.pipelines import with_steps as with_steps
from scfm_core.train.runs import load_trained, open_run
from scfm_core.train.sampling import generate, to_uint8
from scfm_core.wording import count

_BATCH = 8
"""Images of one call of a pipeline."""


def load(
    path: str | Path, *, overrides: Sequence[str] = (), base: str | None = None, device: str = "auto"
) -> "FewStepModel":
    """Load a run's newest checkpoint, or an adapter that `scfm export` wrote, with its base model.

    Args:
        path: folder of a run (`run.dir`), safetensors file of an adapter, or a folder with one.
        overrides: of a run: changes of its configuration, such as `sample.weights=ema_slow`.
        base: of an adapter: its base model, a hub id or a folder; None: the one that the file names, or that of the run in whose
            folder it is.
        device: `auto` (a GPU if there is one), `cuda`, `cuda:1`, `cpu`.

    Raises:
        UserError: if there is neither a run with a checkpoint nor an adapter, or the base model is missing or another one.
    """
    folder = Path(path).expanduser()
    if (folder / "config.yaml").is_file():
        chosen = [] if device == "auto" else [f"run.device={device}"]
        return RunModel(folder, [*overrides, *chosen])
    if overrides:
        raise UserError(f"{path} is not a run, which `overrides` are for")
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{path} is neither a run (it has no config.yaml) nor the folder of an adapter (it has no .safetensors file). Give the "
            f"run.dir of a `scfm train`, or what `scfm export` wrote"
        )
    return AdapterModel(folder, base, device)


@dataclass(frozen=True)
class _Job:
    """What `FewStepModel.sample` was asked for, checked: a seed for each prompt, and the `settings` of all."""

    prompts: list[str]
    seeds: list[int]
    settings: dict[str, Any]
    undistilled: bool
    before_step: Callable[[], None]


class FewStepModel(ABC):
    """A base model with a trained student."""

    family: ModelFamily

    def settings(
        self,
        *,
        steps: int = 4,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float | None = None,
        undistilled: bool = False,
    ) -> dict[str, Any]:
        """What the images of `sample` depend on, beside prompt and seed: steps, strength, guidance, shift, width, height, ..."""
        resolution, shift, usual = self._trained(undistilled=undistilled)
        size = height or resolution[0], width or resolution[1]
        if undistilled:
            strength = 0.0
        elif strength is None:
            strength = self._strength(steps)
        return {
            "steps": steps,
            "strength": strength,
            "guidance": usual if guidance is None else guidance,
            "shift": shift_of(shift, self.family, size, steps),
            "width": size[1],
            "height": size[0],
        }

    @abstractmethod
    def _trained(self, *, undistilled: bool) -> tuple[tuple[int, int], float | str, float]:
        """Height and width, shift, and guidance of the training."""

    @abstractmethod
    def _strength(self, steps: int) -> float:
        """Of the adapter, for a number of steps."""

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int = 4,
        seed: int | Sequence[int] = 0,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float | None = None,
        undistilled: bool = False,
        before_step: Callable[[], None] | None = None,
    ) -> list[Image.Image]:
        """Sample an image for each prompt.

        Args:
            prompts: one, or several.
            steps: Euler steps.
            seed: image i starts from the noise of `torch.Generator().manual_seed(seed + i)`, as in a diffusers pipeline. Or a seed
                for each image.
            guidance: in the convention of the model's pipeline; None: the one of the training.
            height: in pixels; None: that of the training.
            width: as height.
            strength: of the adapter; None: the one that was trained for this number of steps.
            undistilled: sample from the base model, without the adapter; with many steps it is the teacher.
            before_step: called before each step. What it raises ends the sampling.

        Raises:
            UserError: if an argument is invalid, or if there is no base model.
        """
        rows = [prompts] if isinstance(prompts, str) else list(prompts)
        if not rows:
            raise UserError("there is no prompt")
        if steps < 1:
            raise UserError(f"steps must be at least 1, got {steps}")
        settings = self.settings(
            steps=steps, guidance=guidance, height=height, width=width, strength=strength, undistilled=undistilled
        )
        self.family.latent_shape(settings["height"], settings["width"])
        seeds = [seed + i for i in range(len(rows))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(rows):
            raise UserError(
                f"{count(len(rows), 'prompt')} and {count(len(seeds), 'seed')}: give a seed for each prompt, or one number"
            )
        return self._sample(_Job(rows, seeds, settings, undistilled, before_step or (lambda: None)))

    @abstractmethod
    def _sample(self, job: _Job) -> list[Image.Image]: ...


class RunModel(FewStepModel):
    """The weights of `sample.weights` of a run, and its teacher."""

    def __init__(self, run_dir: Path, overrides: Sequence[str] = (), *, with_teacher: bool = True) -> None:
        self.config = open_run(run_dir, list(overrides))
        self.model = load_trained(run_dir, self.config, with_teacher=with_teacher)
        self.family = self.model.family
        self._device, dtype = resolve_device(self.config.run.device), compute_dtype(self.config)
        self._text = TextEncoders(
            self.family, self.config.model.text_length, dtype, self._device, self.config.model.encoders
        )
        self._vae = Autoencoder(self.family, dtype, self._device)

    def _trained(self, *, undistilled: bool) -> tuple[tuple[int, int], float | str, float]:
        config = self.config
        return config.data.resolution, config.sample.shift, config.sample.guidance

    def _strength(self, steps: int) -> float:
        return sampling_strength(self.config.method.step_gain, steps)

    def _sample(self, job: _Job) -> list[Image.Image]:
        if job.undistilled and isinstance(self.model, FullModel) and "teacher" not in self.model.networks:
            raise UserError(f"the run {self.config.run.dir} has no teacher: it trained full weights from data alone")
        settings = job.settings
        with on_device(self._device):
            images = generate(
                self.config,
                self.model,
                "teacher" if job.undistilled else self.config.sample.weights,
                self._vae,
                self._text.encode(job.prompts, settings["guidance"]),
                job.seeds,
                settings["steps"],
                None if job.undistilled else settings["strength"],
                size=(settings["height"], settings["width"]),
                before_step=job.before_step,
            )
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in to_uint8(images)]


class AdapterModel(FewStepModel):
    """An exported adapter on its base model, in the pipeline of diffusers."""

    def __init__(self, path: Path, base: str | None = None, device: str = "auto") -> None:
        import diffusers
        from diffusers.utils import logging

        self.header = read_header(path)
        run = _run_of(path)
        found = base or self.header.base_model or (None if run is None else run.model.path)
        if found is None:
            raise UserError(
                f"the adapter {path} names no base model, because that was a folder. Give it: `load(..., base=...)`, or "
                f"`scfm play ... --model MODEL`"
            )
        if self.header.adapters and run is None:
            raise UserError(
                f"{path} was distilled on its base model together with {', '.join(self.header.adapters)}: load all into a pipeline of "
                f"diffusers, with `with_steps(pipe, {str(path)!r}, styles={self.header.adapters})`"
            )
        self.base: str = found
        """Hub id or folder of the base model."""
        target, folder = resolve_device(device), resolve_folder(found)
        logging.disable_progress_bar()  # "Loading pipeline components"
        dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
        except Exception as error:  # a damaged file can raise any type
            raise UserError(
                f"the base model in {folder} cannot be loaded ({type(error).__name__}: {error}). If a file is missing or damaged, download it again"
            ) from error
        if run is not None:
            load_fused(pipe, run.model.adapters)
        self.pipe = with_steps(pipe.to(target), path)
        self.pipe.set_progress_bar_config(disable=True)
        self.family = family_of_pipeline(pipe)

    def _trained(self, *, undistilled: bool) -> tuple[tuple[int, int], float | str, float]:
        header = self.header
        return header.resolution, header.shift, header.teacher_guidance if undistilled else header.guidance

    def _strength(self, steps: int) -> float:
        return self.header.strength(steps)

    def _sample(self, job: _Job) -> list[Image.Image]:
        def end_of_step(*_: Any) -> dict[str, Any]:
            job.before_step()
            return {}

        job.before_step()
        settings = job.settings
        images: list[Image.Image] = []
        call = self.family.call_arguments(settings["guidance"], self.header.text_length)
        for at in range(0, len(job.prompts), _BATCH):
            generators = [torch.Generator().manual_seed(seed) for seed in job.seeds[at : at + _BATCH]]
            images += self.pipe(
                prompt=job.prompts[at : at + _BATCH],
                num_inference_steps=settings["steps"],
                adapter_weight=settings["strength"],
                height=settings["height"],
                width=settings["width"],
                generator=generators,
                callback_on_step_end=end_of_step,
                **call,
            ).images
        return images


def _run_of(path: Path) -> RunConfig | None:
    """The run in whose folder `adapter/` an adapter is; None if it is elsewhere."""
    folder = adapter_file(path).absolute().parent
    is_of_run = folder.name == "adapter" and (folder.parent / "config.yaml").is_file()
    return open_run(folder.parent, []) if is_of_run else None
