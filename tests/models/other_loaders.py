"""ComfyUI's loaders of adapters and kohya's, re-derived from their sources: names, slices, swapped halves, alpha.

ComfyUI: comfy/lora.py (`model_lora_keys_unet`, `load_lora`), comfy/utils.py (`*_to_diffusers`), comfy/weight_adapter/lora.py,
comfy/sd.py (`load_bypass_lora_for_models`). kohya: sd-scripts/networks/lora_flux.py and lora_sd3.py, musubi-tuner/networks/lora.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scfm_core.models.protocol import ModelFamily

# Our module, the layer of ComfyUI's network, and where it differs the first row in units of the network's width, or `swapped`.
# Modules that are not listed have the same name there.
_FLUX_BLOCKS = """
transformer_blocks.*.attn.to_q               double_blocks.*.img_attn.qkv 0
transformer_blocks.*.attn.to_k               double_blocks.*.img_attn.qkv 1
transformer_blocks.*.attn.to_v               double_blocks.*.img_attn.qkv 2
transformer_blocks.*.attn.add_q_proj         double_blocks.*.txt_attn.qkv 0
transformer_blocks.*.attn.add_k_proj         double_blocks.*.txt_attn.qkv 1
transformer_blocks.*.attn.add_v_proj         double_blocks.*.txt_attn.qkv 2
transformer_blocks.*.attn.to_out.0           double_blocks.*.img_attn.proj
transformer_blocks.*.attn.to_add_out         double_blocks.*.txt_attn.proj
transformer_blocks.*.norm1.linear            double_blocks.*.img_mod.lin
transformer_blocks.*.norm1_context.linear    double_blocks.*.txt_mod.lin
transformer_blocks.*.ff.net.0.proj           double_blocks.*.img_mlp.0
transformer_blocks.*.ff.net.2                double_blocks.*.img_mlp.2
transformer_blocks.*.ff_context.net.0.proj   double_blocks.*.txt_mlp.0
transformer_blocks.*.ff_context.net.2        double_blocks.*.txt_mlp.2
transformer_blocks.*.ff.linear_in            double_blocks.*.img_mlp.0
transformer_blocks.*.ff.linear_out           double_blocks.*.img_mlp.2
transformer_blocks.*.ff_context.linear_in    double_blocks.*.txt_mlp.0
transformer_blocks.*.ff_context.linear_out   double_blocks.*.txt_mlp.2
single_transformer_blocks.*.attn.to_q        single_blocks.*.linear1 0
single_transformer_blocks.*.attn.to_k        single_blocks.*.linear1 1
single_transformer_blocks.*.attn.to_v        single_blocks.*.linear1 2
single_transformer_blocks.*.proj_mlp         single_blocks.*.linear1 3
single_transformer_blocks.*.norm.linear      single_blocks.*.modulation.lin
single_transformer_blocks.*.proj_out         single_blocks.*.linear2
single_transformer_blocks.*.attn.to_qkv_mlp_proj single_blocks.*.linear1
single_transformer_blocks.*.attn.to_out      single_blocks.*.linear2
x_embedder                                   img_in
context_embedder                             txt_in
norm_out.linear                              final_layer.adaLN_modulation.1 swapped
proj_out                                     final_layer.linear
"""
_FACTS = {
    "Flux": _FLUX_BLOCKS
    + """
time_text_embed.timestep_embedder.linear_1   time_in.in_layer
time_text_embed.timestep_embedder.linear_2   time_in.out_layer
time_text_embed.text_embedder.linear_1       vector_in.in_layer
time_text_embed.text_embedder.linear_2       vector_in.out_layer
time_text_embed.guidance_embedder.linear_1   guidance_in.in_layer
time_text_embed.guidance_embedder.linear_2   guidance_in.out_layer
""",
    "Chroma": _FLUX_BLOCKS
    + """
distilled_guidance_layer.layers.*.linear_1   distilled_guidance_layer.layers.*.in_layer
distilled_guidance_layer.layers.*.linear_2   distilled_guidance_layer.layers.*.out_layer
""",
    "Flux2": _FLUX_BLOCKS
    + """
time_guidance_embed.timestep_embedder.linear_1  time_in.in_layer
time_guidance_embed.timestep_embedder.linear_2  time_in.out_layer
time_guidance_embed.guidance_embedder.linear_1  guidance_in.in_layer
time_guidance_embed.guidance_embedder.linear_2  guidance_in.out_layer
double_stream_modulation_img.linear          double_stream_modulation_img.lin
double_stream_modulation_txt.linear          double_stream_modulation_txt.lin
single_stream_modulation.linear              single_stream_modulation.lin
""",
    "SD3": """
