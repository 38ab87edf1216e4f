"""Sana: scfm's passes, text, latents and images against diffusers' `SanaPipeline`."""

import dataclasses
from pathlib import Path

import pytest
import tiny_sana
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pipeline_parity import CAPTIONS, encode, images, load, recorded
from torch import nn

from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.sana import Sana

LENGTH = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sana")
    tiny_sana.write(folder)
    return folder


@pytest.fixture(scope="module")
def in_fp32(folder):
    return load(Sana, folder, torch.float32)


def sampled(pipe, captions, noise, arguments):
    """The pipeline's own images, as the card of an adapter calls it."""
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
    even = [1 - k / 4 for k in range(4)]
    return pipe(
        captions, num_inference_steps=4, sigmas=even, height=32, width=32, latents=noise, output_type="pt", **arguments
    ).images  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_images_are_those_of_diffusers(in_fp32, scale):
    family, network, pipe = in_fp32
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = encode(family, pipe, CAPTIONS, LENGTH, scale)
    ours = images(family, network, pipe.vae, noise, cond, family.shift(64, 4))
    theirs = sampled(pipe, CAPTIONS, noise, family.call_arguments(scale, LENGTH))
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=0)
    assert (ours[0] - ours[1]).abs().mean() > 1e-3  # captions matter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pass_is_that_of_diffusers(folder, dtype):
    """In bf16 too: the same timesteps, and outputs that differ by the rounding of a shorter text."""
    family, network, pipe = load(Sana, folder, dtype)
    cond = encode(family, pipe, CAPTIONS, LENGTH)
    with recorded(pipe.transformer) as passes:
        sampled(pipe, CAPTIONS, torch.randn(2, 4, 8, 8), family.call_arguments(4.5, LENGTH))
    sigmas = sigma_grid(4, family.shift(64, 4))
    assert len(passes) == 4
    for (given, velocity), sigma in zip(passes, sigmas[:-1], strict=True):
        both = Conditioning.cat([family.unconditional.expand(2), cond])
        with torch.no_grad(), recorded(network) as ours:
            predicted = family.predict(network, given["hidden_states"].float(), sigma.expand(4), both)
        torch.testing.assert_close(ours[0][0]["timestep"], given["timestep"], atol=0, rtol=2e-7)  # fp32, also here
        torch.testing.assert_close(predicted, velocity, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0)


def test_text_is_that_of_diffusers(in_fp32):
    """The instruction before a caption, none before the negative prompt, lower case, truncation."""
    family, _, pipe = in_fp32
    captions = [*CAPTIONS, " ".join(["long"] * 20)]  # the last one is truncated
    with recorded(pipe.transformer) as passes:
        sampled(pipe, captions, torch.randn(3, 4, 8, 8), family.call_arguments(4.5, LENGTH))
    text, mask = passes[0][0]["encoder_hidden_states"], passes[0][0]["encoder_attention_mask"]
    cond = encode(family, pipe, captions, LENGTH)
    assert family.unconditional.lengths * 3 + cond.lengths == tuple(mask.sum(1).tolist())
    assert family.count_tokens(pipe.tokenizer, ["", *captions])[:3] == [1, *cond.lengths[:2]]
    assert family.count_tokens(pipe.tokenizer, captions)[2] > LENGTH == cond.lengths[2]
    for row, theirs, length in zip(cond.fields["text"], text[3:], cond.lengths, strict=True):
        torch.testing.assert_close(row[:length], theirs[:length])
        assert not row[length:].any()
    torch.testing.assert_close(family.unconditional.fields["text"][0], text[0, :1])
    assert family.shapes(LENGTH)["text"] == text.shape[1:]


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
    longer.fields["text"][0, 1:] = 7.0  # behind the length of the empty caption
    with torch.no_grad():
        torch.testing.assert_close(family.velocity(network, x, sigma, longer)[0], together[0], atol=2e-5, rtol=0)


def test_latents_are_normalised_as_in_diffusers(in_fp32):
    family, _, pipe = in_fp32
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = family.encode_images(pipe.vae, pictures)
        encoded = pipe.vae.encode(pictures).latent
        torch.testing.assert_close(latents, encoded * pipe.vae.config.scaling_factor)
        torch.testing.assert_close(family.decode_latents(pipe.vae, latents), pipe.vae.decode(encoded).sample)
    assert latents.shape[1:] == family.latent_shape(32, 32) == (4, 8, 8)


@pytest.mark.parametrize("name", Sana.known)
def test_true_sizes(name):
    family = Sana(Path(name), Sana.known[name])
    network = family.meta_network()
    size = 512 if "512" in name else 1024
    assert 1.604e9 < sum(p.numel() for p in network.parameters()) < 1.605e9
    assert sum(isinstance(module, nn.Linear) for module in network.modules()) == 166
    assert len(family.blocks(network)) == 20
    shape = family.latent_shape(size, size)
    x = torch.empty(1, *shape, device="meta")
    assert shape == (32, size // 32, size // 32) and family.image_tokens(x) == (size // 32) ** 2
    text = torch.empty(1, *family.shapes(300)["text"], device="meta")
    cond = Conditioning(fields={"text": text}, lengths=(300,))
    assert family.predict(network, x, torch.empty(1, device="meta"), cond).shape == x.shape
