"""Qwen-Image's classes against diffusers' own pipeline."""

import functools
import math

import pytest
import tiny_qwen_image
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from parity import Pair, assert_rows_are_as_alone, velocity_on_meta

from scfm_core.models.families import open_family
from scfm_core.models.flux import pack_latents
from scfm_core.models.initial import is_modulation

PROMPTS = ["a handwritten digit three", "a fox"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "qwen_image"
    tiny_qwen_image.write(folder)
    return folder


@pytest.fixture(scope="module")
def fp32(folder):
    return Pair(folder, torch.float32, 16)


def plain_scheduler(pipe):
    """As the docstring of `QwenImage` says."""
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift_terminal=None)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_images_are_those_of_the_pipeline(folder, dtype, tolerance):
    """In bf16 the pipeline's latents are bf16 too."""
    pair, noise = Pair(folder, dtype, 16), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain_scheduler(pair.pipe)
    theirs = [
        pair.pipe(
            prompt, **pair.family.call_arguments(4.0, 16), num_inference_steps=4, sigmas=[1, 0.75, 0.5, 0.25], height=16, width=16,
            latents=pack_latents(one[None]), output_type="pt",
        ).images[0]
        for prompt, one in zip(PROMPTS, noise, strict=True)
    ]  # fmt: skip
    ours = pair.images(PROMPTS, noise, 4.0, 4, pair.family.shift(16, 4))
    torch.testing.assert_close(torch.stack(theirs).float(), ours, rtol=0, atol=tolerance)
    assert (ours[0] - ours[1]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_pass_is_that_of_the_pipeline(folder, dtype):
    """To the bit, in bf16 too: the timestep is rounded as there. 7 steps, with captions of two lengths."""
    pair = Pair(folder, dtype, 16)
    plain_scheduler(pair.pipe)
    call = {"prompt": PROMPTS, "negative_prompt": [" "] * 2, "num_inference_steps": 7, "height": 16, "width": 16}
    _, seen = pair.passes(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert len(seen) == 14
    conds = [pair.encoders.encode(PROMPTS), pair.encoders.encode([" "] * 2)]
    assert len(set(conds[0].lengths)) == 2
    for number, (sigma, _, given, output) in enumerate(seen):
        cond, packed = conds[number % 2], given["hidden_states"]
        x = packed.view(2, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 8)
        with torch.no_grad():
            velocity = pair.family.predict(pair.network, x.float(), torch.full((2,), sigma), cond)
        assert torch.equal(pack_latents(velocity), output), number


def test_text_is_that_of_the_pipeline(fp32):
    captions = [*PROMPTS, "", "a handwritten digit eight " * 4]
    cond = fp32.encoders.encode(captions)
    text, mask = fp32.pipe.encode_prompt(captions, max_sequence_length=16)
    assert torch.equal(cond.fields["text"], text) and torch.equal(cond.mask, mask.bool())
    counts = fp32.encoders.token_counts(captions)
    assert counts[:1] == [4 + 5] and counts[3] > 16  # words, and the template's end
    assert cond.lengths == tuple(min(count, 16) for count in counts)
    alone = fp32.encoders.encode(captions[1:2])
    torch.testing.assert_close(alone.fields["text"], cond[1:2].fields["text"])
    assert alone.lengths == cond[1:2].lengths


def test_other_captions_of_a_batch_do_not_matter(fp32):
    assert_rows_are_as_alone(fp32, [*PROMPTS, " "], torch.randn(3, 4, 8, 8), 4.0)


def test_guidance_keeps_the_norm_of_each_token(fp32):
    cond, uncond = torch.randn(2, 2, 4, 8, 8)
    scale = torch.tensor([1.0, 4.0]).view(2, 1, 1, 1)
    guided = fp32.family.guide(cond, uncond, scale)
    torch.testing.assert_close(pack_latents(guided).norm(dim=-1), pack_latents(cond).norm(dim=-1))
    torch.testing.assert_close(guided[0], cond[0])
    plain = pack_latents(uncond + scale * (cond - uncond))
    torch.testing.assert_close(torch.cosine_similarity(pack_latents(guided), plain, dim=-1), torch.ones(2, 16))
    assert not fp32.family.guide(torch.zeros_like(cond), torch.zeros_like(cond), scale).any()


def test_a_new_network_learns_under_guidance(fp32):
    """Its velocity is zero, where a ratio of norms has no slope."""
    network = fp32.family.load_network(torch.float32, "cpu")
    for parameter in network.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    cond, x = fp32.encoders.encode(PROMPTS, 4.0), torch.randn(2, 4, 8, 8)
    (fp32.family.velocity(network, x, torch.tensor([0.9, 0.5]), cond) - x).square().mean().backward()
    assert network.proj_out.weight.grad.abs().max() > 1e-3


def test_a_pass_in_inference_mode_does_not_spoil_the_next_one(fp32):
    """diffusers caches a copy of a table for each device. On a CPU it is the table itself; here it is a copy, as on a GPU."""
    network = fp32.family.load_network(torch.float32, "cpu")
    table = network.pos_embed
    table._get_device_freqs = functools.cache(lambda device: (table.pos_freqs.clone(), table.neg_freqs.clone()))
    cond, x, sigma = fp32.encoders.encode(PROMPTS), torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.5])
    with torch.inference_mode():
        before = fp32.family.predict(network, x, sigma, cond).clone()
    after = fp32.family.predict(network, x, sigma, cond)
    after.sum().backward()
    assert torch.equal(before, after) and network.proj_out.weight.grad is not None


def test_latents_are_normalised_per_channel(fp32):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    vae = fp32.vae.vae
    with torch.no_grad():
        raw = vae.encode(images[:, :, None]).latent_dist.mode()
        decoded = vae.decode(raw).sample[:, :, 0] / 2 + 0.5
    latents = fp32.vae.encode(images)
    for channel, (mean, std) in enumerate(zip(vae.config.latents_mean, vae.config.latents_std, strict=True)):
        torch.testing.assert_close(latents[:, channel], (raw[:, channel, 0] - mean) / std)
    assert latents.shape == (2, *fp32.family.latent_shape(16, 16))
    torch.testing.assert_close(fp32.vae.decode(latents), decoded)


def test_the_true_architecture():
    """Size and linears are published. A pass on the meta device needs no value of a tensor."""
    family = open_family("Qwen/Qwen-Image", offline=True)
    network = family.meta_network()
    assert sum(p.numel() for p in network.parameters()) == 20_430_401_088
    assert sum(isinstance(module, torch.nn.Linear) for module in network.modules()) == 846
    assert len(family.blocks(network)) == 60 and family.width == 3072
    modulations = [name for name, module in network.named_modules() if is_modulation(name, module)]
    assert len(modulations) == 2 * 60 + 2  # of image and text in each block, norm_out, proj_out
    assert family.latent_shape(1328, 1328) == (16, 166, 166)
    assert velocity_on_meta(family, network).shape == (2, 16, 64, 64)
    assert family.shift(4096, 50) == pytest.approx(math.exp(0.5 + 0.4 * (4096 - 256) / (8192 - 256)))
