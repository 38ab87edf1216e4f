"""Adapters of other tools in the base: the sum of the weights, the names of the tools, the fingerprint, and every mistake."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from runs import ALL_TARGETS
from safetensors.torch import save_file

from recipes.cli import main
from scfm_core import load, with_steps
from scfm_core.errors import UserError
from scfm_core.models.families import open_family
from scfm_core.models.fused_base import FusedAdapter, parse_adapter
from scfm_core.train.assemble import build_family
from scfm_core.train.fit import fit
from scfm_core.train.parse import dump_config
from scfm_core.train.pipelines import load_fused
from scfm_core.train.runs import load_trained
from scfm_core.train.trainer import Trainer

WEIGHT = 0.8
RANK = 3
PROMPT = "a handwritten digit three"


def linears(tiny) -> dict[str, tuple[int, int]]:
    network = open_family(str(tiny / "flux")).meta_network()
    return {name: tuple(m.weight.shape) for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)}


def factors(shapes: dict[str, tuple[int, int]], down: str = "lora_A", up: str = "lora_B") -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name, (outputs, inputs) in shapes.items():
        tensors[f"{name}.{down}.weight"] = torch.randn(RANK, inputs, generator=generator) * 0.1
        tensors[f"{name}.{up}.weight"] = torch.randn(outputs, RANK, generator=generator) * 0.1
    return tensors


def write_style(folder: Path, shapes: dict[str, tuple[int, int]], prefix: str = "transformer.") -> Path:
    folder.mkdir(exist_ok=True)
    save_file({prefix + name: tensor for name, tensor in factors(shapes).items()}, folder / "style.safetensors")
    return folder / "style.safetensors"


@pytest.fixture
def style(tiny, tmp_path) -> Path:
    """A LoRA of all linears, as diffusers writes it."""
    return write_style(tmp_path / "style", linears(tiny))


def fused(tiny, *adapters: tuple[Path, float], dtype=torch.float32) -> dict[str, torch.Tensor]:
    chosen = [FusedAdapter(path=str(path), weight=weight) for path, weight in adapters]
    return open_family(str(tiny / "flux"), adapters=chosen).load_network(dtype, "cpu").state_dict()


def fused_by_diffusers(tiny, path: Path) -> dict[str, torch.Tensor]:
    pipe = FluxPipeline.from_pretrained(tiny / "flux", text_encoder=None, text_encoder_2=None, vae=None)
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="style")
    pipe.fuse_lora(lora_scale=WEIGHT)
    pipe.unload_lora_weights()
    return pipe.transformer.state_dict()


def write_with_settings(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    settings = {
        "r": RANK,
        "lora_alpha": 6,
        "rank_pattern": {},
        "alpha_pattern": {"proj_out": 1.5},
        "target_modules": ["x_embedder"],
    }
    header = {"format": "pt", "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
    save_file({f"transformer.{name}": tensor for name, tensor in tensors.items()}, path, metadata=header)


def write_kohya(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Of the original code: q, k and v of the image in one matrix, and alpha beside each pair."""
    wide = factors({"lora_unet_double_blocks_0_img_attn_qkv": (3 * 64, 64), "lora_unet_double_blocks_0_img_mlp_0": (256, 64)},
                   "lora_down", "lora_up")  # fmt: skip
    alphas = {f"{name.partition('.')[0]}.alpha": torch.tensor(1.5) for name in wide}
    save_file({**wide, **alphas}, path)


