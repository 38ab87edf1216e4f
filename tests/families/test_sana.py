"""Sana's classes against diffusers' own pipeline."""

import pytest
import tiny_sana
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from parity import Pair, assert_rows_are_as_alone, velocity_on_meta
from torch import nn

from scfm_core.models.conditioning import Conditioning
from scfm_core.models.families import open_family
from scfm_core.models.sana import Sana

LENGTH = 40
PROMPTS = [
    "a fox",
    "a handwritten digit seven, in Vivid ink",
]  # of different lengths; one with a capital, which the pipeline makes small
TOLERANCES = [(torch.float32, 1e-4), (torch.bfloat16, 0.03)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "sana"
    tiny_sana.write(folder)
    return folder


@pytest.fixture(scope="module")
def fp32(folder):
    return Pair(folder, torch.float32, LENGTH)


def noise(rows, seed=0):
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def call(pair, prompts, scale):
    """The arguments that the card of an adapter gives, with Euler's method as its scheduler."""
    pair.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
    arguments = pair.family.call_arguments(scale, LENGTH)
    assert arguments.pop("max_sequence_length") == LENGTH  # `Pair.passes` adds it
    even = {"num_inference_steps": 4, "sigmas": [1, 0.75, 0.5, 0.25]}
    return {
        "prompt": prompts,
        "height": 32,
        "width": 32,
        "latents": noise(len(prompts)),
        "output_type": "pt",
        **even,
        **arguments,
    }


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_images_are_those_of_the_pipeline(folder, dtype, tolerance, scale):
    pair = Pair(folder, dtype, LENGTH)
    result, _ = pair.passes(**call(pair, PROMPTS, scale))
    ours = pair.images(PROMPTS, noise(2), scale, 4, pair.family.shift(64, 4))
    torch.testing.assert_close(ours, result.images.float(), atol=tolerance, rtol=0)
    assert (ours[0] - ours[1]).abs().mean() > 0.01


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_each_pass_is_that_of_the_pipeline(folder, dtype, tolerance):
    """The timestep is fp32 for a bf16 network, too. The outputs differ by the rounding of attention to less padding."""
    pair = Pair(folder, dtype, LENGTH)
    _, seen = pair.passes(**call(pair, PROMPTS, 4.5))
    both = Conditioning.cat([pair.family.unconditional.expand(2), pair.encoders.encode(PROMPTS)])
    assert len(seen) == 4
    told = []
    pair.network.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True)
    for sigma, (latents,), given, output in seen:
        with torch.no_grad():
            velocity = pair.family.predict(pair.network, latents.float(), torch.full((4,), sigma), both)
        assert torch.equal(told[-1], given["timestep"]) and told[-1].dtype == torch.float32
        torch.testing.assert_close(velocity, output, atol=tolerance, rtol=0)


def test_text_is_that_of_the_pipeline(fp32):
    """The instruction before a caption, none before the negative prompt, small letters, truncation."""
    captions = [*PROMPTS, "long " * 20]  # the last one is truncated
    _, seen = fp32.passes(**call(fp32, captions, 4.5))
    text, mask = seen[0][2]["encoder_hidden_states"], seen[0][2]["encoder_attention_mask"]
    cond, empty = fp32.encoders.encode(captions), fp32.family.unconditional
    assert empty.lengths * 3 + cond.lengths == tuple(mask.sum(1).tolist())
    counts = fp32.encoders.token_counts(["", *captions])
    assert counts[:3] == [1, *cond.lengths[:2]] and counts[3] > LENGTH == cond.lengths[2]
    for row, theirs, length in zip(cond.fields["text"], text[3:], cond.lengths, strict=True):
        torch.testing.assert_close(row[:length], theirs[:length])
        assert not row[length:].any()
    torch.testing.assert_close(empty.fields["text"][0], text[0, :1])
    assert fp32.family.shapes(LENGTH)["text"] == text.shape[1:]


def test_other_captions_of_a_batch_do_not_matter(fp32):
    x = noise(3, 1)
    cond, sigma, together = assert_rows_are_as_alone(fp32, ["", PROMPTS[1], PROMPTS[0]], x, 4.5)
    cond.fields["text"][0, 1:] = 7.0  # behind the length of the empty caption
    with torch.no_grad():
        velocity = fp32.family.velocity(fp32.network, x, sigma, cond)
    torch.testing.assert_close(together[0], velocity[0], rtol=1e-4, atol=5e-5)


def test_latents_are_scaled(fp32):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = fp32.vae.vae.encode(images).latent
        decoded = (fp32.vae.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    latents = fp32.vae.encode(images)
    torch.testing.assert_close(latents, raw * 0.41407)
    torch.testing.assert_close(fp32.vae.decode(latents), decoded)
    assert latents.shape[1:] == fp32.family.latent_shape(32, 32) == (4, 8, 8)


@pytest.mark.parametrize("name", Sana.known)
def test_the_true_architecture(name):
    """The normalised queries and keys of 1.5 have weights. A pass on the meta device needs no value of a tensor."""
    family = open_family(name, offline=True)
    network = family.meta_network()
    assert sum(p.numel() for p in network.parameters()) == (1_604_641_952 if "1.5" in name else 1_604_462_752)
    assert sum(isinstance(module, nn.Linear) for module in network.modules()) == 166
    assert len(family.blocks(network)) == 20 and family.width == 2240 and family.pixel_multiple == 32
    assert family.latent_shape(1024, 1024) == (32, 32, 32)
    assert velocity_on_meta(family, network).shape == (2, 32, 16, 16)
