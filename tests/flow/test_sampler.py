import math

import pytest
import torch

from scfm_core.flow.path import flow_velocity, noise_latents
from scfm_core.flow.sampler import euler_sample
from scfm_core.flow.schedule import sigma_grid


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_of_order_one(shift):
    # dx/dsigma = 2 sigma x has the solution x(sigma) = x(0) exp(sigma^2).
    noise = torch.full((1, 1), math.e, dtype=torch.float64)
    steps = (32, 64, 128, 256)
    errors = []
    for num_steps in steps:
        grid = sigma_grid(num_steps, shift).double()
        sample = euler_sample(lambda x, sigma: 2 * sigma[:, None] * x, noise, grid)
        errors.append(abs(sample.item() - 1))
    log_n, log_error = torch.tensor(steps).log2(), torch.tensor(errors).log2()
    slope = (log_n - log_n.mean()) @ (log_error - log_error.mean()) / (log_n - log_n.mean()).square().sum()
    assert 0.9 < -slope < 1.1


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("field", ["constant", "towards the data"])
def test_straight_trajectories_are_exact_with_any_number_of_steps(num_steps, field):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)

    def velocity(x, sigma):
        if field == "constant":
            return flow_velocity(latents, noise)
        return (x - latents) / sigma[:, None, None]

    sample = euler_sample(velocity, noise, sigma_grid(num_steps, 3.0))
    torch.testing.assert_close(sample, latents, atol=1e-6, rtol=0)


def test_sampling_may_stop_halfway():
    latents, noise = torch.zeros(2, 3), torch.ones(2, 3)
    sigmas = torch.tensor([0.8, 0.6, 0.3])
    start, end = (noise_latents(latents, noise, sigma) for sigma in (sigmas[0], sigmas[-1]))
    sample = euler_sample(lambda x, sigma: flow_velocity(latents, noise), start, sigmas)
    torch.testing.assert_close(sample, end)


def test_the_network_sees_one_sigma_per_sample_at_the_start_of_each_step():
    seen = []

    def velocity(x, sigma):
        seen.append(sigma)
        return torch.zeros_like(x)

    grid = sigma_grid(3, 2.0)
    euler_sample(velocity, torch.zeros(5, 2), grid)
    assert [sigma.shape for sigma in seen] == [(5,)] * 3
    assert torch.equal(torch.stack(seen, dim=1), grid[:-1].expand(5, 3))


@pytest.mark.parametrize(
    ("noise", "state"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_state_is_at_least_fp32(noise, state):
    dtypes = []

    def velocity(x, sigma):
        dtypes.append(x.dtype)
        return torch.ones(2, 3, dtype=torch.bfloat16)

    sample = euler_sample(velocity, torch.zeros(2, 3, dtype=noise), sigma_grid(3))
    assert {*dtypes, sample.dtype} == {state}


def test_sampling_does_not_change_its_noise_and_has_no_gradient():
    weight = torch.ones((), requires_grad=True)
    noise = torch.ones(2, 3)
    sample = euler_sample(lambda x, sigma: weight * x, noise, sigma_grid(2))
    assert torch.equal(noise, torch.ones(2, 3))
    assert not sample.requires_grad