transformer_blocks.*.attn.to_q               joint_blocks.*.x_block.attn.qkv 0
transformer_blocks.*.attn.to_k               joint_blocks.*.x_block.attn.qkv 1
transformer_blocks.*.attn.to_v               joint_blocks.*.x_block.attn.qkv 2
transformer_blocks.*.attn2.to_q              joint_blocks.*.x_block.attn2.qkv 0
transformer_blocks.*.attn2.to_k              joint_blocks.*.x_block.attn2.qkv 1
transformer_blocks.*.attn2.to_v              joint_blocks.*.x_block.attn2.qkv 2
transformer_blocks.*.attn.add_q_proj         joint_blocks.*.context_block.attn.qkv 0
transformer_blocks.*.attn.add_k_proj         joint_blocks.*.context_block.attn.qkv 1
transformer_blocks.*.attn.add_v_proj         joint_blocks.*.context_block.attn.qkv 2
transformer_blocks.*.attn.to_out.0           joint_blocks.*.x_block.attn.proj
transformer_blocks.*.attn2.to_out.0          joint_blocks.*.x_block.attn2.proj
transformer_blocks.*.attn.to_add_out         joint_blocks.*.context_block.attn.proj
transformer_blocks.*.norm1.linear            joint_blocks.*.x_block.adaLN_modulation.1
transformer_blocks.*.norm1_context.linear    joint_blocks.*.context_block.adaLN_modulation.1 swapped-in-last
transformer_blocks.*.ff.net.0.proj           joint_blocks.*.x_block.mlp.fc1
transformer_blocks.*.ff.net.2                joint_blocks.*.x_block.mlp.fc2
transformer_blocks.*.ff_context.net.0.proj   joint_blocks.*.context_block.mlp.fc1
transformer_blocks.*.ff_context.net.2        joint_blocks.*.context_block.mlp.fc2
time_text_embed.timestep_embedder.linear_1   t_embedder.mlp.0
time_text_embed.timestep_embedder.linear_2   t_embedder.mlp.2
time_text_embed.text_embedder.linear_1       y_embedder.mlp.0
time_text_embed.text_embedder.linear_2       y_embedder.mlp.2
norm_out.linear                              final_layer.adaLN_modulation.1 swapped
proj_out                                     final_layer.linear
""",
    "ZImage": "\n".join(
        f"""
{blocks}.*.attention.to_q                    {blocks}.*.attention.qkv 0
{blocks}.*.attention.to_k                    {blocks}.*.attention.qkv 1
{blocks}.*.attention.to_v                    {blocks}.*.attention.qkv 2
{blocks}.*.attention.to_out.0                {blocks}.*.attention.out
"""
        for blocks in ("layers", "noise_refiner", "context_refiner")
    )
    + """
all_x_embedder.2-1                           x_embedder
all_final_layer.2-1.linear                   final_layer.linear
all_final_layer.2-1.adaLN_modulation.1       final_layer.adaLN_modulation.1
""",
    "QwenImage": "",
    "Krea2": "\n".join(
        f"""
{ours}.*.attn.to_q       {theirs}.*.attn.wq
{ours}.*.attn.to_k       {theirs}.*.attn.wk
{ours}.*.attn.to_v       {theirs}.*.attn.wv
{ours}.*.attn.to_gate    {theirs}.*.attn.gate
{ours}.*.attn.to_out.0   {theirs}.*.attn.wo
{ours}.*.ff.gate         {theirs}.*.mlp.gate
{ours}.*.ff.up           {theirs}.*.mlp.up
{ours}.*.ff.down         {theirs}.*.mlp.down
"""
        for ours, theirs in (
            ("transformer_blocks", "blocks"),
            ("text_fusion.layerwise_blocks", "txtfusion.layerwise_blocks"),
            ("text_fusion.refiner_blocks", "txtfusion.refiner_blocks"),
        )
    )
    + """
img_in                   first
time_embed.linear_1      tmlp.0
time_embed.linear_2      tmlp.2
time_mod_proj            tproj.1
txt_in.linear_1          txtmlp.1
txt_in.linear_2          txtmlp.3
text_fusion.projector    txtfusion.projector
final_layer.linear       last.linear
""",
}
_NO_ALIAS = {
    "Flux2": r"\w+_stream_modulation.*|time_guidance_embed\..*",
    "Chroma": r"distilled_guidance_layer\..*",
}
"""Modules that ComfyUI does not know under diffusers' names."""
KOHYA_READS = {
    "Flux": r"lora_unet_(double_blocks|single_blocks|img_in|time_in|vector_in|guidance_in|txt_in)_?.*",
    "Chroma": r"lora_unet_(double_blocks|single_blocks|img_in|txt_in)_?.*",
    "SD3": r"lora_unet_(joint_blocks|context_embedder|t_embedder|x_embedder|y_embedder|final_layer)_?.*",
    "Flux2": r"lora_unet_(double_blocks|single_blocks)_.*",
    "ZImage": r"lora_unet_(layers|noise_refiner|context_refiner)_.*",
    "QwenImage": r"lora_unet_transformer_blocks_.*",
    "Krea2": r"lora_unet_.*",
}
"""Layers to which kohya's trainers attach a file's factors: sd-scripts (Flux.1, Chroma, SD3), musubi-tuner (the others)."""


