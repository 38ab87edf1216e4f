"""Estimates against published numbers; they need no weights, because the network is on the meta device."""

import pytest

from recipes.train import describe
from scfm_core.models.families import open_family
from scfm_core.train.cards import Fit, fits
from scfm_core.train.estimate import estimate
from scfm_core.train.parse import load_config
from scfm_core.train.rules import broken_rules, check_base
from scfm_core.train.trace import trace_forward


@pytest.fixture(scope="module")
def flux():
    return open_family("black-forest-labs/FLUX.1-dev", offline=True)


def test_flux_dev_has_the_papers_adapters(flux):
    result = estimate(load_config("flux_dev_lora.yaml"), flux)
    assert result.base_parameters == 11_901_408_320
    assert result.adapted_linears == 504
    assert result.trained_parameters / 1e6 == pytest.approx(347, abs=1)
    assert result.memory["frozen base"] == 2 * result.base_parameters
    assert result.memory["Adam (fp32)"] == 8 * result.trained_parameters
    assert result.memory["fp8 copies of it"] == 0
    in_fp8 = estimate(load_config("flux_dev_lora.yaml", ["kernels.fp8=true"]), flux).memory["fp8 copies of it"]
    assert 0.7 < in_fp8 / result.base_parameters < 0.8  # one byte each, except for the modulations, a quarter of Flux


@pytest.mark.parametrize(
    ("size", "text_length", "forward", "step", "step_with_checkpointing"),
    [(512, 256, 17.7, 74.7, 92.9), (512, 512, 21.5, 91.2, 113), (1024, 512, 74.4, 328, 404)],
)
def test_flops_agree_with_published_numbers(flux, size, text_length, forward, step, step_with_checkpointing):
    for mode, expected in (("none", step), ("full", step_with_checkpointing)):
        config = load_config(
            "flux_dev_lora.yaml",
            [
                f"data.resolution=[{size},{size}]",
                f"model.text_length={text_length}",
                f"train.activation_checkpointing={mode}",
            ],
        )
        result = estimate(config, flux)
        assert result.forward_flops / 1e12 == pytest.approx(forward, rel=0.01)
        assert result.step_flops / 1e12 == pytest.approx(expected, rel=0.03)


def test_full_weights_cost_five_or_six_forwards(flux):
    for mode, forwards in (("none", 5), ("full", 6)):
        result = estimate(load_config("flux_dev_full.yaml", [f"train.activation_checkpointing={mode}"]), flux)
        assert result.step_flops / result.forward_flops == pytest.approx(forwards, rel=0.03)


def test_a_traced_forward_agrees_with_the_closed_form(flux):
    """Both kinds of block have 12 D^2 weights a token, and two products of S x S x D in their attention."""
    network = flux.meta_network()
    forward = trace_forward(flux, network, (16, 64, 64), 256)
    tokens, dim, blocks = 1024 + 256, 24 * 128, 19 + 38
    assert forward.attention == 4 * blocks * dim * tokens**2
    a_token = 24 * blocks * dim**2 * tokens
    modulation = 2 * dim**2 * (19 * 12 + 38 * 3 + 2)  # of the sample as a whole
    outside = 2 * dim * (1024 * 2 * 64 + 256 * 4096) + 2 * (2 * (256 * dim + dim**2) + 768 * dim + dim**2)
    assert forward.linear == a_token + modulation + outside
    assert (
        sum(2 * rows * network.get_submodule(name).weight.numel() for name, rows in forward.rows.items())
        == forward.linear
    )


def test_the_output_of_a_dry_run():
    page = describe(
        load_config("flux_dev_lora.yaml", ["train.activation_checkpointing=none", "train.global_batch_size=8"]),
        by_formula=True,
    )
    for words in (
        "11.9 B parameters",
        "504 adapted linears",
        "347 M adapter parameters",
        "17.7 TFLOPs a forward",
        "A100-day",
    ):
        assert words in page


@pytest.mark.parametrize(
    ("recipe", "words"),
    [("flux_dev_lora.yaml", "and if shards hold images"), ("flux_dev_fewshot.yaml", "encoders (on the fly)")],
)
def test_encoders_beside_the_network(recipe, words):
    page = describe(load_config(recipe), by_formula=True)
    assert f"{words:<28}     9.26 GiB" in page
    assert ("and if shards hold images" in page) != ("on the fly" in page)


@pytest.mark.parametrize("world", [1, 8])
def test_a_dry_run_says_on_which_cards_the_run_fits(flux, world):
    result = estimate(load_config("flux_dev_lora.yaml"), flux, world)
    full, one = "train.activation_checkpointing=full", "train.micro_batch_size=1"
    assert [card.size for card in result.cards] == [141, 80, 48, 40, 32, 24]
    assert [card.fits for card in result.cards] == [True] * 6
    alone = (full,) if world == 1 else ()
    assert [card.settings for card in result.cards[:4]] == [(), (), alone, (full,)]
    assert [card.settings for card in result.cards[4:]] == [(full, one, "model.base=int8")] * 2
    assert all(card.memory <= 0.92 * card.size * 2**30 for card in result.cards)
    for settings, memory in {card.settings: card.memory for card in result.cards}.items():  # they do what they promise
        again = estimate(load_config("flux_dev_lora.yaml", list(settings)), flux, world) if settings else result
        assert sum(again.memory.values()) == memory
    assert str(result.cards[3]).startswith(f"40 GB (A100): fits with a cache and {full} (3")


