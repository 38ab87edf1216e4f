"""The recipes of the published method: draws of their plans, optimiser and adapters against the published numbers."""

import re

import pytest
import torch
from torch import nn

from scfm_core.flow.schedule import dynamic_shift
from scfm_core.models.families import open_family
from scfm_core.models.flux import Flux
from scfm_core.scfm.plan import sample_plan
from scfm_core.train.parse import load_config

N = 100_000
TOKENS = 32 * 32  # of an image of 512 x 512: 8 pixels a latent, 2 latents a token
FLUX_SHIFT = 1.8776  # exp(0.63): mu is 0.5 at 256 tokens and 1.15 at 4096


def share(mask: torch.Tensor) -> float:
    return mask.double().mean().item()


@pytest.mark.parametrize(
    ("name", "dynamic", "guidance"),
    [("flux_dev_paper", 0.1, (0.0, 8.0)), ("sd35_large_paper", 0.0, (4.5, 6.0))],
)
def test_draws_are_in_the_published_ranges(name, dynamic, guidance):
    config = load_config(name)
    plan = sample_plan(
        config.method, torch.arange(N), config.run.seed, dynamic_shift=lambda _: dynamic_shift(TOKENS, Flux.mu_points)
    )
    error = 4 * (0.25 / N) ** 0.5  # four standard errors of a share, at most: 0.0063

    assert share(plan.is_teacher) == pytest.approx(0.4, abs=error)
    assert not plan.is_flow.any() and not plan.is_trajectory.any() and not plan.is_dropped.any()
    assert set(plan.grid[plan.is_teacher].tolist()) == {32}
    for grid in (16, 8, 4, 2):
        assert share(plan.grid == grid) == pytest.approx(0.6 / 4, abs=error)

    is_dynamic = (plan.shift - FLUX_SHIFT).abs() < 1e-4
    assert share(is_dynamic) == pytest.approx(dynamic, abs=error)
    for values, (low, high) in ((plan.shift[~is_dynamic], (2.5, 4.5)), (plan.guidance, guidance)):
        assert low <= values.min().item() < low + 0.001 and high - 0.001 < values.max().item() <= high
        middle = (low + high) / 2
        assert share(values < middle) == pytest.approx(0.5, abs=1.1 * error)

    # Every pair starts at an even point of its grid, so that 1 / (n / 2) of the pairs start at the noise, clamped to 1 - 1e-5.
    assert plan.sigma_start.max() == torch.tensor(1 - 1e-5)
    from_noise = share(plan.sigma_start == plan.sigma_start.max())
    assert from_noise == pytest.approx(0.4 / 16 + 0.15 * (1 / 8 + 1 / 4 + 1 / 2 + 1), abs=error)
    assert (plan.sigma_start > plan.sigma_mid).all() and (plan.sigma_mid > plan.sigma_end).all()
    assert share(plan.sigma_end == 0) == pytest.approx(from_noise, abs=2 * error)

    assert set(plan.student_strength.tolist()) == set(plan.far_strength.tolist()) == {1.0}
    assert torch.equal(plan.near_strength, (~plan.is_teacher).float())


@pytest.mark.parametrize(
    ("name", "clip_norm", "restart"), [("flux_dev_paper", 10.0, None), ("sd35_large_paper", 2.0, 2000)]
)
def test_settings_of_the_published_training(name, clip_norm, restart):
    config = load_config(name)
    train = config.train
    assert (train.lr, train.lr_schedule, train.warmup_steps, train.clip_norm) == (2e-5, "constant", 0, clip_norm)
    assert (train.betas, train.weight_decay, train.global_batch_size) == ((0.9, 0.999), 1e-4, 16)
    assert (config.ema.fast, config.ema.slow, config.ema.restart_every) == (0.99, 0.999, restart)
    assert (config.lora.rank, config.lora.alpha, config.lora.init) == (64, 64.0, "gaussian")
    assert (config.model.text_length, config.data.resolution) == (256, (512, 512))


def test_adapted_linears_of_sd35_are_those_of_the_authors_code():
    config = load_config("sd35_large_paper")
    network = open_family(config.model.path, offline=True).meta_network()
    linears = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert isinstance(network.get_submodule("pos_embed.proj"), nn.Conv2d)  # their 425th
    adapted = {name for name in linears if re.fullmatch(config.lora.targets, name)}  # as `LoRABank`
    left_out = sorted(re.sub(r"\d+", "N", name) for name in linears - adapted)
    assert (len(linears), len(adapted)) == (536, 424)
    assert {name: left_out.count(name) for name in left_out} == {
        "transformer_blocks.N.normN_context.linear": 38,
        "transformer_blocks.N.ff_context.net.N.proj": 37,
        "transformer_blocks.N.ff_context.net.N": 37,
    }
