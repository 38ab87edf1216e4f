import math

import pytest
import torch

from scfm_core.flow.schedule import dynamic_shift, shift_of_grid, shift_sigma, sigma_grid

SHIFTS = (0.5, 1.0, 2.5, 3.25, 4.5, 30.0)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", [1, 3, 8, 32])
def test_grid_is_the_formula_of_the_method(num_steps, shift):
    expected = []
    for k in range(num_steps + 1):
        u = 1 - k / num_steps
        expected.append(shift * u / (1 + (shift - 1) * u))
    grid = sigma_grid(num_steps, shift)
    assert grid.dtype == torch.float32
    torch.testing.assert_close(grid, torch.tensor(expected), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("shift", SHIFTS)
def test_grid_falls_strictly_from_exactly_1_to_exactly_0(shift):
    for num_steps in range(1, 65):
        grid = sigma_grid(num_steps, shift)
        assert grid[0] == 1
        assert grid[-1] == 0
        assert (grid.diff() < 0).all()


def test_shift_is_off_by_default():
    torch.testing.assert_close(sigma_grid(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), atol=0, rtol=0)


def test_shift_moves_the_middle_towards_the_noise():
    assert sigma_grid(2, 3.0)[1] == 0.75
    assert sigma_grid(2, 1 / 3)[1] == 0.25


def test_every_second_point_of_a_grid_is_the_grid_of_half_the_steps():
    assert torch.equal(sigma_grid(32, 3.1)[::2], sigma_grid(16, 3.1))


def test_shifts_compose_by_multiplication():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(shift_sigma(u, 2.0), 1.75), shift_sigma(u, 3.5), atol=1e-15, rtol=0)


def test_shift_may_differ_by_sample():
    shift = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(shift_sigma(torch.tensor([0.5, 0.5]), shift), torch.tensor([0.5, 0.75]))


@pytest.mark.parametrize(("image_tokens", "mu"), [(256, 0.5), (2176, 0.825), (4096, 1.15)])
def test_dynamic_shift_is_exponential_in_the_token_count(image_tokens, mu):
    assert dynamic_shift(image_tokens, ((256, 0.5), (4096, 1.15))) == pytest.approx(math.exp(mu), rel=1e-12)


def test_dynamic_shift_of_another_family():
    assert dynamic_shift(6400, ((256, 0.5), (6400, 1.15))) == pytest.approx(math.exp(1.15), rel=1e-12)
    assert dynamic_shift(3328, ((256, 0.5), (6400, 1.15))) == pytest.approx(math.exp(0.825), rel=1e-12)


@pytest.mark.parametrize("num_steps", [0, -1])
def test_a_grid_needs_a_step(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be at least 1, got {num_steps}"):
        sigma_grid(num_steps)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_shift_must_be_positive_and_finite(shift):
    with pytest.raises(ValueError, match=f"shift must be positive and finite, got {shift}"):
        sigma_grid(4, shift)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.25])
@pytest.mark.parametrize("steps", [2, 24])
def test_the_shift_of_a_grid_is_the_one_that_made_it(shift, steps):
    assert shift_of_grid(sigma_grid(steps, shift)) == pytest.approx(shift, rel=1e-5)
