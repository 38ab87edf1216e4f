import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from recipes.tiny import write_pipeline
from scfm_core.errors import UserError
from scfm_core.flow.path import euler_step
from scfm_core.flow.sampler import euler_sample
from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.families import open_family
from scfm_core.models.flux import image_ids, pack_latents, timestep_of, unpack_latents


@pytest.mark.parametrize("shape", [(2, 16, 8, 12), (1, 4, 6, 2), (3, 1, 8, 8)])
def test_packing_is_diffusers_own_and_inverts(shape):
    latents = torch.randn(shape)
    batch, channels, height, width = shape
    packed = pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, batch, channels, height, width))
    assert torch.equal(unpack_latents(packed, height, width), latents)


def test_position_ids_are_diffusers_own():
    ours = image_ids(6, 10, torch.device("cpu"))
    assert torch.equal(ours, FluxPipeline._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32))


def test_one_euler_step_of_the_pipeline_is_our_velocity(tiny):
    """Packing, ids, timestep and guidance at once: a 1-step pipeline returns `noise - velocity`."""
    pipe = FluxPipeline.from_pretrained(tiny / "flux")
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a handwritten digit two", "a handwritten digit six"]
    noise = torch.randn(2, 1, 8, 8)
    theirs = pipe(
        prompts,
        num_inference_steps=1,
        guidance_scale=2.5,
        height=16,
        width=16,
        max_sequence_length=8,
        latents=pack_latents(noise),
        output_type="latent",
    ).images
    family = open_family(str(tiny / "flux"))
    cond = TextEncoders(family, 8, torch.float32, "cpu").encode(prompts, guidance=2.5)
    with torch.no_grad():
        velocity = family.velocity(family.load_network(torch.float32, "cpu"), noise, torch.ones(2), cond)
    torch.testing.assert_close(unpack_latents(theirs, 8, 8), noise - velocity, rtol=1e-5, atol=1e-5)


def test_fp32_weights_under_autocast_are_told_the_timesteps_of_bf16():
    """Full weights are trained so, and sampled in bf16."""
    sigmas = torch.linspace(0, 1, 1001)
    with torch.autocast("cpu", torch.bfloat16):
        told = timestep_of(sigmas, torch.float32)
    assert torch.equal(told, timestep_of(sigmas, torch.bfloat16))
    assert told.dtype == torch.bfloat16 and torch.equal(timestep_of(sigmas, torch.float32), sigmas)


@pytest.mark.parametrize("num_steps", [3, 4, 8])
@torch.no_grad()
def test_the_pipeline_in_bf16(tiny, num_steps):
    """Bit by bit: every pass of the network, and the state but for where it is rounded.

    The pipeline rounds its state to bf16 after every step; `euler_sample` keeps it in fp32.
    """
    pipe = FluxPipeline.from_pretrained(tiny / "flux", torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    passes = []
    pipe.transformer.register_forward_hook(
        lambda module, arguments, inputs, output: passes.append((inputs["hidden_states"], output[0])),
        with_kwargs=True,
    )
    prompts = ["a handwritten digit two", "a handwritten digit six"]
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    theirs = pipe(
        prompts, num_inference_steps=num_steps, guidance_scale=2.5, height=16, width=16, max_sequence_length=8,
        latents=pack_latents(noise), output_type="latent",
    ).images  # fmt: skip
    sigmas = sigma_grid(num_steps, shift=3.0)
    torch.testing.assert_close(pipe.scheduler.sigmas, sigmas, rtol=0, atol=1e-7)
    family = open_family(str(tiny / "flux"))
    network = family.load_network(torch.bfloat16, "cpu")
    cond = TextEncoders(family, 8, torch.bfloat16, "cpu").encode(prompts, guidance=2.5)

    state = noise
    for (packed, output), (sigma, sigma_next) in zip(passes, pairwise(sigmas), strict=True):
        x, expected = unpack_latents(packed, 8, 8), unpack_latents(output, 8, 8)
        assert torch.equal(x, state)
        assert torch.equal(family.velocity(network, x, sigma.expand(2), cond), expected)
        state = euler_step(x.float(), (sigma - sigma_next) * expected, torch.ones(())).bfloat16()
    assert torch.equal(unpack_latents(theirs, 8, 8), state)

    ours = euler_sample(lambda x, sigma: family.velocity(network, x, sigma, cond), noise, sigmas)
    assert 0 < (ours - state).norm() / state.norm() < 0.01  # 0.0032 at four steps


@pytest.mark.parametrize(
    "settings",
    [
        {"shift": 1.0},  # schnell
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 0.9, "max_image_seq_len": 8192},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_the_shift_is_that_of_the_models_scheduler(tiny, tmp_path, settings):
    folder = Path(shutil.copytree(tiny / "flux", tmp_path / "flux"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe("a", num_inference_steps=4, height=16, width=16, max_sequence_length=8, output_type="latent")
    torch.testing.assert_close(sigma_grid(4, open_family(str(folder)).shift(16, 4)), pipe.scheduler.sigmas)


def test_latents_are_what_the_pipeline_decodes(tiny):
    pipe = FluxPipeline.from_pretrained(tiny / "flux")
    latents = torch.randn(2, 1, 8, 8)
    vae = Autoencoder(open_family(str(tiny / "flux")), torch.float32, "cpu")
    with torch.no_grad():
        theirs = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
        theirs = pipe.image_processor.postprocess(theirs, output_type="pt")
    torch.testing.assert_close(vae.decode(latents), theirs)


def test_shapes_of_flux_dev():
    family = open_family("black-forest-labs/FLUX.1-dev", offline=True)
    assert family.latent_shape(512, 768) == (16, 64, 96)
    with pytest.raises(UserError, match="multiples of 16; the nearest is 512 x 496"):
        family.latent_shape(512, 500)


def test_bf16_network_gets_bf16_and_gives_finite_output(tiny):
    family = open_family(str(tiny / "flux"))
    network = family.load_network(torch.bfloat16, "cpu")
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    cond = TextEncoders(family, 8, torch.bfloat16, "cpu").encode(["a handwritten digit one"], guidance=1.0)
    with torch.no_grad():
        exact = family.velocity(family.load_network(torch.float32, "cpu"), torch.ones(1, 1, 8, 8), torch.ones(1), cond)
        rounded = family.velocity(network, torch.ones(1, 1, 8, 8), torch.ones(1), cond)
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05


def test_a_model_without_a_vae_is_one_of_pixels(tmp_path):
    """Grey images come back as they went in; the network's tokens are 2 x 2 pixels."""
    write_pipeline(tmp_path / "pixels", vae_steps=None)
    family = open_family(str(tmp_path / "pixels"))
    assert family.in_pixels and family.latent_shape(8, 12) == (1, 8, 12)
    with pytest.raises(UserError, match="multiples of 2; the nearest is 8 x 8"):
        family.latent_shape(8, 7)
    images = torch.rand(2, 1, 8, 8).expand(-1, 3, -1, -1) * 2 - 1
    vae = Autoencoder(family, torch.float32, "cpu")
    assert vae.encode(images).shape == (2, 1, 8, 8)
    torch.testing.assert_close(vae.decode(vae.encode(images)), images / 2 + 0.5)
    network = family.load_network(torch.float32, "cpu")
    cond = TextEncoders(family, 8, torch.float32, "cpu").encode(["a handwritten digit one"], guidance=1.0)
    with torch.no_grad():
        assert family.velocity(network, torch.zeros(1, 1, 8, 8), torch.ones(1), cond).shape == (1, 1, 8, 8)
