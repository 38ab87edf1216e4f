"""The settings and the workflow for ComfyUI: its sigmas are ours, and the workflow is a graph of its nodes."""

import math

import pytest
import torch
from torch import Tensor

from recipes.comfyui import comfyui_settings, workflow
from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.families import open_family


def simple_sigmas(steps: int, table: Tensor) -> list[float]:
    """ComfyUI's scheduler `simple`: comfy/samplers.py."""
    rows = len(table) / steps
    return [float(table[-(1 + int(k * rows))]) for k in range(steps)] + [0.0]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_comfyui_samples_at_our_sigmas(steps, shift):
    """They differ by less than a row of ComfyUI's table before the shift, and not at all if the table is a multiple of the steps."""
    node = next(node for node in workflow("a", steps, shift, 3.5, (64, 64)).values() if "max_shift" in node["inputs"])
    mu = node["inputs"]["max_shift"]
    assert mu == node["inputs"]["base_shift"] == pytest.approx(math.log(shift))
    t = torch.arange(1, 10001) / 10000
    flux = math.exp(mu) / (math.exp(mu) + (1 / t - 1))  # comfy/model_sampling.py: ModelSamplingFlux
    t = torch.arange(1, 1001) / 1000
    others = shift * t / (1 + (shift - 1) * t)  # ModelSamplingDiscreteFlow
    for table in (flux, others):
        found, ours = torch.tensor(simple_sigmas(steps, table)), sigma_grid(steps, shift)
        row = 1 / len(table)
        assert float((found - ours).abs().max()) <= (1e-6 if len(table) % steps == 0 else shift * row)


def test_the_workflow_is_a_graph_of_comfyui():
    graph = workflow("scfm_4steps.safetensors", 4, 3.0, 3.5, (512, 768), weight=0.5)
    kinds = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert len(kinds) == len(graph) == 15
    assert kinds["LoraLoaderModelOnly"] | {"model": 0} == {
        "lora_name": "scfm_4steps.safetensors", "strength_model": 0.5, "model": 0,
    }  # fmt: skip
    assert (kinds["EmptySD3LatentImage"]["width"], kinds["EmptySD3LatentImage"]["height"]) == (768, 512)
    assert kinds["BasicScheduler"]["steps"] == 4
    assert kinds["FluxGuidance"]["guidance"] == 3.5
    outputs = {
        "MODEL": ("UNETLoader", "LoraLoaderModelOnly", "ModelSamplingFlux"), "CLIP": ("DualCLIPLoader",), "VAE": ("VAELoader",),
        "CONDITIONING": ("CLIPTextEncode", "FluxGuidance"), "GUIDER": ("BasicGuider",), "NOISE": ("RandomNoise",),
        "SAMPLER": ("KSamplerSelect",), "SIGMAS": ("BasicScheduler",), "IMAGE": ("VAEDecode",),
        "LATENT": ("EmptySD3LatentImage", "SamplerCustomAdvanced"),
    }  # fmt: skip
    types = {kind: type for type, several in outputs.items() for kind in several}
    names = {"latent_image": "LATENT", "samples": "LATENT", "images": "IMAGE"}
    linked = set()
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source = graph[value[0]]["class_type"]
                assert (types[source], value[1]) == (names.get(name, name.upper()), 0)
                linked.add(source)
    assert linked == set(kinds) - {"SaveImage"}
    assert kinds["BasicGuider"]["model"] == kinds["BasicScheduler"]["model"], "both see the shift"
    low = workflow("a", 4, 0.5, 3.5, (512, 512))
    assert {"shift": 0.5}.items() <= next(n for n in low.values() if n["class_type"] == "ModelSamplingAuraFlow")[
        "inputs"
    ].items()


@pytest.mark.parametrize(
    ("name", "guidance", "shift", "guided"),
    [
        (
            "black-forest-labs/FLUX.1-dev",
            3.5,
            "`ModelSamplingFlux` after it, with `max_shift` 1.099",
            "`FluxGuidance` with 3.5",
        ),
        (
            "black-forest-labs/FLUX.2-klein-base-4B",
            4.0,
            "`ModelSamplingFlux`",
            "`cfg` 4, with the negative prompt empty",
        ),
        ("stabilityai/stable-diffusion-3.5-large", 4.5, "`ModelSamplingSD3` after it, with `shift` 3.", "`cfg` 4.5"),
        ("Tongyi-MAI/Z-Image", 5.0, "`ModelSamplingAuraFlow`", "`cfg` 6"),
        ("Tongyi-MAI/Z-Image", 0.0, "`ModelSamplingAuraFlow`", "`cfg` 1, which is one pass"),
        ("Qwen/Qwen-Image", 1.0, "`ModelSamplingAuraFlow`", "`cfg` 1, which is one pass"),
        ("Qwen/Qwen-Image", 4.0, "`ModelSamplingAuraFlow`", "`cfg` does not, so guided images differ"),
        ("krea/Krea-2-Raw", 4.5, "`ModelSamplingFlux`", "`cfg` 5.5"),
    ],
)
def test_settings(name, guidance, shift, guided):
    lines = comfyui_settings(open_family(name, offline=True), 3.0, guidance)
    assert [shift in lines[1], guided in lines[3]] == [True, True], lines


def test_no_settings_without_a_loader():
    assert not comfyui_settings(open_family("Efficient-Large-Model/Sana_1600M_512px_diffusers", offline=True), 3.0, 4.5)
