"""Names of layers in each family's original code, which ComfyUI and kohya's trainers use.

Facts from ComfyUI (comfy/lora.py and comfy/utils.py, `*_to_diffusers`), kohya-ss/sd-scripts and kohya-ss/musubi-tuner (networks/),
and diffusers' conversions of checkpoints (loaders/single_file_utils.py).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OtherTools:
    """How tools other than diffusers name a family's layers. The default: no other tool has the family."""

    layers: Mapping[str, str] = field(default_factory=dict)
    """Layers of the original code -> our modules whose rows they join, in order, separated by spaces. `{}` is the number of a block.
    Other layers have the same name in both."""
    also_read: Mapping[str, str] = field(default_factory=dict)
    """As `layers`: other names in files that are read, and never written."""
    swapped: tuple[str, ...] = ()
    """Our modules whose output is (scale, shift), but (shift, scale) in the original code. `{}` is the number
    of the last block."""
    formats: Mapping[str, Literal["original", "diffusers"]] = field(default_factory=dict)
    """Formats of a file, beside diffusers' own, and whose layers such a file has."""
    comfyui_factors: tuple[str, str] = ("lora_A", "lora_B")
    """Names of A and B in a file for ComfyUI, which takes both pairs of names. diffusers reads a file with these right, or not at all:
    in a file of FLUX.2 with the others it scales q, k and v by 1/3, since their rank is another."""
    shift_node: str = ""
    """ComfyUI's node that sets the timestep shift."""
    guidance_note: str = ""
    """In what ComfyUI's `cfg` differs from the guidance of the family's own pipeline, as a sentence."""

    def original_layers(self, modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Layers of the original code -> our modules whose rows they join, in order.

        Args:
            modules: names of all linears of our network.
        """
        names = list(modules)
        found = _filled(self.layers, names)
        joined = {part for parts in found.values() for part in parts}
        return found | {name: (name,) for name in names if name not in joined}

    def read_layers(self, modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Layers of `also_read` -> our modules; `modules` are all linears of our network."""
        return _filled(self.also_read, list(modules))

    def swapped_modules(self, modules: Iterable[str]) -> frozenset[str]:
        """Our modules whose halves of the output change places in the original code; `modules` are all linears of our network."""
        names = list(modules)
        return frozenset(name.format(block) for name in self.swapped for block in _blocks(name, names)[-1:])


def _filled(layers: Mapping[str, str], names: list[str]) -> dict[str, tuple[str, ...]]:
    """`layers` with the numbers of the blocks."""
    return {
        original.format(block): tuple(part.format(block) for part in template.split())
        for original, template in layers.items()
        for block in _blocks(template.split()[0], names)
    }


def _blocks(template: str, names: Iterable[str]) -> list[str]:
    """The numbers of the blocks that have a module `template`; [""] if it is a module outside the blocks."""
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
    return [(*found.groups(), "")[0] for found in map(pattern.fullmatch, names) if found]


def _within(original: str, ours: str, layers: Mapping[str, str]) -> dict[str, str]:
    """`layers` with prefixes: that of the original code, and ours."""
    return {
        f"{original}.{name}": " ".join(f"{ours}.{part}" for part in parts.split()) for name, parts in layers.items()
    }


_EMBEDDER = {"in_layer": "linear_1", "out_layer": "linear_2"}

FLUX = OtherTools(
    layers={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        **_within("time_in", "time_text_embed.timestep_embedder", _EMBEDDER),
        **_within("vector_in", "time_text_embed.text_embedder", _EMBEDDER),
        **_within("guidance_in", "time_text_embed.guidance_embedder", _EMBEDDER),
        **_within(
            "double_blocks.{}",
            "transformer_blocks.{}",
            {
                "img_mod.lin": "norm1.linear",
                "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
                "img_attn.proj": "attn.to_out.0",
                "img_mlp.0": "ff.net.0.proj",
                "img_mlp.2": "ff.net.2",
                "txt_mod.lin": "norm1_context.linear",
                "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
                "txt_attn.proj": "attn.to_add_out",
                "txt_mlp.0": "ff_context.net.0.proj",
                "txt_mlp.2": "ff_context.net.2",
            },
        ),
        **_within(
            "single_blocks.{}",
            "single_transformer_blocks.{}",
            {
                "modulation.lin": "norm.linear",
                "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
                "linear2": "proj_out",
            },
        ),
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    # XLabs' trainer, as diffusers' _convert_xlabs_flux_lora_to_diffusers reads it.
    also_read={
        **_within(
            "double_blocks.{}.processor",
            "transformer_blocks.{}.attn",
            {
                "qkv_lora1": "to_q to_k to_v",
                "qkv_lora2": "add_q_proj add_k_proj add_v_proj",
                "proj_lora1": "to_out.0",
                "proj_lora2": "to_add_out",
            },
        ),
        **_within(
            "single_blocks.{}.processor",
            "single_transformer_blocks.{}",
            {"qkv_lora": "attn.to_q attn.to_k attn.to_v", "proj_lora": "proj_out"},
        ),
    },
    swapped=("norm_out.linear",),
    formats={"comfyui": "original", "kohya": "original"},
    comfyui_factors=("lora_down", "lora_up"),
    shift_node="ModelSamplingFlux",
)

# A pruned Flux.1. The layers that it does not have are absent from the network too.
CHROMA = replace(
    FLUX,
    layers={
        **FLUX.layers,
        **_within("distilled_guidance_layer.layers.{}", "distilled_guidance_layer.layers.{}", _EMBEDDER),
    },
    swapped=(),
)

FLUX2 = OtherTools(
    layers={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        **_within("time_in", "time_guidance_embed.timestep_embedder", _EMBEDDER),
        **_within("guidance_in", "time_guidance_embed.guidance_embedder", _EMBEDDER),
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        **_within(
            "double_blocks.{}",
            "transformer_blocks.{}",
            {
                "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
                "img_attn.proj": "attn.to_out.0",
                "img_mlp.0": "ff.linear_in",
                "img_mlp.2": "ff.linear_out",
                "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
                "txt_attn.proj": "attn.to_add_out",
                "txt_mlp.0": "ff_context.linear_in",
                "txt_mlp.2": "ff_context.linear_out",
            },
        ),
        **_within(
            "single_blocks.{}",
            "single_transformer_blocks.{}",
            {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
        ),
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    swapped=("norm_out.linear",),
    formats={"comfyui": "original", "kohya": "original"},
    comfyui_factors=("lora_down", "lora_up"),
    shift_node="ModelSamplingFlux",
)

_MLP = {"mlp.0": "linear_1", "mlp.2": "linear_2"}

SD3 = OtherTools(
    layers={
        **_within("t_embedder", "time_text_embed.timestep_embedder", _MLP),
        **_within("y_embedder", "time_text_embed.text_embedder", _MLP),
        **_within(
            "joint_blocks.{}",
            "transformer_blocks.{}",
            {
                "x_block.adaLN_modulation.1": "norm1.linear",
                "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
                "x_block.attn.proj": "attn.to_out.0",
                "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
                "x_block.attn2.proj": "attn2.to_out.0",
                "x_block.mlp.fc1": "ff.net.0.proj",
                "x_block.mlp.fc2": "ff.net.2",
                "context_block.adaLN_modulation.1": "norm1_context.linear",
                "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
                "context_block.attn.proj": "attn.to_add_out",
                "context_block.mlp.fc1": "ff_context.net.0.proj",
                "context_block.mlp.fc2": "ff_context.net.2",
            },
        ),
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    # The last block has no output for the text: its norm of the text has only scale and shift.
    swapped=("norm_out.linear", "transformer_blocks.{}.norm1_context.linear"),
    formats={"comfyui": "original", "kohya": "original"},
    shift_node="ModelSamplingSD3",
)

_ATTENTION = {"qkv": "to_q to_k to_v", "out": "to_out.0"}

Z_IMAGE = OtherTools(
    layers={
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        **_within("noise_refiner.{}.attention", "noise_refiner.{}.attention", _ATTENTION),
        **_within("context_refiner.{}.attention", "context_refiner.{}.attention", _ATTENTION),
        **_within("layers.{}.attention", "layers.{}.attention", _ATTENTION),
    },
    # kohya's trainer has separate q, k and v, as diffusers.
    formats={"comfyui": "original", "kohya": "diffusers"},
    shift_node="ModelSamplingAuraFlow",
)

QWEN_IMAGE = OtherTools(
    formats={"comfyui": "diffusers", "kohya": "diffusers"},
    shift_node="ModelSamplingAuraFlow",
    guidance_note="The model's own pipeline gives each token of the guided velocity the length that it has with the prompt alone; `cfg` "
    "does not, so guided images differ from scfm's.",
)

_KREA2_BLOCK = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.gate": "attn.to_gate",
    "attn.wo": "attn.to_out.0",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}

KREA2 = OtherTools(
    layers={
        "first": "img_in",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
        **_within("txtfusion.layerwise_blocks.{}", "text_fusion.layerwise_blocks.{}", _KREA2_BLOCK),
        **_within("txtfusion.refiner_blocks.{}", "text_fusion.refiner_blocks.{}", _KREA2_BLOCK),
        **_within("blocks.{}", "transformer_blocks.{}", _KREA2_BLOCK),
        "last.linear": "final_layer.linear",
    },
    formats={"comfyui": "original", "kohya": "original"},
    shift_node="ModelSamplingFlux",
)