@dataclass(frozen=True)
class Place:
    """Where one of our linears is in ComfyUI's network."""

    layer: str
    start: int
    rows: int
    is_part: bool
    swapped: bool


@dataclass(frozen=True)
class Patch:
    """Factors that a loader adds to a layer."""

    layer: str
    start: int
    rows: int | None
    """None: the whole layer."""
    swapped: bool
    down: Tensor
    up: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """[in, n] -> [rows of the patch, n]."""
        y = self.scale * (self.up.to(x) @ (self.down.to(x) @ x))
        return torch.cat(y.chunk(2)[::-1]) if self.swapped else y


class ComfyUI:
    """ComfyUI's network of a family, as its loaders see it; or one with diffusers' layers."""

    def __init__(
        self, family: ModelFamily, linears: dict[str, nn.Linear], *, has_diffusers_layers: bool = False
    ) -> None:
        self.linears = linears
        kind = type(family).__name__
        facts = [(*line.split(), "")[:3] for line in _FACTS[kind].splitlines() if line]
        facts = [] if has_diffusers_layers else facts
        last = max((int(n.split(".")[1]) for n in self.linears if n.startswith("transformer_blocks.")), default=0)
        self.places = {name: self._place(name, facts, last) for name in self.linears}
        """Our linears."""
        self.rows: dict[str, int] = {}
        for place in self.places.values():
            self.rows[place.layer] = max(self.rows.get(place.layer, 0), place.start + place.rows)
        self.keys: dict[str, Place | str] = {}
        """Names in a file -> the whole layer (its name), or a part."""
        for layer in self.rows:
            self.keys[f"diffusion_model.{layer}"] = layer
            self.keys["lora_unet_" + layer.replace(".", "_")] = layer
        for name, place in self.places.items():
            if not re.fullmatch(_NO_ALIAS.get(kind, ""), name):
                self.keys[f"transformer.{name}"] = place if place.is_part or place.swapped else place.layer

    def _place(self, name: str, facts: list[tuple[str, ...]], last: int) -> Place:
        rows = self.linears[name].out_features
        for template, layer, where in facts:
            found = re.fullmatch(re.escape(template).replace(r"\*", r"(\d+)"), name)
            if found:
                number = (*found.groups(), "")[0]
                start = int(where) * self.linears[name].in_features if where.isdigit() else 0
                swapped = where == "swapped" or (where == "swapped-in-last" and int(number) == last)
                return Place(layer.replace("*", number), start, rows, where.isdigit(), swapped)
        return Place(name, 0, rows, False, False)

    def load(self, file: Mapping[str, Tensor], *, bypass: bool = False) -> tuple[list[Patch], set[str]]:
        """The patches of a file, and its keys that were not used. The bypass loader keeps the patches of whole layers only."""
        patches, unused = [], set(file)
        for key, target in self.keys.items():
            for a, b in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
                down, up = file.get(f"{key}.{a}.weight"), file.get(f"{key}.{b}.weight")
                if down is None or up is None:
                    continue
                unused -= {f"{key}.{a}.weight", f"{key}.{b}.weight", f"{key}.alpha"}
                alpha = file.get(f"{key}.alpha")
                scale = 1.0 if alpha is None else alpha.item() / len(down)
                if isinstance(target, str):
                    patches.append(Patch(target, 0, None, False, down.float(), up.float(), scale))
                elif not bypass:
                    rows = target.rows if target.is_part else None
                    start = target.start
                    patches.append(Patch(target.layer, start, rows, target.swapped, down.float(), up.float(), scale))
        return patches, unused

    def outputs(self, patches: list[Patch], inputs: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """What the patches add to the output of each of our linears that they reach.

        Args:
            patches: of `load`.
            inputs: [in, n] by `in`.
        """
        layers: dict[str, list[Patch]] = {}
        for patch in patches:
            layers.setdefault(patch.layer, []).append(patch)
        found = {}
        for name, place in self.places.items():
            ours = [
                patch
                for patch in layers.get(place.layer, [])
                if patch.rows is None
                or (patch.start < place.start + place.rows and place.start < patch.start + patch.rows)
            ]
            if not ours:
                continue
            [patch] = ours  # every linear at most once
            y = patch(inputs[self.linears[name].in_features])
            assert len(y) == (self.rows[place.layer] if patch.rows is None else patch.rows), name
            y = y[place.start - patch.start :][: place.rows]
            found[name] = torch.cat(y.chunk(2)[::-1]) if place.swapped else y
        return found
