"""Chroma: scfm's passes, text, latents and images against diffusers' `ChromaPipeline`."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_chroma
import torch
from parity import velocity_on_meta
from pipeline_parity import CAPTIONS, encode, images, load, recorded
from torch import nn

from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.adapters import LoRABank, LoRAConfig, is_for_fp8
from scfm_core.models.chroma import Chroma
from scfm_core.models.flux import pack_latents, unpack_latents
from scfm_core.models.initial import zero_modulation

LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chroma")
    tiny_chroma.write(folder)
    return folder


@pytest.fixture(scope="module")
def in_fp32(folder):
    return load(Chroma, folder, torch.float32)


def sampled(pipe, captions, noise, arguments):
    """The pipeline's own images, with its own scheduler and sigmas."""
    packed = pack_latents(noise)
    return pipe(
        captions, num_inference_steps=4, height=16, width=16, latents=packed, output_type="pt", **arguments
    ).images


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_images_are_those_of_diffusers(in_fp32, scale):
    family, network, pipe = in_fp32
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = encode(family, pipe, CAPTIONS, LENGTH, scale)
    ours = images(family, network, pipe.vae, noise, cond, family.shift(16, 4))
    theirs = sampled(pipe, CAPTIONS, noise, family.call_arguments(scale, LENGTH))
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=0)
    assert (ours[0] - ours[1]).abs().mean() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pass_is_that_of_diffusers(folder, dtype):
    """In bf16 to the bit: the same timesteps, the same mask, the same padding."""
    family, network, pipe = load(Chroma, folder, dtype)
    conds = [encode(family, pipe, captions, LENGTH) for captions in (CAPTIONS, [""] * 2)]
    with recorded(pipe.transformer) as passes:
        sampled(pipe, CAPTIONS, torch.randn(2, 4, 8, 8), family.call_arguments(3.0, LENGTH))
    assert len(passes) == 8
    sigmas = sigma_grid(4, family.shift(16, 4))[:-1].repeat_interleave(2)
    for number, ((given, velocity), sigma) in enumerate(zip(passes, sigmas, strict=True)):
        x = unpack_latents(given["hidden_states"], 8, 8).float()
        with torch.no_grad(), recorded(network) as ours:
            predicted = family.predict(network, x, sigma.expand(2), conds[number % 2])
        assert torch.equal(ours[0][0]["attention_mask"], given["attention_mask"])
        rounding, atol = (2e-7, 1e-5) if dtype == torch.float32 else (0, 0)
        torch.testing.assert_close(ours[0][0]["timestep"], given["timestep"], atol=0, rtol=rounding)
        torch.testing.assert_close(pack_latents(predicted), velocity, atol=atol, rtol=0)


def test_text_is_that_of_diffusers(in_fp32):
    """One padding token is seen, the others have less weight but count; a truncated caption has none."""
    family, network, pipe = in_fp32
    captions = [*CAPTIONS, "", "digit " * 20]  # the last one is truncated
    cond = encode(family, pipe, captions, LENGTH)
    with recorded(pipe.transformer) as passes:
        sampled(pipe, captions, torch.randn(4, 4, 8, 8), family.call_arguments(1.0, LENGTH))
    given = passes[0][0]
    assert torch.equal(cond.fields["text"], given["encoder_hidden_states"])
    assert torch.equal(cond.fields["seen"], given["attention_mask"][:, :LENGTH])
    counts = family.count_tokens(pipe.tokenizer, captions)
    assert counts[0] == 3 and counts[2:] == [1, 21]  # words, and the end token
    assert cond.fields["seen"].sum(1).tolist() == [min(count + 1, LENGTH) for count in counts]
    assert {name: tuple(tensor.shape[1:]) for name, tensor in cond.fields.items()} == family.shapes(LENGTH)
    x, sigma = torch.randn(4, 4, 8, 8), torch.full((4,), 0.5)
    with torch.no_grad():
        before = family.predict(network, x, sigma, cond)
        cond.fields["text"][0, LENGTH - 1] += 3.0
        changed = (family.predict(network, x, sigma, cond) - before).abs().amax((1, 2, 3))
    assert changed[0] > 1e-4 and not changed[1:].any()


def test_latents_are_normalised_as_in_diffusers(in_fp32):
    family, _, pipe = in_fp32
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = family.encode_images(pipe.vae, pictures)
        encoded = pipe.vae.encode(pictures).latent_dist.mode()
        torch.testing.assert_close(latents, (encoded - 0.1) * 0.6)
        decoded = pipe.vae.decode(encoded).sample
        torch.testing.assert_close(family.decode_latents(pipe.vae, latents), decoded, atol=1e-5, rtol=1e-5)
    assert latents.shape[1:] == family.latent_shape(16, 16) == (4, 8, 8)


@pytest.mark.parametrize("settings", [{"use_dynamic_shifting": True}, {"shift": 1.0}])
def test_shift_is_that_of_the_scheduler(folder, tmp_path, settings):
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    family, _, pipe = load(Chroma, copy, torch.float32)
    sampled(pipe, ["a"], torch.randn(1, 4, 8, 8), family.call_arguments(1.0, LENGTH))
    torch.testing.assert_close(sigma_grid(4, family.shift(16, 4)), pipe.scheduler.sigmas)


def test_the_network_that_makes_the_modulation_starts_at_zero_and_stays_out_of_fp8(folder):
    family = Chroma(folder)
    network = family.load_network(torch.float32, "cpu")
    zero_modulation(network)
    makers = {"proj_out", "distilled_guidance_layer.out_proj"}
    zero = {name for name, m in network.named_modules() if isinstance(m, nn.Linear) and not m.weight.any()}
    assert zero == makers
    true = Chroma(Path("lodestones/Chroma1-HD"), Chroma.known["lodestones/Chroma1-HD"]).meta_network()
    bank = LoRABank(true, LoRAConfig())
    in_fp8 = {name for name, layer in bank.layers.items() if is_for_fp8(name, layer)}
    assert "context_embedder" in in_fp8 and not any(name.startswith("distilled_guidance_layer") for name in in_fp8)


def test_true_sizes():
    ((name, architecture),) = Chroma.known.items()
    family = Chroma(Path(name), architecture)
    network = family.meta_network()
    assert sum(p.numel() for p in network.parameters()) == 8_899_983_424
    assert sum(isinstance(module, nn.Linear) for module in network.modules()) == 433
    assert len(family.blocks(network)) == 19 + 38 and family.width == 3072 and family.pixel_multiple == 16
    assert family.latent_shape(1024, 1024) == (16, 128, 128) and family.shift(4096, 4) == 3.0
    assert family.image_tokens(torch.empty(1, 16, 128, 128, device="meta")) == 4096
    assert velocity_on_meta(family, network).shape == (2, 16, 64, 64)
