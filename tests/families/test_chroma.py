"""Chroma: scfm's passes, text, latents and images against diffusers' `ChromaPipeline`."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_chroma
import torch
from parity import Pair, velocity_on_meta
from torch import nn

from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.chroma import Chroma
from scfm_core.models.flux import pack_latents, unpack_latents
from scfm_core.models.initial import zero_modulation

LENGTH = 12
CAPTIONS = ["a fox", "a handwritten digit seven, in vivid ink"]  # of different lengths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chroma")
    tiny_chroma.write(folder)
    return folder


@pytest.fixture(scope="module")
def in_fp32(folder):
    return Pair(folder, torch.float32, LENGTH)


def call(pair, captions, noise, scale):
    """With the pipeline's own scheduler and sigmas."""
    size = {"height": 16, "width": 16, "latents": pack_latents(noise), "output_type": "pt"}
    arguments = pair.family.call_arguments(scale, LENGTH)
    return {"prompt": captions, "num_inference_steps": 4, **size, "guidance_scale": arguments["guidance_scale"]}


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_images_are_those_of_diffusers(in_fp32, scale):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ours = in_fp32.images(CAPTIONS, noise, scale, 4, in_fp32.family.shift(16, 4))
    theirs, _ = in_fp32.passes(**call(in_fp32, CAPTIONS, noise, scale))
    torch.testing.assert_close(ours, theirs.images.float(), atol=1e-4, rtol=0)
    assert (ours[0] - ours[1]).abs().mean() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pass_is_that_of_diffusers(folder, dtype):
    """In bf16 to the bit: the same timesteps, the same mask, the same padding."""
    pair = Pair(folder, dtype, LENGTH)
    conds = [pair.encoders.encode(captions) for captions in (CAPTIONS, [""] * 2)]
    _, passes = pair.passes(**call(pair, CAPTIONS, torch.randn(2, 4, 8, 8), 3.0))
    assert len(passes) == 8
    told = []
    pair.network.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs), with_kwargs=True)
    for number, (sigma, _, given, velocity) in enumerate(passes):
        x = unpack_latents(given["hidden_states"], 8, 8).float()
        with torch.no_grad():
            predicted = pair.family.predict(pair.network, x, torch.full((2,), sigma), conds[number % 2])
        assert torch.equal(told[-1]["attention_mask"], given["attention_mask"])
        rounding, atol = (2e-7, 1e-5) if dtype == torch.float32 else (0, 0)
        torch.testing.assert_close(told[-1]["timestep"], given["timestep"], atol=0, rtol=rounding)
        torch.testing.assert_close(pack_latents(predicted), velocity, atol=atol, rtol=0)


def test_text_is_that_of_diffusers(in_fp32):
    """One padding token is seen, the others have less weight but count; a truncated caption has none."""
    family, network, pipe = in_fp32.family, in_fp32.network, in_fp32.pipe
    captions = [*CAPTIONS, "", "digit " * 20]  # the last one is truncated
    cond = in_fp32.encoders.encode(captions)
    _, passes = in_fp32.passes(**call(in_fp32, captions, torch.randn(4, 4, 8, 8), 1.0))
    given = passes[0][2]
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
    family, pipe = in_fp32.family, in_fp32.pipe
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
    pair = Pair(copy, torch.float32, LENGTH)
    pair.passes(**call(pair, ["a"], torch.randn(1, 4, 8, 8), 1.0))
    torch.testing.assert_close(sigma_grid(4, pair.family.shift(16, 4)), pair.pipe.scheduler.sigmas)


def test_its_attention_takes_a_mask(folder):
    """Though its text is stored as tokens. So no backend is chosen or measured that takes none."""
    family = Chroma(folder)
    assert family.masks_attention and family.fields["text"] == "tokens"


def test_the_network_that_makes_the_modulation_starts_at_zero(folder):
    network = Chroma(folder).load_network(torch.float32, "cpu")
    zero_modulation(network)
    zero = {name for name, m in network.named_modules() if isinstance(m, nn.Linear) and not m.weight.any()}
    assert zero == {"proj_out", "distilled_guidance_layer.out_proj"}


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
