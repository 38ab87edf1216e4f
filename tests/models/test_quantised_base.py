"""A frozen base in packed weights: which layers, how it is filled, and the models that it cannot serve."""

import pytest
import torch
from runs import ALL_TARGETS
from torch import nn

from data_tools.encode import EncodeConfig
from recipes.cli import main
from scfm_core.errors import UserError
from scfm_core.filling import materialise
from scfm_core.kernels.quantised import dequantise
from scfm_core.models import encoders
from scfm_core.models.adapters import LoRABank, LoRAConfig
from scfm_core.models.encoders import TextEncoders
from scfm_core.models.families import open_family
from scfm_core.models.quantised import QuantisedLinear, quantise_linears, quantise_onto, saved_bytes
from scfm_core.train.rules import check_kernels
from scfm_core.train.runs import load_trained
from scfm_core.train.trainer import Trainer

CPU = torch.device("cpu")


def packed(network):
    return {
        name.removesuffix(".base_layer"): module
        for name, module in network.named_modules()
        if isinstance(module, QuantisedLinear)
    }


@pytest.mark.parametrize("base", ["int8", "float8", "nf4"])
def test_the_linears_of_blocks_are_packed_and_nothing_else_changes(make_config, tiny, base):
    """Also linears without adapters. Modulations, of one row a sample, take a byte."""
    trainer = Trainer(make_config({"model.base": base, "lora.targets": r".*\.attn\.to_[qkv]"}))
    network, stored = (
        trainer.model.networks["student"],
        open_family(str(tiny / "flux")).load_network(torch.float32, CPU),
    )
    linears = {n for n, m in stored.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks." in n}
    layers = packed(network)
    assert layers.keys() == linears
    assert {name for name, layer in layers.items() if layer.packing != base} == (
        {name for name in linears if "norm" in name} if base == "nf4" else set()
    )
    error = {"int8": 0.01, "float8": 0.03, "nf4": 0.1}
    for name, layer in layers.items():
        weight = stored.get_submodule(name).weight
        back = dequantise(layer.values, layer.scale, torch.float32)
        assert 0 < (back - weight).norm() < error[layer.packing] * weight.norm(), name
    kept = {n.replace(".base_layer", ""): t for n, t in network.state_dict().items() if ".lora_" not in n}
    expected = {n: t for n, t in stored.state_dict().items() if n.removesuffix(".weight") not in linears}
    assert kept.keys() == expected.keys() and all(torch.equal(kept[name], expected[name]) for name in kept)


def test_one_layer_at_a_time_is_unpacked_while_weights_are_read(tiny):
    family = open_family(str(tiny / "flux"))
    network = family.empty_network(torch.float32)
    bank = LoRABank(network, LoRAConfig(rank=2))
    quantise_linears(network, family.blocks(network), "nf4")
    layers, most = packed(network).values(), 0

    def fill(name, part, start):
        nonlocal most
        whole = [layer.weight for layer in layers if layer.weight is not None and not layer.weight.is_meta]
        most = max(most, len(whole))
        part.zero_()

    materialise(network, CPU, bank.filling(fill))
    assert most == 1 and all(layer.weight is None for layer in layers)


@pytest.mark.parametrize("base", ["int8", "float8", "nf4"])
def test_the_estimate_counts_the_bytes_that_are_saved(tiny, base):
    """Of the teacher of `scfm data generate --base` too."""
    family = open_family(str(tiny / "flux"))
    plain, network = family.meta_network(), family.load_network(torch.float32, CPU, base)
    sizes = [sum(t.nbytes for t in (*net.parameters(), *net.buffers())) for net in (plain, network)]
    assert sum(saved_bytes(plain, family.blocks(plain), base, 4).values()) == sizes[0] - sizes[1]


@pytest.mark.parametrize("base", ["int8", "float8", "nf4"])
def test_a_step_is_that_of_the_dequantised_network(make_config, base):
    """Near and far passes at strengths of each sample, and the gradients."""
    changes = {"method.step_gain": {"gamma": 0.5}, "train.steps": 2, "lora.targets": ALL_TARGETS}
    quantised, exact = (Trainer(make_config({**changes, "model.base": kind})) for kind in (base, "bfloat16"))
    for name, layer in packed(quantised.model.networks["student"]).items():
        linear = exact.model.networks["student"].get_submodule(name).base_layer
        linear.weight.data = dequantise(layer.values, layer.scale, torch.float32)
    for ours, theirs in zip(quantised.train_steps(), exact.train_steps(), strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)


def test_adapters_are_sampled_on_the_base_as_it_is_unless_told(make_config):
    config = make_config({"model.base": "nf4", "train.steps": 1})
    trainer = Trainer(config)
    next(trainer.train_steps())
    trainer.state.save()
    assert not packed(load_trained(trainer.run_dir, config, with_teacher=True).networks["student"])
    config = make_config({"sample.base": "int8"})
    assert packed(load_trained(trainer.run_dir, config, with_teacher=True).networks["student"])


def test_a_base_in_float8_serves_the_fp8_passes_without_a_copy(make_config):
    trainer = Trainer(make_config({"model.base": "float8", "kernels.fp8": True, "lora.targets": ALL_TARGETS}))
    used = [(x.base_layer, x.fp8) for x in trainer.model.bank.layers.values() if x.fp8 is not None]
    shared = [base.values is weight.values for base, weight in used if isinstance(base, QuantisedLinear)]
    assert len(shared) > 20 and all(shared)
    next(trainer.train_steps())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.base": "int8", "kernels.fp8": True}, "kernels.fp8 needs the weights in bfloat16 or float8"),
        ({"model.base": "int8", "train.weights": "full"}, "model.base=int8 stores a frozen base"),
        ({"sample.base": "nf4", "train.weights": "full"}, "sample.base=nf4 stores a frozen base"),
        ({"model.base": "int4"}, "model.base"),
    ],
)
def test_impossible_combinations_are_errors(make_config, changes, message):
    with pytest.raises(UserError, match=message):
        make_config(changes)