def test_an_l40s_reports_45_gib_of_its_48():
    assert Fit(48, 0.92 * 45.0 * 2**30, ()).fits and not Fit(48, 0.93 * 45.0 * 2**30, ()).fits


@pytest.mark.parametrize(
    ("words", "bases", "numbers"),
    [
        ([], ["int8", "nf4"], [28, 57, 28, 57]),
        (["model.base=int8", "model.offload_blocks=30"], ["nf4"], [57, 57]),
        (["kernels.cuda_graphs=true"], ["int8", "nf4"], []),
        (["kernels.fp8=true"], [], []),
        (["train.weights=full", "method.step_gain=none"], [], []),
    ],
)
def test_variants_of_the_base_are_those_that_the_rules_allow(flux, words, bases, numbers):
    smallest = ["train.activation_checkpointing=full", "train.micro_batch_size=1"]
    config, tried = load_config("flux_dev_lora.yaml", [*smallest, *words]), []

    def memory(variant):
        check_base(variant, 8)
        assert not list(broken_rules(variant))
        tried.append(variant.model)
        return 1e15  # nothing fits, so every variant is tried

    fits(config, 8, memory, blocks=57)
    stored = [model.base for model in tried if model.offload_blocks == config.model.offload_blocks]
    assert list(dict.fromkeys(stored)) == [config.model.base, *bases]
    assert [model.offload_blocks for model in tried if model.offload_blocks != config.model.offload_blocks] == numbers


def test_quantised_encoders_take_less_beside_the_network(flux):
    """They are read into host memory in bf16."""
    page = describe(load_config("flux_dev_lora_24gb.yaml"), by_formula=True).splitlines()
    assert f"  {'and if shards hold images':<28}     4.63 GiB of encoders" in page
    assert f"  {'encoders while loading':<28}     9.26 GiB" in page
    assert "  24 GB (RTX 4090): fits with a cache (18.1 GiB)" in page
    assert "  32 GB (RTX 5090): fits (18.1 GiB)" in page


def test_a_dry_run_says_how_many_gpus_a_large_run_needs(flux):
    alone = estimate(load_config("flux_dev_full.yaml"), flux)
    assert not any(card.fits for card in alone.cards)
    assert alone.gpus_needed == 8
    assert any(card.fits for card in estimate(load_config("flux_dev_full.yaml"), flux, 8).cards)


def test_a_dry_run_of_a_tiny_run_promises_no_duration(make_config):
    page = describe(make_config(), by_formula=True)
    assert "A100" not in page and "fits" not in page and "this run" in page


def test_a_dry_run_says_what_a_node_and_its_disk_need(flux):
    """Flux.1-dev with all weights on 64 GPUs: 20 bytes a parameter, and 8 processes a node that load by ranges."""
    words = ["train.global_batch_size=64"]
    result = estimate(load_config("flux_dev_full.yaml", words), flux, 64)
    checkpoint = sum(result.checkpoint.values())
    assert checkpoint == pytest.approx(20 * result.trained_parameters, rel=0.005)
    assert result.host_memory == {
        "blocks of the base": 0,
        "weights while loading": 8 * 2**23,
        "encoders while loading": flux.encoder_bytes,
        "copy of a checkpoint": 0,
    }
    page = describe(load_config("flux_dev_full.yaml", words), 64, by_formula=True)
    for line in (
        "host memory of a node with 8 processes, besides Python, CUDA and data workers",
        "  total                            9.32 GiB",
        "checkpoint  238.70 GB: written in 3 min 59 s at 1 GB/s, 24 s at 10 GB/s",
        "disk        717.10 GB in run.dir: checkpoint.keep=2, one more while it is written, and 1 GB for the other files",
    ):
        assert line in page.splitlines()


@pytest.mark.parametrize(
    ("words", "part", "expected"),
    [
        (["engine.cpu_offload=true"], "Adam (fp32)", 8 / 8),
        (["checkpoint.asynchronous=true"], "copy of a checkpoint", 20 / 8),
        (["engine.name=deepspeed", "engine.zero_stage=3", "engine.cpu_offload=true"], "gradients (fp32)", 4 / 8),
    ],
)
def test_host_memory_of_a_node_is_that_of_its_processes(flux, words, part, expected):
    """On 64 GPUs a node has an eighth of the shards."""
    result = estimate(load_config("flux_dev_full.yaml", ["train.global_batch_size=64", *words]), flux, 64)
    assert result.host_memory[part] == pytest.approx(expected * result.trained_parameters)


def test_processes_of_a_node_are_those_of_the_launch(flux, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert estimate(load_config("flux_dev_lora.yaml"), flux, 16).a_node == 4
    assert estimate(load_config("flux_dev_lora.yaml"), flux, 2).a_node == 2
