"""Krea 2: scfm's passes, text, latents and images against diffusers' `Krea2Pipeline`."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import tiny_krea2
import torch
from pipeline_parity import CAPTIONS, encode, images, load, recorded
from torch import nn

from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.adapters import LoRABank, LoRAConfig
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.flux import pack_latents, unpack_latents
from scfm_core.models.krea2 import Krea2

LENGTH = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("krea2")
    tiny_krea2.write(folder)
    return folder


@pytest.fixture(scope="module")
def in_fp32(folder):
    return load(Krea2, folder, torch.float32)


def sampled(pipe, captions, noise, arguments):
    """The pipeline's own images, with its own scheduler and sigmas."""
    packed = pack_latents(noise)
    return pipe(
        captions, num_inference_steps=4, height=16, width=16, latents=packed, output_type="pt", **arguments
    ).images


@pytest.mark.parametrize("scale", [0.0, 4.5])
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
    """In bf16 too: the same timesteps, and outputs that differ by the rounding of a shorter text."""
    family, network, pipe = load(Krea2, folder, dtype)
    cond = encode(family, pipe, CAPTIONS, LENGTH)
    with recorded(pipe.transformer) as passes:
        sampled(pipe, CAPTIONS, torch.randn(2, 4, 8, 8), family.call_arguments(4.5, LENGTH))
    assert len(passes) == 8
    sigmas = sigma_grid(4, family.shift(16, 4))[:-1].repeat_interleave(2)
    for number, ((given, velocity), sigma) in enumerate(zip(passes, sigmas, strict=True)):
        x = unpack_latents(given["hidden_states"], 8, 8).float()
        with torch.no_grad(), recorded(network) as ours:
            predicted = family.predict(
                network, x, sigma.expand(2), family.unconditional.expand(2) if number % 2 else cond
            )
        rounding = 2e-7 if dtype == torch.float32 else 0
        torch.testing.assert_close(ours[0][0]["timestep"], given["timestep"], atol=0, rtol=rounding)
        expected = unpack_latents(velocity, 8, 8)
        torch.testing.assert_close(predicted, expected, atol=5e-5 if dtype == torch.float32 else 0.03, rtol=0)


def test_text_is_that_of_diffusers_without_its_padding(in_fp32):
    family, _, pipe = in_fp32
    captions = [*CAPTIONS, "long " * 20]  # the last one is truncated
    text, mask = pipe.encode_prompt(captions, max_sequence_length=LENGTH)
    cond = encode(family, pipe, captions, LENGTH)
    assert mask.shape[1] == LENGTH and not mask[0, 10:45].any() and mask[:, 45:].all()  # the padding is in the middle
    assert cond.lengths == tuple(mask.sum(1).tolist()) and family.unconditional.lengths == (5,)
    assert family.count_tokens(pipe.tokenizer, ["", *captions])[:3] == [5, *cond.lengths[:2]]
    assert family.count_tokens(pipe.tokenizer, captions)[2] > LENGTH == cond.lengths[2]
    for row, theirs, real, length in zip(cond.fields["text"], text, mask, cond.lengths, strict=True):
        torch.testing.assert_close(row[:length], theirs[real])
        assert not row[length:].any()
    assert family.shapes(LENGTH)["text"] == text.shape[1:]
    again = encode(family, pipe, captions[:1], LENGTH + 30)  # more padding, the same text
    torch.testing.assert_close(again.fields["text"][0], cond.fields["text"][0, : cond.lengths[0]], atol=1e-5, rtol=1e-5)


def test_a_sample_does_not_depend_on_its_batch(in_fp32):
    family, network, pipe = in_fp32
    captions = ["", CAPTIONS[1], CAPTIONS[0]]
    cond = encode(family, pipe, captions, LENGTH, 4.5)
    x, sigma = torch.randn(3, 4, 8, 8), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        together = family.velocity(network, x, sigma, cond)
        for i, caption in enumerate(captions):
            alone = encode(family, pipe, [caption], LENGTH, 4.5)
            row = slice(i, i + 1)
            torch.testing.assert_close(
                family.velocity(network, x[row], sigma[row], alone), together[row], atol=2e-5, rtol=0
            )
    longer = dataclasses.replace(cond, fields={"text": cond.fields["text"].clone()})
    longer.fields["text"][0, 5:] = 7.0  # behind the length of the empty caption
    with torch.no_grad():
        torch.testing.assert_close(family.velocity(network, x, sigma, longer)[0], together[0], atol=2e-5, rtol=0)