def test_a_base_that_is_sharded_is_an_error(make_config, monkeypatch):
    monkeypatch.setattr("scfm_core.train.rules.launched_size", lambda: 2)
    with pytest.raises(UserError, match=r"model.base=nf4 cannot run here: the base is sharded; set engine.shard=1"):
        check_kernels(make_config({"model.base": "nf4"}), CPU)
    check_kernels(make_config({"engine.shard": 1}), CPU)
    with pytest.raises(UserError, match=r"model.base=nf4 cannot run here: ZeRO-3 shards the base"):
        check_kernels(make_config({"engine": {"name": "deepspeed", "zero_stage": 3}}), CPU)


def test_a_run_resumes_on_its_own_base_only(make_config):
    trainer = Trainer(make_config({"model.base": "nf4", "train.steps": 1}))
    next(trainer.train_steps())
    path = trainer.state.save()
    with pytest.raises(UserError, match=r"model\.base: nf4 in the checkpoint, bfloat16 now"):
        Trainer(make_config({"model.base": "bfloat16", "train.steps": 2}), path)


class TestEncoders:
    PROMPTS = ("a handwritten digit one", "")

    def encoded(self, tiny, packing):
        text = TextEncoders(open_family(str(tiny / "flux")), 8, torch.float32, CPU, packing)
        return text, text.encode(self.PROMPTS).fields

    def test_a_quantised_encoder_is_off_by_the_error_of_the_format(self, tiny, monkeypatch):
        """Small ones, as CLIP, stay as they are."""
        _, exact = self.encoded(tiny, "bfloat16")
        assert torch.equal(self.encoded(tiny, "nf4")[1]["text"], exact["text"])
        monkeypatch.setattr(encoders, "LARGE_ENCODER", 0)
        errors = {}
        for packing in ("int8", "float8", "nf4"):
            text, found = self.encoded(tiny, packing)
            modules = text._pipeline.text_encoder_2.modules()
            assert all(isinstance(m, QuantisedLinear) for m in modules if hasattr(m, "in_features"))
            errors[packing] = float((found["text"] - exact["text"]).norm() / exact["text"].norm())
        assert 0 < errors["int8"] < errors["float8"] < errors["nf4"] < 0.3, errors

    def test_the_run_and_the_cache_use_them(self, make_config, tiny, tmp_path, monkeypatch):
        used = []
        monkeypatch.setattr(encoders, "quantise_onto", lambda encoder, packing, device: used.append(packing))
        monkeypatch.setattr(encoders, "LARGE_ENCODER", 0)
        Trainer(make_config({"model.encoders": "int8", "sample.every": 2, "sample.prompts": ["a digit"]}))
        assert set(used) == {"int8"}
        used.clear()
        words = ["--model", str(tiny / "flux"), "--resolution", "16", "16", "--text-length", "8", "--encoders", "nf4"]
        assert main(["data", "encode", str(tiny / "digits"), "-o", str(tmp_path / "cache"), *words]) == 0
        assert set(used) == {"nf4"}
        config = EncodeConfig(dtype=torch.float32, encoders="nf4")
        assert config.parameters(open_family(str(tiny / "flux")))["encoders"] == "nf4"


def test_a_tied_weight_is_not_quantised():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner, self.head = (
                nn.Embedding(64, 64),
                nn.Linear(64, 64),
                nn.Linear(64, 64, bias=False),
            )
            self.head.weight = self.embedding.weight

    model = Model()
    quantise_onto(model, "nf4", CPU)
    assert packed(model).keys() == {"inner"} and model.head.weight is model.embedding.weight
