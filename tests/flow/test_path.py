import pytest
import torch

from scfm_core.flow.path import euler_step, flow_velocity, noise_latents, per_sample

SIGMA = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


def latents_and_noise(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 5, 2, generator=generator, dtype=torch.float64).to(dtype)
    return latents, noise


def test_sigma_0_is_data_and_sigma_1_is_noise():
    latents, noise = latents_and_noise()
    assert torch.equal(noise_latents(latents, noise, torch.zeros(3)), latents)
    assert torch.equal(noise_latents(latents, noise, torch.ones(3)), noise)


def test_velocity_is_the_slope_of_the_path():
    latents, noise = latents_and_noise()
    h = 1e-4
    slope = (noise_latents(latents, noise, SIGMA + h) - noise_latents(latents, noise, SIGMA - h)) / (2 * h)
    torch.testing.assert_close(slope, flow_velocity(latents, noise), atol=1e-10, rtol=0)


def test_one_euler_step_with_the_true_velocity_reaches_the_data():
    latents, noise = latents_and_noise()
    x = noise_latents(latents, noise, SIGMA)
    torch.testing.assert_close(euler_step(x, flow_velocity(latents, noise), SIGMA), latents, atol=1e-12, rtol=0)


def test_euler_step_moves_along_the_path():
    latents, noise = latents_and_noise()
    sigma_next = SIGMA / 3
    x = euler_step(noise_latents(latents, noise, SIGMA), flow_velocity(latents, noise), SIGMA - sigma_next)
    torch.testing.assert_close(x, noise_latents(latents, noise, sigma_next), atol=1e-12, rtol=0)


def test_each_row_has_its_own_sigma():
    latents, noise = latents_and_noise()
    batch = noise_latents(latents, noise, SIGMA)
    for row, sigma in enumerate(SIGMA):
        assert torch.equal(batch[row], noise_latents(latents[row], noise[row], sigma))


# A 0-d sigma does not promote by torch's own rules: bf16 latents would stay bf16.
@pytest.mark.parametrize("sigma", [torch.tensor(0.3), torch.full((3,), 0.3)], ids=["scalar", "per sample"])
def test_bf16_latents_are_noised_in_fp32(sigma):
    latents, noise = latents_and_noise(torch.bfloat16)
    noised = noise_latents(latents, noise, sigma)
    assert noised.dtype == torch.float32
    assert torch.equal(noised, noise_latents(latents.float(), noise.float(), sigma))


def test_velocity_of_bf16_latents_is_exact_in_fp32():
    latents, noise = latents_and_noise(torch.bfloat16)
    velocity = flow_velocity(latents, noise)
    assert velocity.dtype == torch.float32
    assert torch.equal(velocity, noise.float() - latents.float())


@pytest.mark.parametrize("wide", ["latents", "noise"])
def test_fp64_is_kept(wide):
    inputs = {"latents": torch.ones(2, 3), "noise": torch.ones(2, 3)}
    inputs[wide] = inputs[wide].double()
    assert noise_latents(**inputs, sigma=torch.zeros(2)).dtype == torch.float64
    assert flow_velocity(**inputs).dtype == torch.float64


@pytest.mark.parametrize("velocity_dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta_sigma", [torch.tensor(0.25), torch.full((3,), 0.25)], ids=["scalar", "per sample"])
def test_the_state_keeps_its_dtype_whatever_the_velocity(dtype, velocity_dtype, delta_sigma):
    x = torch.full((3, 2), 1.0, dtype=dtype)
    stepped = euler_step(x, torch.full((3, 2), 2.0, dtype=velocity_dtype), delta_sigma)
    assert stepped.dtype == dtype
    assert torch.equal(stepped, torch.full_like(x, 0.5))


def test_latents_and_noise_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"latents \(3, 4\) and noise \(3, 1\)"):
        noise_latents(torch.zeros(3, 4), torch.zeros(3, 1), torch.zeros(3))


def test_per_sample_values_broadcast_over_rows_alone():
    values = torch.arange(3.0)
    assert per_sample(values, torch.zeros(3, 4, 5)).shape == (3, 1, 1)
    assert per_sample(values, torch.zeros(3)).shape == (3,)
    assert per_sample(values[0], torch.zeros(3, 4, 5)).shape == ()
    with pytest.raises(ValueError, match=r"one value per sample, got shape \(3, 1\)"):
        per_sample(values[:, None], torch.zeros(3, 4))
