"""The model card beside an export: what it is, how to use it, what was measured, how it was trained."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from recipes import advice
from recipes.base_model import BaseModel
from recipes.comfyui import comfyui_settings, workflow
from recipes.header import Contents
from recipes.image_files import read_settings
from recipes.measured import is_evaluated, is_of_run
from scfm_core import __version__
from scfm_core.files import permit_reading, renamed_at_end, written_whole
from scfm_core.models.fused_base import describe
from scfm_core.models.original_names import FLUX
from scfm_core.models.protocol import ModelFamily
from scfm_core.scfm.method import sampling_strength
from scfm_core.train.config import RunConfig
from scfm_core.train.pipelines import shift_of
from scfm_core.wording import count

UNNAMED_BASE = "path/to/the/base/model"
"""In the card's code, in place of a folder of this machine."""
_IMAGES = "images"
_WORKFLOW = "comfyui_workflow.json"
_MAX_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card is about."""

    config: RunConfig
    family: ModelFamily
    base: BaseModel
    checkpoint: Path
    run_dir: Path
    place: str
    """Folder or repository of the files, in the card's code."""
    measured: str = ""
    """The section of `recipes.measured`."""
    files: tuple[tuple[str, Contents], ...] = ()
    """Name and contents of each file; the name of a merged pipeline, which is a folder, is empty."""
    is_merged: bool = False

    @property
    def steps(self) -> int:
        """The step count of the first file."""
        return self.steps_of(self.files[0][1])

    def steps_of(self, contents: Contents) -> int:
        """The step count of the code and the settings for a file."""
        if contents.folded is not None:
            return contents.folded
        return self.config.sample.steps[-1] if self.is_merged or advice.is_guidance_only(self.config) else 3


@dataclass(frozen=True, kw_only=True)
class _Image:
    """A picture beside the card."""

    file: str
    prompt: str
    caption: str


def write_card(folder: Path, card: Card) -> None:
    """Write `README.md` and, for Flux.1, a workflow of ComfyUI; copy pictures of the run into `images`."""
    images = _copy_images(card, folder / _IMAGES)
    text = str(ModelCard(f"---\n{_front_matter(card, images).to_yaml()}\n---\n\n{_body(card, images)}"))
    with written_whole(folder / "README.md", "the export", "Make room there") as path:
        path.write_text(text, encoding="utf-8")
    if _has_workflow(card):
        _write_workflow(folder / _WORKFLOW, card)


def _front_matter(card: Card, images: list[_Image]) -> ModelCardData:
    base = card.base
    kind = [] if card.is_merged else ["lora", "template:diffusion-lora"]
    more: dict[str, Any] = {
        "widget": [{"text": image.prompt, "output": {"url": image.file}} for image in images] or None
    }
    if base.id is not None and card.config.model.init == "pretrained":
        more["base_model_relation"] = "finetune" if card.is_merged else "adapter"
    return ModelCardData(
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        base_model=base.id if card.config.model.init == "pretrained" else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", *kind, "scfm", "few-step", "distillation"],
        **more,
    )


def _body(card: Card, images: list[_Image]) -> str:
    parts = [_title(card), _pictures(images), _weights(card), _files(card), _diffusers(card), _comfyui(card)]
    return "\n\n".join(part for part in (*parts, card.measured, _training(card)) if part) + "\n"


def _title(card: Card) -> str:
    config, base = card.config, card.base
    name = "" if base.id is None else f" of [{base.id}](https://huggingface.co/{base.id})"
    lines = [f"# {_kind(card)}{name}, made with scfm", ""]
    if base.id is None:
        lines += [
            "The base model is not named: it is not on the hub, or its id was not given (`--base OWNER/NAME`).",
            "",
        ]
    method = "SCFM" if config.method.step_gain is None else "SCFM with step-scaled adapters"
    paper = "([arXiv 2510.17858](https://arxiv.org/abs/2510.17858))"
    if config.model.init == "random":
        lines.append(
            "Trained from random weights, with the architecture, the text encoders and the VAE of the base model."
        )
    elif advice.is_guidance_only(config):
        lines.append(f"Guidance was distilled from the base model: a stage before {method} {paper}.")
    else:
        lines.append(f"Few-step sampling was distilled from the base model by {method} {paper}.")
    if card.is_merged and config.method.step_gain is not None:
        lines.append(f"The strength for {count(card.steps, 'step')} is merged into the weights: use this step count.")
    lines.append(advice.guidance_advice(config, card.family))
    if base.license is None:
        lines.append("The licence is that of the base model.")
    return "\n".join(lines).rstrip()


