"""Adapters in the formats of other tools: every linear is reached once, and gets the live adapter's output."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from other_loaders import KOHYA_READS, ComfyUI
from safetensors.torch import save_file
from torch import Tensor, nn

from scfm_core.errors import UserError
from scfm_core.models.adapters import LoRABank, LoRAConfig, LoRALinear
from scfm_core.models.families import FAMILIES, open_family
from scfm_core.models.formats import convert, formats_of
from scfm_core.models.fused_base import read_adapter
from scfm_core.models.protocol import ModelFamily

# Linears of the network, and those that get the adapter's output: in ComfyUI's loader and its bypass loader, in kohya's trainers,
# and in diffusers' `load_lora_weights`. 0: not a file for this tool.
REACHED: dict[tuple[str, str], tuple[int, int, int, int, int]] = {
    # The names of diffusers: ComfyUI's bypass loader drops parts of layers and swapped halves.
    ("black-forest-labs/FLUX.1-dev", "diffusers"): (504, 504, 237, 0, 504),
    ("lodestones/Chroma1-HD", "diffusers"): (433, 421, 155, 0, 433),
    ("black-forest-labs/FLUX.2-dev", "diffusers"): (203, 196, 147, 0, 203),
    ("black-forest-labs/FLUX.2-klein-base-4B", "diffusers"): (109, 104, 73, 0, 109),
    ("stabilityai/stable-diffusion-3.5-large", "diffusers"): (536, 536, 306, 0, 536),
    ("stabilityai/stable-diffusion-3.5-medium", "diffusers"): (392, 392, 207, 0, 392),
    ("Qwen/Qwen-Image", "diffusers"): (846, 846, 846, 0, 846),
    ("Tongyi-MAI/Z-Image", "diffusers"): (276, 276, 174, 0, 276),
    ("krea/Krea-2-Raw", "diffusers"): (264, 264, 264, 0, 264),
    # diffusers drops the layers outside the blocks of a Flux.1 file in another format.
    ("black-forest-labs/FLUX.1-dev", "comfyui"): (504, 504, 504, 0, 494),
    ("lodestones/Chroma1-HD", "comfyui"): (433, 433, 433, 0, 0),
    ("black-forest-labs/FLUX.2-dev", "comfyui"): (203, 203, 203, 0, 0),
    ("black-forest-labs/FLUX.2-klein-base-4B", "comfyui"): (109, 109, 109, 0, 0),
    ("stabilityai/stable-diffusion-3.5-large", "comfyui"): (536, 536, 536, 0, 0),
    ("stabilityai/stable-diffusion-3.5-medium", "comfyui"): (392, 392, 392, 0, 0),
    ("Qwen/Qwen-Image", "comfyui"): (846, 846, 846, 0, 846),
    # diffusers does not know the layers of this file that are not its own.
    ("Tongyi-MAI/Z-Image", "comfyui"): (276, 276, 276, 0, 137),
    ("krea/Krea-2-Raw", "comfyui"): (264, 264, 264, 0, 264),
    # kohya's trainers have no factors for some layers outside the blocks.
    ("black-forest-labs/FLUX.1-dev", "kohya"): (504, 504, 504, 502, 494),
    ("lodestones/Chroma1-HD", "kohya"): (433, 433, 433, 420, 0),
    ("black-forest-labs/FLUX.2-dev", "kohya"): (203, 203, 203, 192, 197),
    ("black-forest-labs/FLUX.2-klein-base-4B", "kohya"): (109, 109, 109, 100, 105),
    ("stabilityai/stable-diffusion-3.5-large", "kohya"): (536, 536, 536, 536, 0),
    ("stabilityai/stable-diffusion-3.5-medium", "kohya"): (392, 392, 392, 392, 0),
    ("Qwen/Qwen-Image", "kohya"): (846, 846, 846, 840, 846),
    # ComfyUI does not know q, k and v by these names; musubi-tuner has its own conversion for it.
    ("Tongyi-MAI/Z-Image", "kohya"): (276, 137, 137, 270, 276),
    ("krea/Krea-2-Raw", "kohya"): (264, 264, 264, 264, 0),
}
SCALE = 0.75

TINY: dict[str, dict[str, Any]] = {
    "black-forest-labs/FLUX.1-dev": {
        "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
        "joint_attention_dim": 12, "pooled_projection_dim": 10, "in_channels": 8, "axes_dims_rope": (2, 2, 4),
    },
    "lodestones/Chroma1-HD": {
        "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 12,
        "in_channels": 8, "axes_dims_rope": (2, 2, 4), "approximator_hidden_dim": 20, "approximator_layers": 2,
        "approximator_num_channels": 8,
    },
    "black-forest-labs/FLUX.2-dev": {
        "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
        "joint_attention_dim": 12, "in_channels": 8, "axes_dims_rope": (2, 2, 2, 2),
    },
    "stabilityai/stable-diffusion-3.5-medium": {
        "num_layers": 3, "dual_attention_layers": (0,), "num_attention_heads": 2, "attention_head_dim": 8,
        "caption_projection_dim": 16, "joint_attention_dim": 12, "pooled_projection_dim": 10, "sample_size": 8,
        "pos_embed_max_size": 8,
    },
    "Qwen/Qwen-Image": {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 12, "in_channels": 16, "out_channels": 4,
    },
    "Tongyi-MAI/Z-Image": {
        "dim": 24, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 12,
        "axes_dims": (4, 4, 4),
    },
    "krea/Krea-2-Raw": {
        "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "text_hidden_dim": 16, "num_text_layers": 3, "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2, "text_intermediate_size": 32, "axes_dims_rope": (4, 4, 4),
    },
}  # fmt: skip


def linears_of(family: ModelFamily) -> dict[str, nn.Linear]:
    return {n: m for n, m in family.meta_network().named_modules() if isinstance(m, nn.Linear)}


def random_factors(linears: dict[str, nn.Linear], rank: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, linear in linears.items():
        factors[f"{name}.lora_A.weight"] = torch.randn(rank, linear.in_features, generator=generator)
        factors[f"{name}.lora_B.weight"] = torch.randn(linear.out_features, rank, generator=generator)
    return factors


def probes(linears: dict[str, nn.Linear]) -> dict[int, Tensor]:
    """One input for all linears of a width, fp64 [in, 1] of norm 1."""
    generator = torch.Generator().manual_seed(1)
    sizes = {linear.in_features for linear in linears.values()}
    inputs = {size: torch.randn(size, 1, generator=generator, dtype=torch.float64) for size in sizes}
    return {size: nn.functional.normalize(x, dim=0) for size, x in inputs.items()}


def output(up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    return up.to(x) @ (down.to(x) @ x)


class Model:
    """A network of true size, random factors of rank 1, and what they add to each linear's output for one input."""

    def __init__(self, name: str) -> None:
        self.family = open_family(name, offline=True)
        self.linears = linears_of(self.family)
        self.comfyui = ComfyUI(self.family, self.linears)
        self.factors = random_factors(self.linears)
        self.inputs = probes(self.linears)
        self.expected = {name: SCALE * output(*self.pair(self.factors, name), self.x(name)) for name in self.linears}

    def file(self, format: Any) -> dict[str, Tensor]:
        return convert(self.family, self.factors, format, scale=SCALE, dtype=torch.float32)

    @staticmethod
    def pair(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        """B and A of a module."""
        return tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]

    def x(self, name: str) -> Tensor:
        return self.inputs[self.linears[name].in_features]

    def equal(self, outputs: dict[str, Tensor]) -> tuple[int, float]:
        """Number of linears whose outputs are the expected ones, and the largest error of these."""
        errors = [float((y - self.expected[name]).abs().max()) for name, y in outputs.items()]
        close = [error for error in errors if error < 1e-6]
        return len(close), max(close, default=0.0)


