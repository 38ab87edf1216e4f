"""What `kernels` in a configuration becomes on a device, and what the dry run says of it."""

import pytest
import torch

from scfm_core.errors import UserError
from scfm_core.kernels.attention import AttentionChoice
from scfm_core.models.families import open_family
from scfm_core.train import kernels, rules
from scfm_core.train.kernels import choose_kernels

CPU = torch.device("cpu")


@pytest.fixture
def family(tiny):
    return open_family(str(tiny / "flux"))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A device that runs kernels, and the shapes that attention was chosen for."""
    shapes = []

    def choose(name, shape):
        shapes.append(shape)
        return AttentionChoice("cudnn", "the fastest here", {"cudnn": 1.234, "math": 20.0})

    monkeypatch.setattr(kernels, "why_no_triton", lambda device: None)
    monkeypatch.setattr(kernels, "choose_attention", choose)
    return shapes


def test_auto_leaves_a_cpu_as_it_is(make_config, family):
    chosen = choose_kernels(make_config(), family, CPU)
    assert (chosen.fused, chosen.attention) == ("none", None)
    network = family.load_network(torch.float32, CPU)
    before = [type(module) for module in network.modules()]
    chosen.apply(network)
    assert [type(module) for module in network.modules()] == before


def test_auto_takes_all_that_a_gpu_has_and_says_why(make_config, family, on_a_gpu):
    chosen = choose_kernels(make_config(), family, torch.device("cuda"))
    assert (chosen.fused, chosen.attention.backend) == ("triton", "cudnn")
    assert "fused Triton kernels" in str(chosen) and "cudnn 1.23 ms, math 20.00 ms" in str(chosen)
    [shape] = on_a_gpu
    # 16 x 16 pixels are 8 x 8 latents, 16 tokens; and 8 of text.
    assert (shape.batch, shape.tokens, shape.dtype) == (8, 24, torch.float32)
    arch = family.network_config
    assert (shape.heads, shape.head_dim) == (arch["num_attention_heads"], arch["attention_head_dim"])


def test_the_attention_alone(make_config, family):
    chosen = choose_kernels(make_config({"kernels.attention": "math"}), family, CPU)
    assert (chosen.fused, chosen.attention.backend) == ("none", "math")
    assert "blocks of diffusers" in str(chosen) and "math attention (asked for)" in str(chosen)


def test_a_sharded_base_has_no_fp8(make_config, family, monkeypatch):
    config = make_config({"kernels.fp8": True})
    choose_kernels(config, family, CPU)  # one process shards nothing
    monkeypatch.setattr(rules, "launched_size", lambda: 2)
    with pytest.raises(UserError, match=r"the base is sharded; set engine\.shard=1"):
        choose_kernels(config, family, CPU)
    choose_kernels(make_config({"kernels.fp8": True, "engine.shard": 1}), family, CPU)


def test_what_was_trained_on_a_gpu_is_sampled_on_a_cpu(make_config, family, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = make_config({"kernels.fused": "triton", "kernels.attention": "cudnn", "kernels.cuda_graphs": True})
    with pytest.raises(UserError):
        choose_kernels(config, family, CPU)
    chosen = choose_kernels(config, family, CPU, training=False)
    assert (chosen.fused, chosen.attention) == ("none", None)
