"""Adapters of `scfm export` in the pipelines of diffusers: the header of their file, and calls that set their weight."""

import dataclasses
import functools
import inspect
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scfm_core.errors import UserError
from scfm_core.models.families import family_of_pipeline
from scfm_core.models.fused_base import FusedAdapter, adapter_file, read_adapter
from scfm_core.models.protocol import ModelFamily
from scfm_core.scfm.method import StepGain, sampling_strength
from scfm_core.train.config import SampleConfig
from scfm_core.train.sampling import sampling_shift

_NAME = "scfm"
"""Of the adapter in a pipeline."""
_FUSED = "scfm_style"
"""Of the adapters of `model.adapters` in a pipeline, before their number."""
_STEPS = 4
"""Of a call without `num_inference_steps`."""


@dataclass(frozen=True)
class AdapterHeader:
    """What `scfm export` writes into the header of an adapter's file, under `scfm`."""

    base_model: str | None
    """Hub id; None: the base was a local folder."""
    step_gain_gamma: float | None
    """gamma of step-scaled adapters; None: the weight does not depend on the step count."""
    shift: float | Literal["dynamic"]
    guidance: float
    """Of the student."""
    text_length: int
    resolution: tuple[int, int]
    teacher_guidance: float
    adapters: dict[str, float] = field(default_factory=dict)
    """File names and weights of the adapters that were fused into the base model."""
    folded_steps: int | None = None
    """The step count whose weight is folded into the factors; None: the factors have weight 1."""

    def strength(self, steps: int) -> float:
        """The adapter's weight for a number of steps.

        Raises:
            UserError: if the file is folded for another number.
        """
        if self.folded_steps is not None:
            if steps != self.folded_steps and self.step_gain_gamma is not None:
                raise UserError(
                    f"this adapter is folded for {self.folded_steps} steps, and cannot be used with {steps}. Export one for {steps} "
                    f"steps, or one for all: `scfm export RUN`"
                )
            return 1.0
        return sampling_strength(None if self.step_gain_gamma is None else StepGain(gamma=self.step_gain_gamma), steps)


def read_header(path: str | Path) -> AdapterHeader:
    """The header of an adapter.

    Raises:
        UserError: if the file is missing or damaged, or not of `scfm export`.
    """
    from safetensors import SafetensorError, safe_open

    file = adapter_file(path)
    try:
        with safe_open(file, "pt") as content:
            values = json.loads((content.metadata() or {})["scfm"])
        values.setdefault("teacher_guidance", values["guidance"])
        names = [field.name for field in dataclasses.fields(AdapterHeader) if field.name in values]
        header = AdapterHeader(**{name: values[name] for name in names})
        return dataclasses.replace(header, resolution=(int(values["resolution"][0]), int(values["resolution"][1])))
    except (OSError, SafetensorError) as error:
        raise UserError(f"the adapter {file} cannot be read ({error})") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{file} is not an adapter of `scfm export`: its header has no settings of scfm ({type(error).__name__}: {error}). For other "
            f"adapters use `load_lora_weights` of diffusers"
        ) from error


