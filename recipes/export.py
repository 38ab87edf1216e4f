"""`scfm export`: the trained weights in diffusers' formats."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm_core.errors import UserError
from scfm_core.files import check_writable, saving
from scfm_core.models.adapters import merge
from scfm_core.models.fused_base import describe
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.weights import ADAPTER_FILE, component_config, save_adapter, save_pipeline
from scfm_core.scfm.method import sampling_strength
from scfm_core.train.checkpoint import Checkpoint
from scfm_core.train.config import RunConfig
from scfm_core.train.device import compute_dtype
from scfm_core.train.runs import open_run, open_trained
from scfm_core.train.sampling import sampling_shift

_ADVICE = "Make room there, or export a copy of the run; with --merged, choose another folder"
_CARD_STEPS = (1, 2, 3, 4, 6, 8, 16)


def export(run_dir: Path, overrides: list[str], *, merged: Path | None, num_steps: int | None) -> Path:
    """Write `RUN_DIR/adapter`, or with `merged` a complete pipeline whose transformer has the trained weights.

    Args:
        run_dir: the run.
        overrides: changes of its configuration, e.g. `sample.weights=ema_slow`.
        merged: folder of the new pipeline.
        num_steps: of a step-scaled adapter: the step count for which it is merged.

    Raises:
        UserError: if the weights cannot be exported in this way, or the target exists.
    """
    config = open_run(run_dir, overrides)
    if merged is None and config.train.weights == "full":
        raise UserError("this run trained full weights, which cannot be exported as an adapter: give --merged FOLDER")
    if merged is not None and config.method.step_gain is not None and num_steps is None:
        raise UserError(
            "this adapter's strength depends on the number of steps, which merging fixes: choose the step count with --steps N"
        )
    if num_steps is not None and (merged is None or config.method.step_gain is None):
        raise UserError(
            "--steps is for merging a step-scaled adapter (method.step_gain): here the strength does not depend on the step count. Omit --steps"
        )
    if num_steps is not None and num_steps < 1:
        raise UserError(f"--steps must be at least 1, got {num_steps}")
    target = run_dir / "adapter" if merged is None else merged
    if merged is not None and merged.exists():
        raise UserError(f"{merged} exists already; choose another folder, or delete it")
    check_writable(target if merged is None else target.absolute().parent, "the export", _ADVICE)
    checkpoint, family = open_trained(run_dir, config)
    if merged is None:
        return _export_adapter(run_dir, config, checkpoint, family)
    shift = _merged_shift(config, family, num_steps or config.sample.steps[-1])
    weights = _merged_weights(config, checkpoint, family, sampling_strength(config.method.step_gain, num_steps or 1))
    learned = config.method.distil_guidance
    with saving(merged, "the export", _ADVICE, merged.with_name(f".{merged.name}.tmp")):
        save_pipeline(family.folder, merged, weights, compute_dtype(config), shift, has_learned_guidance=learned)
    return merged


def _merged_shift(config: RunConfig, family: ModelFamily, num_steps: int) -> float | None:
    """The fixed shift of a merged pipeline's scheduler. None: its own scheduler samples as we do, with a dynamic shift."""
    scheduler = component_config(family.folder, "scheduler", "scheduler_config.json")
    has_our_grid = scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler" and not scheduler.get("shift_terminal")
    if config.sample.shift == "dynamic" and has_our_grid and scheduler.get("use_dynamic_shifting"):
        return None
    latents = torch.empty(1, *family.latent_shape(*config.data.resolution), device="meta")
    return sampling_shift(config.sample, family, latents, num_steps)


def _export_adapter(run_dir: Path, config: RunConfig, checkpoint: Checkpoint, family: ModelFamily) -> Path:
    """Write `RUN_DIR/adapter`: safetensors for `load_lora_weights`, and a README that explains their use."""
    folder = run_dir / "adapter"
    scale = config.lora.alpha / config.lora.rank
    partial = (folder / ADAPTER_FILE).with_suffix(".tmp")
    with saving(folder, "the export", _ADVICE, partial, *([] if any(folder.iterdir()) else [folder])):
        save_adapter(folder, checkpoint.reader.group(config.sample.weights), scale, adapter_metadata(config, family))
        (folder / "README.md").write_text(adapter_card(config, family), encoding="utf-8")
    return folder