def test_latents_are_normalised_as_in_diffusers(in_fp32):
    family, _, pipe = in_fp32
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = family.encode_images(pipe.vae, pictures)
        encoded = pipe.vae.encode(pictures[:, :, None]).latent_dist.mode()
        for channel, (mean, std) in enumerate(
            zip(pipe.vae.config.latents_mean, pipe.vae.config.latents_std, strict=True)
        ):
            torch.testing.assert_close(latents[:, channel], (encoded[:, channel, 0] - mean) / std)
        decoded = pipe.vae.decode(encoded).sample[:, :, 0]
        torch.testing.assert_close(family.decode_latents(pipe.vae, latents), decoded, atol=1e-5, rtol=1e-5)
    assert latents.shape[1:] == family.latent_shape(16, 16) == (4, 8, 8)


def test_shift_is_that_of_the_pipeline(folder, in_fp32, tmp_path):
    """mu is linear in the number of tokens, or fixed for a distilled model."""
    family, _, pipe = in_fp32
    sampled(pipe, ["a"], torch.randn(1, 4, 8, 8), family.call_arguments(0.0, LENGTH))
    torch.testing.assert_close(sigma_grid(4, family.shift(16, 4)), pipe.scheduler.sigmas)
    assert math.log(family.shift(6400, 4)) == pytest.approx(1.15)
    turbo = tmp_path / "turbo"
    shutil.copytree(folder, turbo)
    index = json.loads((turbo / "model_index.json").read_text())
    (turbo / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    assert math.log(Krea2(turbo).shift(16, 4)) == pytest.approx(1.15)


def test_true_sizes():
    ((name, architecture),) = Krea2.known.items()
    family = Krea2(Path(name), architecture)
    network = family.meta_network()
    assert sum(p.numel() for p in network.parameters()) == 12_820_073_036
    assert sum(isinstance(module, nn.Linear) for module in network.modules()) == 264
    assert len(family.blocks(network)) == 28 and family.width == 6144 and family.pixel_multiple == 16
    with torch.device("meta"):
        assert sum(p.numel() for p in family.vae_class().parameters()) == 126_892_531
    x = torch.empty(1, *family.latent_shape(1024, 1024), device="meta")
    assert x.shape == (1, 16, 128, 128) and family.image_tokens(x) == 4096
    text = torch.empty(1, *family.shapes(512)["text"], device="meta")
    cond = Conditioning(fields={"text": text}, lengths=(512,))
    assert family.predict(network, x, torch.empty(1, device="meta"), cond).shape == x.shape


def test_adapters_of_all_linears_have_the_strength_of_their_sample(folder, in_fp32):
    """Also where the first axis of a layer is samples x tokens, as in the attention over the text encoder's layers."""
    family, _, pipe = in_fp32
    bank = LoRABank(network := family.load_network(torch.float32, "cpu"), LoRAConfig(rank=4, alpha=4.0))
    for layer in bank.layers.values():
        nn.init.normal_(layer.factors("student")[1], std=0.1)
    cond = encode(family, pipe, CAPTIONS, LENGTH)
    x, sigma, strength = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.5]), torch.tensor([0.3, 1.0])
    with torch.no_grad():
        bank.select("student", strength)
        together = family.predict(network, x, sigma, cond)
        for row in (slice(0, 1), slice(1, 2)):
            bank.select("student", strength[row])
            alone = family.predict(network, x[row], sigma[row], cond[row])
            torch.testing.assert_close(alone, together[row], atol=1e-5, rtol=0)
        bank.select("student", torch.ones(2))
        assert (family.predict(network, x, sigma, cond)[0] - together[0]).abs().max() > 1e-2
