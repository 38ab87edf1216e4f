"""Restarts of the averages: at an interval, or when the ratio of their lags shows a drift of the student."""

import pytest
import torch
from torch import Tensor

from scfm_core.scfm.ema import DualEMA, EMAConfig
from scfm_core.scfm.restart import CHECK_EVERY, lag_ratio, restart_due, threshold

WIDE = 3000


def one_process(tensor: Tensor) -> Tensor:
    """The sum over the processes."""
    return tensor


def follow(config: EMAConfig, steps: int, move: Tensor, jitter: float) -> tuple[list[int], list[float]]:
    """Steps of restarts and all ratios, for a student that moves in each step by `move` and by noise of scale `jitter`."""
    student = {"w": torch.zeros(WIDE, dtype=torch.float64)}
    emas, generator = DualEMA(student, config=config), torch.Generator().manual_seed(0)
    restarts, ratios = [], []
    for step in range(1, steps + 1):
        student["w"] += move + jitter * torch.randn(WIDE, generator=generator, dtype=torch.float64)
        emas.update()
        due, ratio = restart_due(emas, step, one_process)
        if ratio is not None:
            ratios.append(ratio)
        if due:
            emas.restart()
            restarts.append(step)
    return restarts, ratios


@pytest.mark.parametrize(("every", "due"), [(None, []), (1, [1, 2, 3, 4, 5, 6, 7, 8, 9]), (4, [4, 8])])
def test_at_an_interval(every, due):
    emas = DualEMA({"w": torch.zeros(3)}, config=EMAConfig(restart_every=every))
    assert [step for step in range(1, 10) if restart_due(emas, step, one_process)[0]] == due


@pytest.mark.parametrize(("fast", "slow"), [(0.99, 0.999), (0.98, 0.995)])
def test_limits_of_the_ratio(fast, slow):
    """Closed forms: an average lags 1 / (1 - b) steps behind a drift and (1 - b^2)^-1/2 steps behind a random walk."""
    config, direction = EMAConfig(fast=fast, slow=slow), torch.ones(WIDE, dtype=torch.float64)
    for move, jitter, limit in (
        (direction, 0.0, (1 - slow) / (1 - fast) * fast / slow),
        (0 * direction, 1.0, ((1 - slow**2) / (1 - fast**2)) ** 0.5),
    ):
        student = {"w": torch.zeros(WIDE, dtype=torch.float64)}
        emas, generator = DualEMA(student, config=config), torch.Generator().manual_seed(0)
        for _ in range(6000):
            student["w"] += move + jitter * torch.randn(WIDE, generator=generator, dtype=torch.float64)
            emas.update()
        assert lag_ratio(emas) == pytest.approx(limit, rel=0.04)
    assert (1 - slow) / (1 - fast) < threshold(config) < ((1 - slow) / (1 - fast)) ** 0.5


@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_a_drift_of_any_speed_gives_equal_intervals(scale):
    restarts, _ = follow(EMAConfig(restart_every="auto"), 2000, scale * torch.ones(WIDE, dtype=torch.float64), 0.0)
    assert len(restarts) == 2 and restarts[1] == 2 * restarts[0]
    assert 700 <= restarts[0] <= 900  # the paper tuned 1000 by hand


def test_a_random_walk_gives_no_restart():
    restarts, ratios = follow(EMAConfig(restart_every="auto"), 3000, torch.zeros(WIDE, dtype=torch.float64), 1.0)
    assert restarts == []
    assert len(ratios) == 3000 // CHECK_EVERY and ratios[0] > ratios[-1] > threshold(EMAConfig())


def test_equal_averages_have_ratio_one():
    assert lag_ratio(DualEMA({"w": torch.ones(2)})) == 1


def test_lags_are_summed_over_shards():
    student = torch.arange(6.0)
    whole = DualEMA({"w": student.clone()}, {"w": torch.zeros(6)}, {"w": torch.zeros(6)})
    parts = [DualEMA({"w": student[rows].clone()}) for rows in (slice(0, 2), slice(2, 6))]
    for emas in (whole, *parts):
        emas.student["w"].mul_(3)
        emas.update()
    sums: list[Tensor] = []
    for emas in parts:
        lag_ratio(emas, lambda local: sums.append(local) or local)
    assert lag_ratio(parts[0], lambda _: torch.stack(sums).sum(0)) == pytest.approx(lag_ratio(whole), rel=1e-6)