def _merged_weights(
    config: RunConfig, checkpoint: Checkpoint, family: ModelFamily, strength: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of the exported network by name. Only one is in memory at a time."""
    reader, role = checkpoint.reader, config.sample.weights
    if config.train.weights == "full":
        for name, weight in family.read_weights():  # also buffers, which the run does not train
            yield name, reader.tensor(f"{role}.{name}") if name in checkpoint.state["shapes"] else weight
        return
    scale = strength * config.lora.alpha / config.lora.rank
    for name, weight in family.read_weights():
        module = name.removesuffix(".weight")
        if f"{role}.{module}.lora_A.weight" in reader.shapes and name.endswith(".weight"):
            down, up = (reader.tensor(f"{role}.{module}.lora_{side}.weight") for side in "AB")
            yield name, merge(weight.to(compute_dtype(config)), down, up, scale)
        else:
            yield name, weight


def adapter_metadata(config: RunConfig, family: ModelFamily) -> dict[str, Any]:
    """Metadata of the adapter, for tools that sample with it."""
    gain = config.method.step_gain
    return {
        "base_model": config.model.path,
        "step_gain_gamma": None if gain is None else gain.gamma,
        "strength_by_steps": {str(n): round(sampling_strength(gain, n), 6) for n in _CARD_STEPS},
        "shift": config.sample.shift,
        "guidance": student_guidance(config, family),
        "teacher_guidance": config.sample.guidance,
        "adapters": {Path(adapter.path).name: adapter.weight for adapter in config.model.adapters},
        "text_length": config.model.text_length,
        "resolution": list(config.data.resolution),
    }


def student_guidance(config: RunConfig, family: ModelFamily) -> float:
    """The scale of guidance for the student; the one of a single pass if the student has learned guidance."""
    return (
        family.neutral_guidance
        if config.method.distil_guidance or family.has_learned_guidance
        else config.sample.guidance
    )


def _advice(config: RunConfig, family: ModelFamily) -> str:
    """How to set the adapter's weight and the guidance, as text."""
    gain, method = config.method.step_gain, config.method
    advice = "Use weight 1 at every step count."
    if gain is not None:
        advice = (
            f"The adapter's weight carries the step size: for N steps use N^-gamma, gamma = {gain.gamma:g}. Weight 0 is the "
            f"original model."
        )
    if method.distil_guidance:
        fewer_steps = "" if method.has_trajectory else ", not fewer steps"
        return (
            f"{advice} It has learned guidance {method.guidance[0]:g}{fewer_steps}: set the guidance as below, which is one "
            f"pass of the network a step."
        )
    if family.has_learned_guidance:
        return f"{advice} The base model has learned its guidance: set the guidance as below, which is one pass of the network a step."
    if family.passes == 2 and method.has_stored_paths:
        return (
            f"{advice} The adapter has learned guided paths of the teacher: use the guidance of those paths, two passes "
            f"of the network a step."
        )
    if family.passes == 2 and method.student_is_guided:
        return (
            f"{advice} The adapter was trained with guidance between {method.guidance[0]:g} and "
            f"{method.guidance[1]:g}: use a scale in this range, two passes of the network a step."
        )
    return advice


def adapter_card(config: RunConfig, family: ModelFamily) -> str:
    """The README beside the adapter."""
    gain, sample, method = config.method.step_gain, config.sample, config.method
    height, width = config.data.resolution
    is_guidance_only = method.distil_guidance and not method.has_trajectory
    steps = sample.steps[-1] if is_guidance_only else 3
    weight = sampling_strength(gain, steps)
    title = "An adapter with built-in guidance" if is_guidance_only else "A few-step adapter"
    rows = "\n".join(f"| {n} | {sampling_strength(gain, n):.3f} |" for n in _CARD_STEPS)
    table = "" if is_guidance_only else f"| steps | weight |\n|---|---|\n{rows}\n\n"
    shift = sampling_shift(sample, family, torch.empty(1, *family.latent_shape(height, width), device="meta"), steps)
    of_size = f"  # of {steps} steps at {height} x {width}" if sample.shift == "dynamic" else ""
    call = family.call_arguments(student_guidance(config, family), config.model.text_length)
    arguments = "\n".join(f"    {name}={value!r}," for name, value in call.items())
    return f"""# {title}, made with scfm

Base model: `{config.model.path}`. {_advice(config, family)}

{table}{describe(config.model.adapters)}```python
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, {family.pipeline}

pipe = {family.pipeline}.from_pretrained("{config.model.path}", torch_dtype=torch.{config.train.compute_dtype})
pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift:.6g}, use_dynamic_shifting=False){of_size}
pipe.load_lora_weights("adapter", weight_name="{ADAPTER_FILE}", adapter_name="scfm")
pipe.set_adapters("scfm", {weight:.4f})  # the weight for {steps} steps
image = pipe(
    prompt="your prompt",
    num_inference_steps={steps},
    sigmas=[1 - k / {steps} for k in range({steps})],  # an even grid; the scheduler applies its shift to it
    height={height},
    width={width},
{arguments}
    generator=torch.Generator().manual_seed(0),
).images[0]
```

Trained with `method.step_gain` {"none" if gain is None else f"gamma {gain.gamma:g}"}, rank {config.lora.rank}, {config.train.steps} steps of batch {config.train.global_batch_size}.
"""