made = lru_cache(maxsize=1)(Model)


def by_comfyui(model: Model, file: dict[str, Tensor], *, bypass: bool) -> tuple[int, float]:
    patches, unused = model.comfyui.load(file, bypass=bypass)
    outputs = model.comfyui.outputs(patches, model.inputs)
    equal = model.equal(outputs)
    assert equal[0] == len(outputs), "a linear gets a wrong output"
    if len(outputs) == len(model.linears):
        assert not unused
    return equal


def by_kohya(model: Model, file: dict[str, Tensor]) -> int:
    """Through the layers of kohya's network, which are ComfyUI's or diffusers'."""
    pattern = KOHYA_READS[type(model.family).__name__]
    read = {key: tensor for key, tensor in file.items() if re.fullmatch(pattern, key.partition(".")[0])}
    has_diffusers_layers = model.family.other_tools.formats["kohya"] == "diffusers"
    network = ComfyUI(model.family, model.linears, has_diffusers_layers=has_diffusers_layers)
    patches, unused = network.load(read)
    assert not unused
    assert sum(key.endswith(".alpha") for key in read) == len(patches), "kohya's trainers need alpha"
    return model.equal(network.outputs(patches, model.inputs))[0]


def by_diffusers(model: Model, file: dict[str, Tensor]) -> int:
    """What `load_lora_weights` of the family's pipeline loads: keys of its conversion that begin with `transformer.`.

    All of them get the alpha of the first: diffusers.utils.peft_utils.get_peft_kwargs.
    """
    try:
        converted = getattr(diffusers, model.family.pipeline).lora_state_dict(dict(file))
    except (ValueError, KeyError):
        return 0
    alpha = next((len(tensor) for key, tensor in converted.items() if ".lora_A." in key), 0)
    outputs = {}
    for name in model.linears:
        if f"transformer.{name}.lora_A.weight" in converted:
            up, down = model.pair(converted, f"transformer.{name}")
            outputs[name] = alpha / len(down) * output(up, down, model.x(name))
    return model.equal(outputs)[0]


