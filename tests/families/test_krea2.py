"""Krea 2's classes against diffusers' own pipeline."""

import json
import math
import shutil

import pytest
import tiny_krea2
import torch
from parity import Pair, assert_rows_are_as_alone, velocity_on_meta
from torch import nn

from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.adapters import LoRAConfig
from scfm_core.models.families import open_family
from scfm_core.models.flux import pack_latents, unpack_latents
from scfm_core.models.qwen_vae import PARAMETERS
from scfm_core.models.student import LoRAModel

LENGTH = 50
PROMPTS = ["a fox", "a handwritten digit seven, in vivid ink"]  # of different lengths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "krea2"
    tiny_krea2.write(folder)
    return folder


@pytest.fixture(scope="module")
def fp32(folder):
    return Pair(folder, torch.float32, LENGTH)


def noise(rows, seed=0):
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def call(prompts, scale):
    """The pipeline's scheduler and sigmas are its own."""
    size = {"height": 16, "width": 16, "latents": pack_latents(noise(len(prompts)))}
    return {"prompt": prompts, "num_inference_steps": 4, "guidance_scale": scale, "output_type": "pt", **size}


# The pipeline keeps bf16 latents between its steps.
@pytest.mark.parametrize("scale", [0.0, 4.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_images_are_those_of_the_pipeline(folder, dtype, tolerance, scale):
    pair = Pair(folder, dtype, LENGTH)
    result, _ = pair.passes(**call(PROMPTS, scale))
    ours = pair.images(PROMPTS, noise(2), scale, 4, pair.family.shift(16, 4))
    torch.testing.assert_close(ours, result.images.float(), atol=tolerance, rtol=0)
    assert (ours[0] - ours[1]).abs().mean() > 0.01


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_each_pass_is_that_of_the_pipeline(folder, dtype, tolerance):
    """The same timesteps, and norms in fp32. The outputs differ by the rounding of attention to less padding."""
    pair = Pair(folder, dtype, LENGTH)
    _, seen = pair.passes(**call(PROMPTS, 4.5))
    cond, empty = pair.encoders.encode(PROMPTS), pair.family.unconditional.expand(2)
    assert len(seen) == 8
    told = []
    pair.network.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True)
    for number, (sigma, _, given, output) in enumerate(seen):
        x = unpack_latents(given["hidden_states"], 8, 8).float()
        with torch.no_grad():
            velocity = pair.family.predict(pair.network, x, torch.full((2,), sigma), empty if number % 2 else cond)
        torch.testing.assert_close(told[-1], given["timestep"], atol=0, rtol=0 if dtype == torch.bfloat16 else 2e-7)
        torch.testing.assert_close(velocity, unpack_latents(output, 8, 8), atol=tolerance, rtol=0)
    theirs = dict(pair.pipe.transformer.named_parameters())
    assert all(parameter.dtype == theirs[name].dtype for name, parameter in pair.network.named_parameters())


def test_text_is_that_of_the_pipeline_without_its_padding(folder, fp32):
    captions = [*PROMPTS, "long " * 20]  # the last one is truncated
    text, mask = fp32.pipe.encode_prompt(captions, max_sequence_length=LENGTH)
    cond = fp32.encoders.encode(captions)
    assert mask.shape[1] == LENGTH and not mask[0, 10:45].any() and mask[:, 45:].all()  # the padding is in the middle
    assert cond.lengths == tuple(mask.sum(1).tolist()) and fp32.family.unconditional.lengths == (5,)
    counts = fp32.encoders.token_counts(["", *captions])
    assert counts[:3] == [5, *cond.lengths[:2]] and counts[3] > LENGTH == cond.lengths[2]
    for row, theirs, real, length in zip(cond.fields["text"], text, mask, cond.lengths, strict=True):
        torch.testing.assert_close(row[:length], theirs[real])
        assert not row[length:].any()
    assert fp32.family.shapes(LENGTH)["text"] == text.shape[1:]
    longer = Pair(folder, torch.float32, LENGTH + 30).encoders.encode(captions[:1])  # more padding, the same text
    torch.testing.assert_close(
        longer.fields["text"][0], cond.fields["text"][0, : cond.lengths[0]], rtol=1e-4, atol=1e-4
    )


def test_other_captions_of_a_batch_do_not_matter(fp32):
    x = noise(3, 1)
    cond, sigma, together = assert_rows_are_as_alone(fp32, ["", PROMPTS[1], PROMPTS[0]], x, 4.5)
    cond.fields["text"][0, 5:] = 7.0  # behind the length of the empty caption
    with torch.no_grad():
        velocity = fp32.family.velocity(fp32.network, x, sigma, cond)
    torch.testing.assert_close(together[0], velocity[0], rtol=1e-4, atol=5e-5)


def test_strength_is_of_each_sample(folder, fp32):
    """Also where the first axis of a layer is samples x tokens, as in the attention over the text encoder's layers."""
    model = LoRAModel(fp32.family, fp32.family.load_network(torch.float32, "cpu"), LoRAConfig(rank=4, alpha=4.0))
    for name, factor in model.parameters("student").items():
        if ".lora_B." in name:
            nn.init.normal_(factor, std=0.1)
    cond, x, sigma = fp32.encoders.encode(PROMPTS), noise(2, 1), torch.tensor([0.7, 0.4])
    with torch.no_grad():
        both = model.velocity("student", x, sigma, cond, torch.tensor([0.0, 1.0]))
        teacher = fp32.family.predict(fp32.network, x, sigma, cond)
        student = model.velocity("student", x, sigma, cond, torch.ones(2))
    torch.testing.assert_close(both[0], teacher[0], rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(both[1], student[1], rtol=1e-4, atol=5e-5)
    assert (student - teacher).abs().max() > 0.01


def test_latents_are_normalised_per_channel(fp32):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = fp32.vae.vae
    with torch.no_grad():
        raw = vae.encode(images[:, :, None]).latent_dist.mode()
        decoded = (vae.decode(raw).sample[:, :, 0] / 2 + 0.5).clamp(0, 1)
    latents = fp32.vae.encode(images)
    for channel, (mean, std) in enumerate(zip(vae.config.latents_mean, vae.config.latents_std, strict=True)):
        torch.testing.assert_close(latents[:, channel], (raw[:, channel, 0] - mean) / std)
    torch.testing.assert_close(fp32.vae.decode(latents), decoded, rtol=1e-4, atol=1e-5)
    assert latents.shape[1:] == fp32.family.latent_shape(16, 16) == (4, 8, 8)


def test_shift_is_that_of_the_pipeline(folder, fp32, tmp_path):
    """mu is linear in the number of tokens, or fixed for a distilled model."""
    fp32.passes(**call(["a"], 0.0))
    torch.testing.assert_close(sigma_grid(4, fp32.family.shift(16, 4)), fp32.pipe.scheduler.sigmas)
    assert math.log(fp32.family.shift(6400, 4)) == pytest.approx(1.15)
    shutil.copytree(folder, tmp_path / "turbo")
    index = tmp_path / "turbo" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    assert math.log(open_family(str(tmp_path / "turbo")).shift(16, 4)) == pytest.approx(1.15)


def test_the_true_architecture():
    """Size and linears are published. A pass on the meta device needs no value of a tensor."""
    family = open_family("krea/Krea-2-Raw", offline=True)
    network = family.meta_network()
    assert sum(p.numel() for p in network.parameters()) == 12_820_073_036
    assert sum(isinstance(module, nn.Linear) for module in network.modules()) == 264
    assert len(family.blocks(network)) == 28 and family.width == 6144 and family.pixel_multiple == 16
    assert family.latent_shape(1024, 1024) == (16, 128, 128)
    assert velocity_on_meta(family, network).shape == (2, 16, 64, 64)
    with torch.device("meta"):
        assert sum(p.numel() for p in family.vae_class().parameters()) == PARAMETERS