def with_steps(pipe: Any, adapter: str | Path, *, styles: Mapping[str | Path, float] | None = None) -> Any:
    """Load an adapter into a pipeline of diffusers, so that `num_inference_steps` sets its weight on each call.

    Each call also gets the sigmas, the scheduler, the guidance, the number of text tokens and the size of the training, unless the
    call has own ones (the scheduler is always set). `num_inference_steps` is 4 if it is not given; `adapter_weight=0` is the base
    model. Other adapters of the pipeline stay as they are. `unload_lora_weights` also gives the calls and the scheduler back that the
    pipeline had before.

    Args:
        pipe: a pipeline with the adapter's base model, or a fine-tune of it. It is changed in place.
        adapter: safetensors file of `scfm export`, or a folder with one.
        styles: files and weights of other LoRAs, such as those that the adapter was distilled with. They change the network as in
            `model.adapters`; diffusers' own loader loses layers of some files, and scales some by other ranks than their own.

    Returns:
        `pipe`.

    Raises:
        UserError: if the file is not an adapter of `scfm export`, or was made for another model than the pipeline's; if a style
            cannot be read, or its weight is 0 or not finite.
    """
    header, path = read_header(adapter), adapter_file(adapter)
    own = getattr(type(pipe), "_scfm_original", type(pipe))
    family = family_of_pipeline(pipe)
    factors = read_adapter(path, family.other_tools, pipe.transformer)
    load_fused(pipe, _styles(styles or {}))
    if header.adapters and not pipe.get_list_adapters():
        names = ", ".join(f"{name} (weight {weight:g})" for name, weight in header.adapters.items())
        warnings.warn(
            f"{path} was distilled on its base model together with {names}, which this pipeline does not have. Give it: "
            f"`with_steps(pipe, ..., styles={header.adapters})`",
            stacklevel=2,
        )
    _remove(pipe, _NAME)
    _add_adapters(pipe, {_NAME: factors})
    steps = _Steps(header, family, getattr(pipe, "_scfm_scheduler", pipe.scheduler), tuple(factors))
    signature = inspect.signature(own.__call__)

    @functools.wraps(own.__call__)
    def call(self: Any, *args: Any, adapter_weight: float | None = None, **kwargs: Any) -> Any:
        given = dict(signature.bind_partial(self, *args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        given.pop("self")
        return own.__call__(self, **steps.prepare(self, given, adapter_weight))

    @functools.wraps(own.unload_lora_weights)
    def unload(self: Any, *args: Any, **kwargs: Any) -> Any:
        object.__setattr__(self, "__class__", own)
        object.__delattr__(self, "_scfm_scheduler")
        self.scheduler = steps.scheduler
        return self.unload_lora_weights(*args, **kwargs)

    # The same object and name: `to`, `save_pretrained` and what else the pipeline has work as before.
    methods = {"__call__": call, "unload_lora_weights": unload, "__module__": own.__module__, "_scfm_original": own}
    object.__setattr__(pipe, "__class__", type(own.__name__, (own,), methods))
    object.__setattr__(pipe, "_scfm_scheduler", steps.scheduler)
    return pipe


@dataclass(frozen=True)
class _Steps:
    """Prepares the calls of a pipeline."""

    header: AdapterHeader
    family: ModelFamily
    scheduler: Any
    """The pipeline's own."""
    modules: tuple[str, ...]
    """Names of the linears that have the adapter."""

    def prepare(self, pipe: Any, given: dict[str, Any], weight: float | None) -> dict[str, Any]:
        """Set weight and scheduler; returns the arguments of the call."""
        header, family = self.header, self.family
        sigmas, asked = given.get("sigmas"), given.get("num_inference_steps")
        count = asked or (None if sigmas is None else len(sigmas)) or header.folded_steps or _STEPS
        if sigmas is not None and len(sigmas) != count:
            raise UserError(f"{len(sigmas)} sigmas are not {count} steps (num_inference_steps). Give one of them")
        weight = header.strength(count) if weight is None else weight
        layers = _layers(pipe.transformer)
        self._check(layers, weight)
        for layer in layers.values():
            if _NAME in layer.scaling and _NAME not in layer.active_adapters:
                layer.set_adapter([*layer.active_adapters, _NAME], inference_mode=True)
            layer.set_scale(_NAME, weight)
        size = given.get("height") or header.resolution[0], given.get("width") or header.resolution[1]
        pipe.scheduler = self._scheduler(size, count)
        name = next(iter(family.call_arguments(header.guidance, header.text_length)))
        guidance = given.get(name)
        call = family.call_arguments(header.guidance if guidance is None else guidance, header.text_length)
        usual = {"sigmas": [1 - k / count for k in range(count)], "height": size[0], "width": size[1], **call}
        return {**usual, **given, "num_inference_steps": count}

    def _check(self, layers: Mapping[str, Any], weight: float) -> None:
        """UserError if a method of the pipeline has changed the adapter, so that its weight would have no effect."""
        own = [layers[name] for name in self.modules if name in layers and _NAME in layers[name].scaling]
        if any(layer.merged for layer in own):
            raise UserError(
                "`fuse_lora` fixed the weight of the adapter in this pipeline, so it cannot follow the number of steps. Call "
                "`pipe.unfuse_lora()`. To fuse another adapter: `fuse_lora` and `unload_lora_weights` before `with_steps`"
            )
        if weight != 0 and len(own) < len(self.modules):
            raise UserError(
                "the adapter of `with_steps` is no longer in this pipeline (`delete_adapters`, or another transformer). Call `with_steps` "
                "again; for the base model give `adapter_weight=0`; for the pipeline as it was call `unload_lora_weights`"
            )
        if weight != 0 and any(layer.disable_adapters for layer in own):
            raise UserError(
                "`disable_lora` switched all adapters of this pipeline off. Call `pipe.enable_lora()`; for the base model give "
                "`adapter_weight=0`"
            )

    def _scheduler(self, size: tuple[int, int], count: int) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        own = self.scheduler
        is_euler = isinstance(own, FlowMatchEulerDiscreteScheduler) and not own.config.get("shift_terminal")
        if self.header.shift == "dynamic" and is_euler and own.config.get("use_dynamic_shifting"):
            return own
        shift = shift_of(self.header.shift, self.family, size, count)
        return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)


def _styles(styles: Mapping[str | Path, float]) -> list[FusedAdapter]:
    try:
        return [FusedAdapter(path=str(path), weight=weight) for path, weight in styles.items()]
    except ValueError as error:
        raise UserError(f"`styles` of `with_steps`: {error}") from error


def load_fused(pipe: Any, adapters: Sequence[FusedAdapter]) -> None:
    """Load the adapters of `model.adapters` into a pipeline, which is the same as fusing them. Others stay as they are.

    Raises:
        UserError: as `read_adapter`.
    """
    tools = family_of_pipeline(pipe).other_tools
    factors = [read_adapter(adapter.file, tools, pipe.transformer) for adapter in adapters]
    if not adapters:
        return
    _remove(pipe, rf"{_FUSED}\d+")
    _add_adapters(pipe, {f"{_FUSED}{number}": own for number, own in enumerate(factors)})
    for layer in _layers(pipe.transformer).values():
        for number, adapter in enumerate(adapters):
            layer.set_scale(f"{_FUSED}{number}", adapter.weight)


def shift_of(shift: Any, family: ModelFamily, size: tuple[int, int], steps: int) -> float:
    """`sample.shift` as a number, for images of a size (height, width) in pixels."""
    latents = torch.empty(1, *family.latent_shape(*size), device="meta")
    return sampling_shift(SampleConfig(shift=shift), family, latents, steps)


def _layers(network: Any) -> dict[str, Any]:
    """The layers with adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def _remove(pipe: Any, names: str) -> None:
    """Delete the adapters whose whole names match a regular expression."""
    for name in pipe.get_list_adapters().get("transformer", []):
        if re.fullmatch(names, name):
            pipe.delete_adapters(name)


def _add_adapters(pipe: Any, adapters: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> None:
    """Load the factors of each adapter at weight 1. Other adapters keep their weights and stay active."""
    # A layer may name an adapter that was deleted, and would add one twice that it names twice.
    active = {
        name: [own for own in layer.active_adapters if own not in adapters and own in layer.scaling]
        for name, layer in _layers(pipe.transformer).items()
    }
    for name, factors in adapters.items():
        _load(pipe, name, factors)
    for name, layer in _layers(pipe.transformer).items():
        layer.set_adapter([*active.get(name, []), *adapters], inference_mode=True)


def _load(pipe: Any, name: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Load the factors of `read_adapter` into the transformer. At weight 1 they add `B A`, whatever their ranks."""
    state = {
        f"transformer.{module}.lora_{side}.weight": factor
        for module, both in factors.items()
        for side, factor in zip("AB", both, strict=True)
    }
    # PEFT multiplies by alpha / rank, with one alpha for all linears unless it has patterns. `^`: only the whole name matches.
    ranks = {f"^{re.escape(module)}": len(down) for module, (down, _) in factors.items()}
    rank = next(iter(ranks.values()))
    patterns = {pattern: own for pattern, own in ranks.items() if own != rank}
    settings = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "target_modules": list(factors),
    }
    metadata = {f"transformer.{key}": value for key, value in settings.items()}
    pipe.transformer.load_lora_adapter(
        state, adapter_name=name, metadata=metadata, _pipeline=pipe, low_cpu_mem_usage=True
    )