@pytest.mark.parametrize(("name", "format"), sorted(REACHED))
def test_linears_reached_at_true_size(name, format):
    """`pytest -s` prints the table."""
    model = made(name)
    file = model.file(format)
    normal, error = by_comfyui(model, file, bypass=False)
    bypass, _ = by_comfyui(model, file, bypass=True)
    kohya = by_kohya(model, file) if format == "kohya" else 0
    read = by_diffusers(model, file)
    print(f"\n| {name} | {format} | {len(model.linears)} | {normal} | {bypass} | {kohya} | {read} | {error:.1e} |")
    assert (len(model.linears), normal, bypass, kohya, read) == REACHED[name, format]


def test_the_table_has_all_families_and_formats():
    families = {family for family in FAMILIES if len(formats_of(family(Path(), next(iter(family.known.values()))))) > 1}
    assert {type(open_family(name, offline=True)) for name, _ in REACHED} == families
    for name, _ in REACHED:
        assert {format for other, format in REACHED if other == name} == set(
            formats_of(open_family(name, offline=True))
        )


class Checkpoint(dict):
    """Weights of the original code; tensors that are no linears' are zero."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, torch.zeros(2, 1))


@pytest.mark.parametrize(
    "name", [name for name, format in REACHED if format == "comfyui" and not re.search("Qwen|krea", name)]
)
def test_layers_are_those_of_the_published_checkpoints(name):
    """diffusers' conversion of the published single-file checkpoints gives each of our linears its rows."""
    model = made(name)
    file = model.file("comfyui")
    a, b = model.family.other_tools.comfyui_factors
    prefix, suffix = "diffusion_model.", f".{b}.weight"
    checkpoint = Checkpoint()
    for key, up in file.items():
        if key.endswith(suffix):
            layer = key.removeprefix(prefix).removesuffix(suffix)
            down = file[f"{prefix}{layer}.{a}.weight"]
            checkpoint[f"{layer}.weight"] = output(up, down, model.inputs[down.shape[1]])
            if "FLUX.2" not in name:
                checkpoint[f"{layer}.bias"] = torch.zeros(len(up), 1)
    kind = {"ZImage": "z_image"}.get(type(model.family).__name__, type(model.family).__name__.lower())
    converted = getattr(single_file_utils, f"convert_{kind}_transformer_checkpoint_to_diffusers")(checkpoint)
    count, _ = model.equal({module: converted[f"{module}.weight"] for module in model.linears})
    assert count == len(model.linears)


class Live:
    """A tiny network of a family with an adapter at strength 1/2, and the adapter's part of each linear's weight."""

    def __init__(self, name: str) -> None:
        kind = type(open_family(name, offline=True))
        self.family = kind(Path(name), kind.known[name] | {"transformer": kind.known[name]["transformer"] | TINY[name]})
        bank = LoRABank(self.zeros(), LoRAConfig(rank=2, alpha=3.0))  # a linear's output is the adapter's
        for layer in bank.layers.values():
            nn.init.normal_(layer.factors("student")[1])
        bank.select("student", torch.tensor([0.5]))
        self.units = {n: torch.eye(n) for n in {layer.base_layer.in_features for layer in bank.layers.values()}}
        with torch.no_grad():
            self.deltas = {n: self.unit(layer)[0].T for n, layer in bank.layers.items()}
        self.factors = bank.parameters("student")

    def zeros(self) -> nn.Module:
        network = self.family.meta_network().to_empty(device="cpu")
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        return network

    def unit(self, layer: LoRALinear) -> Tensor:
        return layer(self.units[layer.base_layer.in_features][None])

    def file(self, format: Any) -> dict[str, Tensor]:
        return convert(self.family, self.factors, format, scale=3.0 / 2 * 0.5, dtype=torch.float32)


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
@pytest.mark.parametrize("name", TINY)
def test_weight_one_is_the_live_adapter_at_its_strength(name, format):
    live = Live(name)
    comfyui, file = ComfyUI(live.family, linears_of(live.family)), live.file(format)
    for bypass in (False, True):
        found = comfyui.outputs(comfyui.load(file, bypass=bypass)[0], live.units)
        assert (found.keys() == live.deltas.keys()) == (REACHED[name, format][1] == REACHED[name, format][0])
        for module, delta in found.items():
            assert float((delta - live.deltas[module]).abs().max()) < 1e-6, module


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize("name", TINY)
def test_we_read_every_linear_of_our_files(name, format, tmp_path):
    """Of all tools, also those that diffusers cannot read or reads in part. Ranks are those of our linears again."""
    live = Live(name)
    save_file(live.file(format), tmp_path / "adapter.safetensors")
    found = read_adapter(tmp_path / "adapter.safetensors", live.family.other_tools, live.family.meta_network())
    assert found.keys() == live.deltas.keys()
    for module, (down, up) in found.items():
        assert len(down) == 2
        assert float((up @ down - live.deltas[module]).abs().max()) < 1e-6, module