def write_xlabs(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    shapes = {
        "double_blocks.0.processor.qkv_lora1": (3 * 64, 64),
        "double_blocks.0.processor.proj_lora2": (64, 64),
        "single_blocks.0.processor.qkv_lora": (3 * 64, 64),
        "single_blocks.0.processor.proj_lora": (64, 320),
    }
    save_file(factors(shapes, "down", "up"), path)


WRITERS = {
    "diffusers": lambda path, tensors: save_file({f"transformer.{n}": t for n, t in tensors.items()}, path),
    "alpha in the header": write_with_settings,
    "kohya": write_kohya,
    "XLabs": write_xlabs,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_the_weights_are_those_that_diffusers_fuses(tiny, tmp_path, write):
    path = tmp_path / "style.safetensors"
    write(path, factors(linears(tiny)))
    expected, found, base = fused_by_diffusers(tiny, path), fused(tiny, (path, WEIGHT)), fused(tiny)
    changed = [name for name in base if not torch.equal(base[name], expected[name])]
    assert len(changed) > 3 and expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)


def write_mixed_ranks(path: Path, base: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A LoRA without alpha; returns its factors."""
    generator, tensors = torch.Generator().manual_seed(7), {}
    sizes = {
        "x_embedder": 1,
        "transformer_blocks.0.attn.to_q": 2,
        "proj_out": 3,
        "single_transformer_blocks.0.proj_out": 5,
    }
    for name, rank in sizes.items():
        outputs, inputs = base[f"{name}.weight"].shape
        shapes = (rank, inputs), (outputs, rank)
        down, up = (torch.randn(shape, generator=generator) * 0.1 for shape in shapes)
        tensors[name] = down, up
    named = {
        f"transformer.{name}.lora_{side}.weight": t
        for name, both in tensors.items()
        for side, t in zip("AB", both, strict=True)
    }
    save_file(named, path)
    return tensors


def weights_in(network: torch.nn.Module, name: str) -> torch.Tensor:
    """The weight of a linear with what its active adapters add."""
    layer = network.get_submodule(name)
    return layer.base_layer.weight + sum(layer.get_delta_weight(active) for active in layer.active_adapters)


def test_without_alpha_the_scale_is_1_whatever_the_rank(tiny, tmp_path):
    """As in ComfyUI; diffusers takes the rank of one linear as the alpha of all. Loading is the same as fusing."""
    base, path = fused(tiny), tmp_path / "style.safetensors"
    tensors = write_mixed_ranks(path, base)
    pipe = FluxPipeline.from_pretrained(tiny / "flux", text_encoder=None, text_encoder_2=None)
    load_fused(pipe, [FusedAdapter(path=str(path), weight=WEIGHT)])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    found, loaded = fused(tiny, (path, WEIGHT)), pipe.transformer.state_dict()
    for name, (down, up) in tensors.items():
        expected = base[f"{name}.weight"] + WEIGHT * up @ down
        torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=0, atol=1e-6)
    for name, weight in found.items():
        torch.testing.assert_close(loaded[name], weight, rtol=0, atol=1e-6)


def test_styles_of_with_steps_are_those_of_the_training(make_config, tiny, tmp_path):
    """Of several ranks without alpha, which diffusers' loader scales in another way; beside a LoRA of the pipeline's own."""
    base, path = fused(tiny), tmp_path / "style.safetensors"
    tensors = write_mixed_ranks(path, base)
    config = make_config(config_of(path, **{"lora.targets": ALL_TARGETS}))
    trainer = Trainer(config)
    fit(trainer)
    (trainer.run_dir / "config.yaml").write_text(dump_config(config))
    assert main(["export", str(trainer.run_dir)]) == 0
    own = write_style(tmp_path / "own", {"x_embedder": tuple(base["x_embedder.weight"].shape)})
    pipe = FluxPipeline.from_pretrained(tiny / "flux")
    pipe.load_lora_weights(own.parent, weight_name=own.name, adapter_name="own")
    pipe.set_adapters("own", 0.3)
    for _ in range(2):  # the second call takes the place of the first
        with_steps(pipe, trainer.run_dir / "adapter", styles={path: WEIGHT})
    assert sorted(pipe.get_list_adapters()["transformer"]) == ["own", "scfm", "scfm_style0"]
    expected = fused(tiny, (path, WEIGHT))
    expected["x_embedder.weight"] = fused(tiny, (path, WEIGHT), (own, 0.3))["x_embedder.weight"]
    for layer in pipe.transformer.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("scfm", 0)
    for name in tensors:
        torch.testing.assert_close(weights_in(pipe.transformer, name), expected[f"{name}.weight"], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"`styles` of `with_steps`: .* must be finite and not 0, got 0"):
        with_steps(pipe, trainer.run_dir / "adapter", styles={path: 0})


def kohya_flat(tensors):
    """kohya's form of the names of diffusers, with alpha."""
    named = {
        "lora_transformer_" + name.partition(".lora_")[0].replace(".", "_") + (".lora_down" if "lora_A" in name else ".lora_up")
        + ".weight": tensor
        for name, tensor in tensors.items()
    }  # fmt: skip
    return {**named, **{f"{name.partition('.')[0]}.alpha": torch.tensor(float(RANK)) for name in named}}


@pytest.mark.parametrize(
    "rename",
    [
        lambda tensors: {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()},
        lambda tensors: {f"diffusion_model.{name}": tensor for name, tensor in tensors.items()},
        kohya_flat,
    ],
    ids=["PEFT", "PEFT in memory", "diffusion_model", "kohya"],
)
def test_the_names_of_other_tools(tiny, style, tmp_path, rename):
    path = tmp_path / "other.safetensors"
    save_file(rename(factors(linears(tiny))), path)
    expected, found = fused(tiny, (style, WEIGHT)), fused(tiny, (path, WEIGHT))
    assert all(torch.equal(expected[name], weight) for name, weight in found.items())


def test_a_folder_of_peft_has_its_alpha_beside_it(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    network = open_family(str(tiny / "flux")).load_network(torch.float32, "cpu")
    peft = get_peft_model(network, LoraConfig(r=2, lora_alpha=16, target_modules=["to_q", "proj_mlp"]))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    found, mark = fused(tiny, (path, 1.0)), open_family_with(tiny, path).fingerprint
    merged = peft.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[name], weight, atol=1e-5) for name, weight in found.items())
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 8'))
    assert open_family_with(tiny, path).fingerprint != mark


def open_family_with(tiny, path: Path):
    return open_family(str(tiny / "flux"), adapters=[FusedAdapter(path=str(path), weight=1.0)])


def test_any_range_has_the_bits_of_the_whole_and_is_cast_after_the_sum(tiny, style):
    """Ranks read ranges: a shard of a base has the same bits with any number of ranks."""
    family = open_family(str(tiny / "flux"), adapters=[FusedAdapter(path=str(style), weight=WEIGHT)] * 2)
    network = family.empty_network(torch.float32)
    with family.open_weights(network) as files:
        for name in ("transformer_blocks.0.norm1.linear.weight", "x_embedder.weight", "x_embedder.bias"):
            size = network.state_dict()[name].numel()
            whole, rounded = torch.empty(size), torch.empty(size, dtype=torch.bfloat16)
            files.fill(name, whole, 0)
            files.fill(name, rounded, 0)
            assert torch.equal(rounded, whole.bfloat16())
            for start, stop in ((1, 2), (size // 3, size // 3 * 2 + 5), (size - 3, size)):
                part = torch.empty(stop - start)
                files.fill(name, part, start)
                assert torch.equal(part, whole[start:stop]), (name, start)
    twice, once, base = (fused(tiny, *[(style, WEIGHT)] * number) for number in (2, 1, 0))
    name = "x_embedder.weight"
    torch.testing.assert_close(twice[name] - base[name], 2 * (once[name] - base[name]), rtol=1e-3, atol=1e-6)


def test_the_fingerprint_counts_content_and_weight_of_the_adapters(tiny, style, tmp_path):
    def fingerprint(path: Path, weight: float = WEIGHT) -> str:
        return open_family(str(tiny / "flux"), adapters=[FusedAdapter(path=str(path), weight=weight)]).fingerprint

    plain = open_family(str(tiny / "flux"))
    own = open_family(str(tiny / "flux"), adapters=[FusedAdapter(path=str(style), weight=WEIGHT)])
    moved = shutil.copy(style, tmp_path / "moved.safetensors")
    assert fingerprint(style) == fingerprint(Path(moved)) == own.fingerprint
    assert own.different_network(own.fingerprint) is None
    assert plain.different_network(own.fingerprint) == "model.adapters.0(weight=0.8) (missing now)"
    assert own.different_network(plain.fingerprint) == "model.adapters.0(weight=0.8) (new)"
    assert own.different_network(plain.fingerprint, with_adapters=False) is None
    assert len({plain.fingerprint, fingerprint(style), fingerprint(style, 0.7)}) == 3


def config_of(style: Path, weight: float = WEIGHT, **changes):
    return {
        "model.adapters": [{"path": str(style), "weight": weight}],
        "train.steps": 1,
        "sample.guidance": 3.5,
        **changes,
    }


def test_a_run_trains_and_samples_on_the_styled_base(make_config, style, tiny, tmp_path, capsys):
    """Its teacher is the fused network; a resumed run and its own samples need the same style."""
    config = make_config(config_of(style))
    trainer = Trainer(config)
    list(trainer.train_steps())
    trainer.state.save()
    base = trainer.model.bank.network.state_dict()
    for name, weight in fused(tiny, (style, WEIGHT)).items():
        assert torch.equal(
            base[
                name
                if name in base
                else name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
            ],
            weight,
        )
    [checkpoint] = (trainer.run_dir / "checkpoints").glob("step_*")
    Trainer(config, checkpoint)
    for changes, message in (
        (config_of(style, 0.5), "model.adapters.0.weight: 0.8 in the checkpoint, 0.5 now"),
        ({"model.adapters": []}, "model.adapters.0.weight: 0.8 in the checkpoint, None now"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(make_config(changes), checkpoint)
    # Another folder.
    moved = Path(shutil.copytree(style.parent, tmp_path / "moved")) / style.name
    renamed = Path(shutil.copy(style, tmp_path / "renamed.safetensors"))
    capsys.readouterr()
    for path in (moved, renamed):
        load_trained(trainer.run_dir, make_config(config_of(path)), with_teacher=False)
    assert "note" not in capsys.readouterr().err
    # The same name with other content.
    save_file({f"transformer.{n}": 2 * t for n, t in factors(linears(tiny)).items()}, style)
    with pytest.raises(
        UserError, match=r"model.adapters contain now: model.adapters.0\(weight=0.8\) \(other content\)"
    ):
        Trainer(make_config(config_of(style)), checkpoint)
    shutil.copy(style, moved)
    for path in (style, moved):
        with pytest.raises(UserError, match=r"is not the model that .* was trained on: model.adapters.0"):
            load_trained(trainer.run_dir, make_config(config_of(path)), with_teacher=False)
    # Another style than the run's is what a person asks for.
    load_trained(trainer.run_dir, make_config(config_of(style, 0.5)), with_teacher=False)
    note = "was trained with other model.adapters: model.adapters.0(weight=0.5) (new), model.adapters.0(weight=0.8) (missing now)"
    assert note in capsys.readouterr().err


def test_stored_paths_are_of_the_styled_model(make_config, style, tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a handwritten digit three\na handwritten digit five\n")

    def generate(name: str, *words: str) -> str:
        made = [
            "data", "generate", str(prompts), "-o", str(tmp_path / name), "--model", str(tiny / "flux"), "--trajectories", "--steps",
            "4", "--resolution", "16", "16", "--text-length", "8", "--dtype", "float32", "--shift", "3", *words,
        ]  # fmt: skip
        assert main(made) == 0
        return str(tmp_path / name)

    plain, styled = generate("plain"), generate("styled", "--adapter", f"{style}={WEIGHT}")
    method = {"method.trajectory_fraction": 1.0, "method.trajectory_grids": [1, 2, 4], "method.teacher_fraction": 0.0}
    small = {"train.global_batch_size": 2, "train.micro_batch_size": 2}
    list(Trainer(make_config(config_of(style, **{"data.path": styled}, **method, **small))).train_steps())
    with pytest.raises(UserError, match=r"sampled from another network .*: model.adapters.0\(weight=0.8\) \(new\)"):
        Trainer(make_config({"data.path": plain}))
    with pytest.raises(
        UserError, match=r"sampled from another network .*: model.adapters.0\(weight=0.8\) \(missing now\)"
    ):
        Trainer(make_config({"data.path": styled, "model.adapters": []}))


@pytest.mark.parametrize("text", ["style.safetensors=much", "style.safetensors=0", "style.safetensors=nan"])
def test_a_wrong_weight_on_the_command_line(text):
    with pytest.raises(UserError, match=rf"--adapter '{text}' is not of the form FILE=WEIGHT"):
        parse_adapter(text)


def test_the_exported_adapter_belongs_to_the_styled_model(make_config, style, tiny, tmp_path):
    """Merged: base, style and adapter in one; the card names the style."""
    config = make_config(config_of(style, **{"method.step_gain": {"gamma": 0.5}}))
    trainer = Trainer(config)
    fit(trainer)
    (trainer.run_dir / "config.yaml").write_text(dump_config(config))
    [image] = load(trainer.run_dir).sample(PROMPT, steps=2, seed=4)
    assert main(["export", str(trainer.run_dir)]) == 0
    assert main(["export", str(trainer.run_dir), "--merged", str(tmp_path / "merged"), "--steps", "2"]) == 0
    card = (trainer.run_dir / "adapter" / "README.md").read_text()
    assert 'pipe.load_lora_weights("style.safetensors", adapter_name="style0")' in card and "weight 0.8" in card
    merged = FluxPipeline.from_pretrained(tmp_path / "merged")
    both = FluxPipeline.from_pretrained(tiny / "flux")
    both.load_lora_weights(style.parent, weight_name=style.name, adapter_name="style")
    both.set_adapters("style", WEIGHT)
    [again] = load(trainer.run_dir / "adapter").sample(PROMPT, steps=2, seed=4)
    assert np.abs(np.asarray(again, dtype=int) - np.asarray(image, dtype=int)).max() <= 2
    with pytest.raises(UserError, match=r"together with style\.safetensors: load all into a pipeline of diffusers"):
        load(shutil.copytree(trainer.run_dir / "adapter", tmp_path / "elsewhere"), base=str(tiny / "flux"))
    with pytest.warns(
        UserWarning,
        match=r"together with style\.safetensors \(weight 0\.8\), which this pipeline does not have.*styles=",
    ):
        with_steps(FluxPipeline.from_pretrained(tiny / "flux"), trainer.run_dir / "adapter")
    for pipe in (merged, with_steps(both, trainer.run_dir / "adapter")):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(4)
        found = pipe(
            PROMPT,
            num_inference_steps=2,
            guidance_scale=3.5,
            height=16,
            width=16,
            max_sequence_length=8,
            generator=generator,
        )
        assert np.abs(np.asarray(found.images[0], dtype=int) - np.asarray(image, dtype=int)).max() <= 2


def text_encoder(tensors):
    return {
        **{f"transformer.{n}": t for n, t in tensors.items()},
        "text_encoder.layers.0.q_proj.lora_A.weight": torch.zeros(2, 2),
    }


MISTAKES = {
    "not a linear": (lambda t: {"transformer.pos_embed.lora_A.weight": torch.zeros(1, 1), **t}, "no linear for .*: transformer.pos_embed"),
    "text encoder": (text_encoder, "no linear for 1 tensor of .*: text_encoder.layers.0.q_proj.lora_A.weight. Use a LoRA of this model"),
    "another model": (lambda t: factors({"x_embedder": (64, 99)}), r"another shape in 1 linear of 1: x_embedder \[\('A', \[3, 99\]"),
    "half": (lambda t: {n: x for n, x in t.items() if "lora_A" in n}, "a factor is missing or has another shape"),
    "twice": (lambda t: {**t, "lora_unet_txt_in.lora_up.weight": torch.zeros(64, 3), "lora_unet_txt_in.lora_down.weight": torch.zeros(3, 32)},
              "has factors of context_embedder twice, by two names"),
    "DoRA": (lambda t: {**t, "x_embedder.dora_scale": torch.zeros(1)}, r"is a DoRA \(x_embedder.dora_scale\)"),
    "empty": (lambda t: {}, "it has no tensors"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_an_adapter_that_does_not_fit_is_named(tiny, make_config, tmp_path, change, message):
    path = tmp_path / "style.safetensors"
    save_file(change(factors(linears(tiny))), path)
    with pytest.raises(UserError, match=f"the adapter {path} .*{message}"):
        build_family(make_config(config_of(path)))


def test_missing_and_damaged_files(tiny, make_config, style):
    with pytest.raises(UserError, match=r"there is no adapter 'nowhere.safetensors'. Give a local safetensors file"):
        build_family(make_config(config_of(Path("nowhere.safetensors"))))
    assert (
        build_family(make_config(config_of(style.parent))).fingerprint
        == build_family(make_config(config_of(style))).fingerprint
    )
    shutil.copy(style, style.with_name("other.safetensors"))
    with pytest.raises(
        UserError, match=r"has several adapters: other.safetensors, style.safetensors. Give one of them"
    ):
        build_family(make_config(config_of(style.parent)))
    style.write_bytes(style.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot be read .*Is it a complete safetensors file"):
        build_family(make_config(config_of(style)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.adapters": "style.safetensors"}, r"needs a list, such as \[\{path: style.safetensors, weight: 0.8\}\]"),
        ({"model.adapters": [{"weight": 1.0}]}, r"model.adapters.0.path.* is required"),
        ({"model.adapters": [{"path": "a", "weight": 0}]}, "the weight of a must be finite and not 0"),
        ({"model.adapters": [{"path": "a", "strength": 1}]}, "model.adapters.0.strength"),
        ({"model.adapters": [{"path": "a"}], "model.init": "random", "train.weights": "full"}, "model.init=random does not use"),
    ],
)  # fmt: skip
def test_wrong_settings(make_config, changes, message):
    with pytest.raises(UserError, match=message):
        make_config(changes)
