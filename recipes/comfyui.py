"""What ComfyUI needs to sample as scfm does: the settings of each family, and a workflow for Flux.1.

Facts from ComfyUI's sources: comfy/model_sampling.py, comfy/samplers.py (`simple_scheduler`), comfy_extras/nodes_model_advanced.py,
comfy_extras/nodes_custom_sampler.py, comfy_extras/nodes_flux.py, nodes.py. ComfyUI's scheduler `simple` takes the sigmas from a table
of 10000 (`ModelSamplingFlux`) or 1000 (other nodes) shifted sigmas: before the shift they differ from ours by less than one row of it.
"""

import math
from typing import Any

from scfm_core.models.original_names import FLUX
from scfm_core.models.protocol import ModelFamily


def comfyui_settings(family: ModelFamily, shift: float, guidance: float) -> list[str]:
    """Settings for ComfyUI, one sentence each, as Markdown; empty if ComfyUI does not have the family.

    Args:
        family: of the adapter's model.
        shift: the sampler's timestep shift.
        guidance: the scale of guidance, as diffusers' pipeline takes it.
    """
    if not family.other_tools.shift_node:
        return []
    node, inputs = _shift_node(family.other_tools.shift_node, shift)
    values = " and ".join(f"`{name}` {value:.4g}" for name, value in inputs.items())
    return [
        "Adapter: node `LoraLoaderModelOnly`, after the model's loader.",
        f"Shift {shift:.4g}: node `{node}` after it, with {values}.",
        "Sampler `euler`, scheduler `simple`, `denoise` 1.",
        _guidance(family, guidance),
    ]


def _guidance(family: ModelFamily, guidance: float) -> str:
    if family.guidance_kind == "input":
        return f"Guidance: node `FluxGuidance` with {guidance:g}, and `cfg` 1."
    if family.passes == 1 or guidance <= family.neutral_guidance:
        return "Guidance: `cfg` 1, which is one pass of the network a step."
    negative = "empty" if not family.empty_caption.strip() else f"`{family.empty_caption}`"
    note = f" {family.other_tools.guidance_note}".rstrip()
    return f"Guidance: `cfg` {1 + guidance - family.neutral_guidance:g}, with the negative prompt {negative}.{note}"


def _shift_node(node: str, shift: float) -> tuple[str, dict[str, float]]:
    """The node that sets the shift, and its inputs; `node` is that of the family."""
    if node != "ModelSamplingFlux":
        return node, {"shift": shift}
    if shift < 1:
        return "ModelSamplingAuraFlow", {"shift": shift}  # ModelSamplingFlux takes no negative mu
    mu = math.log(shift)  # for images of all sizes, since both are equal
    return node, {"max_shift": mu, "base_shift": mu}


def workflow(
    file: str, steps: int, shift: float, guidance: float, size: tuple[int, int], *, weight: float = 1.0
) -> dict[str, Any]:
    """A workflow of Flux.1 with an adapter, in ComfyUI's API format: drop the file on its page, or send it to `/prompt`.

    Args:
        file: name of the adapter's file in ComfyUI's folder `models/loras`.
        steps: number of sampling steps.
        shift: the sampler's timestep shift.
        guidance: the guidance that is an input of the network.
        size: height and width in pixels.
        weight: the adapter's weight; 1 if the file was made for this number of steps.

    Returns:
        nodes by id, each with `class_type`, `inputs` (values, or [id, output] of another node) and `_meta`. The names of the base
        model's files are those of ComfyUI's own example.
    """
    height, width = size
    node, inputs = _shift_node(FLUX.shift_node, shift)
    if node == "ModelSamplingFlux":
        inputs |= {"width": width, "height": height}
    encoders = {"clip_name1": "t5xxl_fp16.safetensors", "clip_name2": "clip_l.safetensors", "type": "flux"}
    sources = {"noise": "seed", "guider": "guider", "sampler": "sampler", "sigmas": "steps", "latent_image": "size"}
    scheduler = {"model": ["shift", 0], "scheduler": "simple", "steps": steps, "denoise": 1.0}
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "model": ("UNETLoader", {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}),
        "text encoders": ("DualCLIPLoader", encoders),
        "vae": ("VAELoader", {"vae_name": "ae.safetensors"}),
        "adapter": ("LoraLoaderModelOnly", {"model": ["model", 0], "lora_name": file, "strength_model": weight}),
        "shift": (node, {"model": ["adapter", 0], **inputs}),
        "prompt": ("CLIPTextEncode", {"clip": ["text encoders", 0], "text": "your prompt"}),
        "guidance": ("FluxGuidance", {"conditioning": ["prompt", 0], "guidance": guidance}),
        "guider": ("BasicGuider", {"model": ["shift", 0], "conditioning": ["guidance", 0]}),
        "seed": ("RandomNoise", {"noise_seed": 0}),
        "sampler": ("KSamplerSelect", {"sampler_name": "euler"}),
        "steps": ("BasicScheduler", scheduler),
        "size": ("EmptySD3LatentImage", {"width": width, "height": height, "batch_size": 1}),
        "latents": ("SamplerCustomAdvanced", {name: [source, 0] for name, source in sources.items()}),
        "image": ("VAEDecode", {"samples": ["latents", 0], "vae": ["vae", 0]}),
        "file": ("SaveImage", {"images": ["image", 0], "filename_prefix": "scfm"}),
    }
    ids = {name: str(number) for number, name in enumerate(nodes, 1)}
    return {
        ids[name]: {"class_type": kind, "inputs": _linked(inputs, ids), "_meta": {"title": name}}
        for name, (kind, inputs) in nodes.items()
    }


def _linked(inputs: dict[str, Any], ids: dict[str, str]) -> dict[str, Any]:
    """Inputs with the ids of nodes instead of our names."""
    return {name: [ids[value[0]], value[1]] if isinstance(value, list) else value for name, value in inputs.items()}
