"""The header of an exported safetensors file: what tools show, and what they need to sample with it."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.advice import CARD_STEPS, shift, student_guidance, teacher_guidance, weight, weight_advice
from recipes.base_model import BaseModel
from scfm_core import __version__
from scfm_core.models.formats import Format
from scfm_core.models.protocol import ModelFamily
from scfm_core.train.checkpoint import Checkpoint
from scfm_core.train.config import RunConfig
from scfm_core.train.run_dir import MANIFEST, step_of

_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is in a file of weights."""

    folded: int | None
    """The step count whose strength is in it; None: strength 1."""
    format: Format
    dtype: str
    left_out: str | None = None
    """Of the modules that are not in it: `top-level`, or a regular expression."""
    rounding_error: float = 0.0
    """Norm of the difference of all its matrix products B A from those in fp32, divided by the norm of these."""


def file_name(config: RunConfig, base: BaseModel, contents: Contents) -> str:
    """A name that tells exports apart, e.g. `scfm_flux-dev_4steps_bf16.safetensors`."""
    if contents.folded is not None:
        steps = f"_{contents.folded}step{'s' if contents.folded > 1 else ''}"
    else:
        steps = "" if config.method.step_gain is None else "_step-scaled"
    tool = "" if contents.format == "diffusers" else f"_{contents.format}"
    left_out = "_blocks" if contents.left_out == "top-level" else "_part" if contents.left_out else ""
    return f"scfm_{base.name}{steps}{tool}{left_out}_{_SHORT[contents.dtype]}.safetensors"


def describe(
    config: RunConfig, family: ModelFamily, base: BaseModel, checkpoint: Checkpoint, contents: Contents
) -> dict[str, Any]:
    """What `scfm` in a header says, for programs that sample with the file.

    `strength_by_steps` has the weights of this file; in a folded file the strength 1 is that of `folded_steps`.
    """
    gain = config.method.step_gain
    return {
        "version": __version__,
        "base_model": base.id,
        "weights": config.sample.weights,
        "trained_steps": step_of(checkpoint.path),
        "step_gain_gamma": None if gain is None else gain.gamma,
        "folded_steps": contents.folded,
        "strength_by_steps": {str(n): round(weight(config, n, contents.folded), 6) for n in CARD_STEPS},
        "shift": config.sample.shift,
        "guidance": student_guidance(config, family),
        "teacher_guidance": teacher_guidance(config, family),
        "adapters": {Path(adapter.path).name: adapter.weight for adapter in config.model.adapters},
        "text_length": config.model.text_length,
        "resolution": list(config.data.resolution),
        "rank": config.lora.rank,
        "format": contents.format,
        "dtype": contents.dtype,
        "left_out": contents.left_out,
        "rounding_error": contents.rounding_error,
    }


def header(
    config: RunConfig,
    family: ModelFamily,
    base: BaseModel,
    checkpoint: Checkpoint,
    contents: Contents,
    *,
    is_adapter: bool = True,
) -> dict[str, str]:
    """All metadata of a file: `scfm`, the keys of Stability AI's model specification, and those of kohya's trainers.

    https://github.com/Stability-AI/ModelSpec, version 1.0.1. The date is that of the checkpoint, so that the same weights make the
    same header.
    """
    height, width = config.data.resolution
    steps = contents.folded or config.sample.steps[-1]
    title = file_name(config, base, contents).removesuffix(".safetensors")
    hint = f"{weight_advice(config, contents.folded)} " if is_adapter else f"{steps} steps. "
    written = (checkpoint.path / MANIFEST).stat().st_mtime
    licence = base.license_name or base.license
    own = {
        "scfm": json.dumps(describe(config, family, base, checkpoint, contents), sort_keys=True),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": base.published.architecture + ("/lora" if is_adapter else ""),
        "modelspec.implementation": "diffusers" if contents.format == "diffusers" else "https://github.com/comfyanonymous/ComfyUI",
        "modelspec.title": title,
        "modelspec.description": f"Made with scfm {__version__}"
        + ("" if base.id is None else f" from {base.id}"),
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(written)),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.usage_hint": f"{hint}Sampler Euler, scheduler simple, shift {shift(config, family, steps):.4g}, guidance "
        f"{student_guidance(config, family):g}.",
        "modelspec.tags": "scfm, few-step, distillation",
    } | ({} if licence is None else {"modelspec.license": licence})  # fmt: skip
    if not is_adapter:
        return own
    return own | {
        "ss_base_model_version": base.published.version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.lora.rank),
        "ss_network_alpha": str(config.lora.rank),  # the scale is in the weights
        "ss_output_name": title,
    } | ({} if base.id is None else {"ss_sd_model_name": base.id})  # fmt: skip