def _kind(card: Card) -> str:
    """What the card is about, as the beginning of its title."""
    noun = "model" if card.is_merged else "adapter"
    if advice.is_guidance_only(card.config):
        return f"{'A model' if card.is_merged else 'An adapter'} with built-in guidance"
    if card.is_merged and card.config.method.step_gain is not None:
        return f"A {card.steps}-step model"
    return f"A {noun} with the architecture" if card.config.model.init == "random" else f"A few-step {noun}"


def _pictures(images: list[_Image]) -> str:
    return "\n\n".join(f"![{_quoted(image.prompt)}]({image.file})\n\n*{image.caption}*" for image in images)


def _quoted(text: str) -> str:
    """Text inside the brackets of Markdown."""
    return text.replace("[", "(").replace("]", ")").replace("\n", " ")


def _weights(card: Card) -> str:
    """The weight for each step count, of each kind of file."""
    config = card.config
    if card.is_merged or advice.is_guidance_only(config):
        return ""
    folds = list(dict.fromkeys(contents.folded for _, contents in card.files))
    titles = ["weight" if folded is None else f"weight of the file for {count(folded, 'step')}" for folded in folds]
    rows = [f"| steps | {' | '.join(titles)} |", "|---" * (len(folds) + 1) + "|"]
    rows += [
        f"| {steps} | {' | '.join(f'{advice.weight(config, steps, folded):.3f}' for folded in folds)} |"
        for steps in sorted({*advice.CARD_STEPS, *(folded for folded in folds if folded)})
    ]
    said = [advice.weight_advice(config)] if None in folds else []
    if any(folds):
        said.append("A file for N steps has their strength folded in: use it with weight 1.0 at N steps.")
    return "## Weight of the adapter\n\n" + " ".join(said) + "\n\n" + "\n".join(rows)


def _files(card: Card) -> str:
    if card.is_merged:
        return ""
    rows = ["## Files", "", "| file | names of | for | precision |", "|---|---|---|---|"]
    for name, contents in card.files:
        steps = "every step count" if contents.folded is None else f"{count(contents.folded, 'step')}, at weight 1.0"
        precision = contents.dtype
        if contents.rounding_error:
            precision += f", relative rounding error of B A: {contents.rounding_error:.1e}"
        left_out = f"; without {contents.left_out} linears" if contents.left_out else ""
        rows.append(f"| `{name}` | {contents.format} | {steps}{left_out} | {precision} |")
    return "\n".join(rows)


