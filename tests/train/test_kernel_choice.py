"""The choice of kernels for a configuration and a device, and its description in the dry run."""

import pytest
import torch

from scfm_core.errors import UserError
from scfm_core.kernels.attention import BACKENDS, AttentionChoice
from scfm_core.kernels.lora_choice import ProductChoice
from scfm_core.kernels.lora_gemm import TILES
from scfm_core.models.families import open_family
from scfm_core.train import kernels, rules
from scfm_core.train.kernels import choose_kernels

CPU = torch.device("cpu")


@pytest.fixture
def family(tiny):
    return open_family(str(tiny / "flux"))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Simulates a GPU; yields the shapes for which attention was chosen."""
    shapes = []

    def choose(name, shape, *, backends):
        assert backends == BACKENDS
        shapes.append(shape)
        return AttentionChoice("cudnn", "the fastest here", {"cudnn": 1.234, "math": 20.0})

    monkeypatch.setattr(kernels, "why_no_triton", lambda device: None)
    monkeypatch.setattr(kernels, "choose_attention", choose)
    return shapes


def test_auto_changes_nothing_on_a_cpu(make_config, family):
    chosen = choose_kernels(make_config(), family, CPU)
    assert (chosen.fused, chosen.attention) == ("none", None)
    network = family.load_network(torch.float32, CPU)
    before = [type(module) for module in network.modules()]
    chosen.apply(family, network)
    assert [type(module) for module in network.modules()] == before


def test_auto_uses_kernels_on_a_gpu_and_gives_the_reason(make_config, family, on_a_gpu):
    chosen = choose_kernels(make_config(), family, torch.device("cuda"))
    assert (chosen.fused, chosen.attention.backend) == ("triton", "cudnn")
    assert "fused Triton kernels" in str(chosen) and "cudnn 1.23 ms, math 20.00 ms" in str(chosen)
    [shape] = on_a_gpu
    # 16 x 16 pixels are 8 x 8 latents, 16 tokens; and 8 of text.
    assert (shape.batch, shape.tokens, shape.dtype) == (8, 24, torch.float32)
    arch = family.network_config
    assert (shape.heads, shape.head_dim) == (arch["num_attention_heads"], arch["attention_head_dim"])


def test_only_the_attention(make_config, family):
    chosen = choose_kernels(make_config({"kernels.attention": "math"}), family, CPU)
    assert (chosen.fused, chosen.attention.backend) == ("none", "math")
    assert "blocks of diffusers" in str(chosen) and "math attention (asked for)" in str(chosen)


def test_products_of_adapters_are_chosen_for_the_linears_of_a_micro_batch(make_config, family, monkeypatch):
    asked = []

    def choose(shapes, *others):
        asked.extend([sorted(set(shapes)), others])
        return ProductChoice("measured here", {"32 x 32, rows, float32": TILES[0]})

    monkeypatch.setattr(kernels, "choose_products", choose)
    monkeypatch.setattr(kernels, "MIN_ROWS", 8 * 8)
    used = []
    monkeypatch.setattr(kernels, "use_tiles", used.append)
    assert not choose_kernels(make_config(), family, CPU).products.tiles and not asked  # `library` is the default
    config = make_config({"kernels.lora": "auto", "lora.targets": r".*(to_q|proj_mlp|norm1\.linear)"})
    chosen = choose_kernels(config, family, CPU)
    width = family.width
    # 8 samples of 16 tokens of an image and 8 of text, joined in single blocks; modulations have one row for each sample.
    assert asked[0] == [(8 * 16, width, width), (8 * 24, width, width), (8 * 24, width, 4 * width)]
    assert asked[1] == (config.lora.rank, torch.float32, CPU)
    assert "by Triton for 32 x 32" in str(chosen)
    chosen.apply(family, family.load_network(torch.float32, CPU))
    assert used == [chosen.products.tiles]
    full = choose_kernels(make_config({"kernels.lora": "auto", "train.weights": "full"}), family, CPU)
    assert "there are no adapters" in str(full)


def test_fp8_needs_an_unsharded_base(make_config, family, monkeypatch):
    config = make_config({"kernels.fp8": True})
    choose_kernels(config, family, CPU)  # with one process nothing is sharded
    monkeypatch.setattr(rules, "launched_size", lambda: 2)
    with pytest.raises(UserError, match=r"the base is sharded; set engine\.shard=1"):
        choose_kernels(config, family, CPU)
    choose_kernels(make_config({"kernels.fp8": True, "engine.shard": 1}), family, CPU)


def test_a_run_of_a_gpu_can_be_sampled_on_a_cpu(make_config, family, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = make_config({"kernels.fused": "triton", "kernels.attention": "cudnn", "kernels.cuda_graphs": True})
    with pytest.raises(UserError):
        choose_kernels(config, family, CPU)
    chosen = choose_kernels(config, family, CPU, training=False)
    assert (chosen.fused, chosen.attention) == ("none", None)