DIFFUSERS_LOADS = {
    ("black-forest-labs/FLUX.2-dev", "kohya"): 6,
    ("Qwen/Qwen-Image", "comfyui"): 0,
    ("Qwen/Qwen-Image", "kohya"): 0,
    ("Tongyi-MAI/Z-Image", "kohya"): 0,
    ("krea/Krea-2-Raw", "comfyui"): 0,
}
"""Files that diffusers loads at any size, and the number of linears that it drops. Its conversion of Flux.1 needs the true widths."""


@pytest.mark.parametrize(("name", "format"), DIFFUSERS_LOADS)
def test_diffusers_loads_the_file_into_a_network(name, format):
    live = Live(name)
    network = live.zeros()
    converted = getattr(diffusers, live.family.pipeline).lora_state_dict(live.file(format))
    network.load_lora_adapter(converted, prefix="transformer", adapter_name="scfm")
    found = {n: m.get_delta_weight("scfm") for n, m in network.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(live.deltas) - len(found) == DIFFUSERS_LOADS[name, format]
    for module, delta in found.items():
        assert float((delta.detach() - live.deltas[module]).abs().max()) < 1e-6, module


def test_some_linears_of_a_joined_layer():
    """A part without factors, by `lora.targets` or left out, gets zero."""
    model = made("black-forest-labs/FLUX.2-klein-base-4B")
    factors = {name: f for name, f in model.factors.items() if "to_k." not in name and "x_embedder" not in name}
    leave_out = re.compile(r"[^.]*(norm_out|modulation)?[^.]*\.linear|.*to_v|proj_out")
    file = convert(model.family, factors, "comfyui", scale=SCALE, dtype=torch.float32, leave_out=leave_out)
    assert file["diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight"].shape[0] == 3
    outputs = model.comfyui.outputs(model.comfyui.load(file)[0], model.inputs)
    gone = [name for name in model.linears if f"{name}.lora_A.weight" not in factors or leave_out.fullmatch(name)]
    assert {"proj_out", "norm_out.linear", "x_embedder", "transformer_blocks.0.attn.to_k"} < set(gone)
    for name in gone:
        assert name not in outputs or not outputs.pop(name).any()
    assert model.equal(outputs)[0] == len(outputs) == len(model.linears) - len(gone)


def test_dtype_of_a_file():
    family = open_family("krea/Krea-2-Raw", offline=True)
    factors = random_factors({"img_in": linears_of(family)["img_in"]}, rank=3)
    file = convert(family, factors, "kohya", scale=1 / 3, dtype=torch.bfloat16)
    assert {key: tensor.dtype for key, tensor in file.items()} == {
        "lora_unet_first.lora_down.weight": torch.bfloat16,
        "lora_unet_first.lora_up.weight": torch.bfloat16,
        "lora_unet_first.alpha": torch.float32,
    }
    assert torch.equal(file["lora_unet_first.lora_up.weight"], (factors["img_in.lora_B.weight"] / 3).bfloat16())
    assert file["lora_unet_first.alpha"] == 3


def test_mistakes():
    sana = open_family("Efficient-Large-Model/Sana_1600M_512px_diffusers", offline=True)
    with pytest.raises(UserError, match=r"no comfyui format for adapters of SanaPipeline; its formats are diffusers"):
        convert(sana, {}, "comfyui", scale=1.0, dtype=torch.float32)
    factors = random_factors({"patch_embed": nn.Linear(2, 2)})
    with pytest.raises(UserError, match=r"all 1 adapted linears are left out: '\.\*' matches all"):
        convert(sana, factors, "diffusers", scale=1.0, dtype=torch.float32, leave_out=re.compile(".*"))