def _diffusers(card: Card) -> str:
    """Code that makes an image; the tests run it."""
    config, family = card.config, card.family
    height, width = config.data.resolution
    file = next(((name, contents) for name, contents in card.files if contents.format == "diffusers"), None)
    if file is None:
        return ""
    name, contents = file
    steps = card.steps_of(contents)
    base = card.place if card.is_merged and not name else card.base.id or UNNAMED_BASE
    dtype = contents.dtype if card.is_merged else config.train.compute_dtype
    imports = f"from diffusers import FlowMatchEulerDiscreteScheduler, {family.pipeline}"
    shift = advice.shift(config, family, steps)
    of_size = f"  # of {steps} steps at {height} x {width}" if config.sample.shift == "dynamic" else ""
    setting = [
        f"pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift:.6g}, use_dynamic_shifting=False){of_size}"
    ]
    if card.is_merged and not name:
        imports, setting = f"from diffusers import {family.pipeline}", []
    elif card.is_merged:
        imports += "\nfrom safetensors.torch import load_file"
        place = f'"{card.place}/{name}"'
        if "/" in card.place:  # a repository
            imports = imports.replace(
                "from safetensors", "from huggingface_hub import hf_hub_download\nfrom safetensors"
            )
            place = f'hf_hub_download("{card.place}", "{name}")'
        setting.append(f"pipe.transformer.load_state_dict(load_file({place}))")
    else:
        weight = advice.weight(config, steps, contents.folded)
        here = "" if "/" in card.place else "  # the folder of this card"
        setting.append(f'pipe.load_lora_weights("{card.place}", weight_name="{name}", adapter_name="scfm"){here}')
        setting.append(f'pipe.set_adapters("scfm", {weight:.4f})  # the weight for {count(steps, "step")}')
    call = family.call_arguments(advice.student_guidance(config, family), config.model.text_length)
    lines = [
        "import torch",
        imports,
        "",
        f'pipe = {family.pipeline}.from_pretrained("{base}", torch_dtype=torch.{dtype})',
        *setting,
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")  # pipe.enable_model_cpu_offload() needs less memory',
        "image = pipe(",
        '    prompt="your prompt",',
        f"    num_inference_steps={steps},",
        f"    sigmas=[1 - k / {steps} for k in range({steps})],  # an even grid, which the scheduler shifts; some pipelines have another",
        f"    height={height},",
        f"    width={width},",
        *(f"    {key}={value!r}," for key, value in call.items()),
        "    generator=torch.Generator().manual_seed(0),",
        ").images[0]",
    ]
    style = "" if card.is_merged else describe(config.model.adapters)
    return "## diffusers\n\n```python\n" + "\n".join(lines) + f"\n```\n\n{style}".rstrip()


def _comfyui(card: Card) -> str:
    """Settings of ComfyUI; the name of the workflow, if there is one."""
    config, family = card.config, card.family
    name, contents = _comfyui_file(card)
    steps = card.steps_of(contents)
    settings = comfyui_settings(family, advice.shift(config, family, steps), advice.student_guidance(config, family))
    if not settings:
        return ""
    if card.is_merged:
        settings = [f"{count(steps, 'step').capitalize()}.", *settings[1:]]
    else:
        weight = advice.weight(config, steps, contents.folded)
        settings.insert(1, f"{count(steps, 'step').capitalize()}: `{name}` with `strength_model` {weight:.3f}.")
        if contents.format == "diffusers":
            settings.insert(
                2, "This file has diffusers' names: `scfm export --format comfyui` writes one with ComfyUI's."
            )
    if _has_workflow(card):
        settings.append(f"`{_WORKFLOW}` is a workflow with these settings: drop it on ComfyUI's page.")
    return "\n".join(["## ComfyUI", "", *(f"- {setting}" for setting in settings)])


def _comfyui_file(card: Card) -> tuple[str, Contents]:
    """The file for ComfyUI: one with its names, if there is one; one whose weight is 1, of the most steps."""
    return min(
        card.files, key=lambda file: (file[1].format != "comfyui", file[1].folded is None, -(file[1].folded or 0))
    )


def _has_workflow(card: Card) -> bool:
    return card.family.other_tools is FLUX and not card.is_merged


def _write_workflow(path: Path, card: Card) -> None:
    config, family = card.config, card.family
    name, contents = _comfyui_file(card)
    steps, guidance = card.steps_of(contents), advice.student_guidance(config, family)
    weight = round(advice.weight(config, steps, contents.folded), 4)
    nodes = workflow(name, steps, advice.shift(config, family, steps), guidance, config.data.resolution, weight=weight)
    with written_whole(path, "the export", "Make room there") as partial:
        partial.write_text(json.dumps(nodes, indent=2) + "\n", encoding="utf-8")


def _training(card: Card) -> str:
    config = card.config
    method, train, gain = config.method, config.train, config.method.step_gain
    if method.has_stored_paths:
        data = "stored paths of the teacher"
    elif method.trajectory_fraction:
        data = f"paths of the teacher, {method.trajectory_steps} steps each, from captions"
    elif method.flow_map_fraction * (method.flow_map.starts == "own") + method.matching_fraction == 1:
        data = "captions; jumps of the student itself"
    else:
        data = "images with captions"
    weights = (
        "all weights" if train.weights == "full" else f"LoRA of rank {config.lora.rank}, alpha {config.lora.alpha:g}"
    )
    rows = {
        "data": f"{data}, {config.data.resolution[0]} x {config.data.resolution[1]} pixels",
        "steps": f"{train.steps:,} of batch {train.global_batch_size}, learning rate {train.lr:g}",
        "trained": f"{weights}; exported: {config.sample.weights} of {card.checkpoint.name}",
        **(
            {"matching": f"{method.matching_fraction:.0%} of the rows match the teacher's distribution"}
            if method.has_matching
            else {}
        ),
        "step size": f"step-scaled strength, gamma {gain.gamma:g}" if gain is not None else "one strength",
        "sampling": f"shift {config.sample.shift}, guidance {config.sample.guidance:g}",
        "program": f"scfm {__version__}",
    }
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def _copy_images(card: Card, folder: Path) -> list[_Image]:
    """Copy pictures of these weights: images of `scfm sample`, else the newest comparison."""
    for name in (*(f"{place}.png" for place in range(1, _MAX_IMAGES + 1)), "evaluation.png", "samples.png"):
        (folder / name).unlink(missing_ok=True)  # of other weights
    found = list(_find_images(card))
    for path, image in found:
        target = folder.parent / image.file
        with renamed_at_end(target) as partial:
            shutil.copyfile(path, partial)
            permit_reading(partial)
    return [image for _, image in found]


def _is_of(card: Card, settings: dict[str, Any]) -> bool:
    """Whether an image of `scfm sample` shows the weights of the card, as the card says to use them."""
    config = card.config
    adapters = {Path(adapter.path).name: adapter.weight for adapter in config.model.adapters}
    steps, size = settings["steps"], (settings["height"], settings["width"])
    wanted = {
        "checkpoint": card.checkpoint.name,
        "weights": config.sample.weights,
        "adapters": adapters,
        "guidance": config.sample.guidance,
        "shift": shift_of(config.sample.shift, card.family, size, steps),
        "strength": sampling_strength(config.method.step_gain, steps),
    }
    return all(settings.get(key) == value for key, value in wanted.items())


def _find_images(card: Card) -> Iterator[tuple[Path, _Image]]:
    samples = card.run_dir / "samples"
    single = []
    for path in sorted(samples.glob("*/*.png")):
        settings = read_settings(path)
        if settings and _is_of(card, settings):
            single.append((settings["steps"] != card.steps, path, settings))
    for place, (_, path, settings) in enumerate(sorted(single, key=lambda image: image[:2])[:_MAX_IMAGES], 1):
        caption = f"{settings['prompt']} ({count(settings['steps'], 'step')})"
        yield path, _Image(file=f"{_IMAGES}/{place}.png", prompt=settings["prompt"], caption=caption)
    evaluation = samples / "evaluation.png"
    grid = samples / f"{card.checkpoint.name}.png"
    prompt = "student, undistilled model and teacher from the same noise, by number of steps"
    if evaluation.is_file() and is_evaluated(card.config, card.run_dir, card.checkpoint):
        yield evaluation, _Image(file=f"{_IMAGES}/evaluation.png", prompt=prompt, caption=prompt)
    elif grid.is_file() and is_of_run(card.config, card.run_dir):
        prompts = card.config.sample.prompts
        text = "; ".join(prompts) if isinstance(prompts, tuple) else "the prompts of the run"
        caption = f"rows: {', '.join(map(str, card.config.sample.steps))} steps"
        yield grid, _Image(file=f"{_IMAGES}/samples.png", prompt=text or caption, caption=caption)
