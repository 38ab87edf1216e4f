"""Z-Image's classes against diffusers' own pipeline."""

import pytest
import tiny_z_image
import torch
from parity import Pair, assert_rows_are_as_alone, velocity_on_meta

from scfm_core.models.adapters import LoRAConfig
from scfm_core.models.families import open_family
from scfm_core.models.student import LoRAModel

# Padded to 32 and to 64 tokens. The pipeline writes into the list that it gets.
PROMPTS = ("a handwritten digit three", "a fox that waits in the long yellow grass")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "z_image"
    tiny_z_image.write(folder)
    return folder


@pytest.fixture(scope="module")
def fp32(folder):
    return Pair(folder, torch.float32, 64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.01)])
def test_images_are_those_of_the_pipeline(folder, dtype, tolerance):
    pair, noise = Pair(folder, dtype, 64), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pair.pipe(
        list(PROMPTS), **pair.family.call_arguments(5.0, 64), num_inference_steps=4, sigmas=[1, 0.75, 0.5, 0.25], height=16, width=16,
        latents=noise, output_type="pt",
    ).images  # fmt: skip
    ours = pair.images(PROMPTS, noise, 5.0, 4, pair.family.shift(16, 4))
    torch.testing.assert_close(theirs.float(), ours, rtol=0, atol=tolerance)
    assert (ours[0] - ours[1]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [16, 32], ids=["padded image", "whole image"])
def test_each_pass_is_that_of_the_pipeline(folder, dtype, side):
    """To the bit. Images of 16 tokens are padded to 32, those of 64 are not."""
    pair = Pair(folder, dtype, 64)
    call = {"prompt": list(PROMPTS), "num_inference_steps": 7, "height": side, "width": side, "output_type": "latent"}
    _, seen = pair.passes(**call, generator=torch.Generator().manual_seed(0))
    assert len(seen) == 7
    cond = pair.encoders.encode([*PROMPTS, "", ""])
    assert cond.lengths[0] <= 32 < cond.lengths[1]
    for sigma, (latents, _, _), _, output in seen:
        x = torch.stack(latents)[:, :, 0].float()
        with torch.no_grad():
            velocity = pair.family.predict(pair.network, x, torch.full((4,), sigma), cond)
        assert torch.equal(-velocity, torch.stack(output)[:, :, 0]), sigma


def test_text_is_that_of_the_pipeline(fp32):
    captions = [*PROMPTS, "", "a handwritten digit eight " * 20]
    cond = fp32.encoders.encode(captions)
    rows, _ = fp32.pipe.encode_prompt(list(captions), do_classifier_free_guidance=False, max_sequence_length=64)
    for row, text in enumerate(rows):
        assert cond.lengths[row] == len(text) and torch.equal(cond.fields["text"][row, : len(text)], text)
    counts = fp32.encoders.token_counts(captions)
    assert counts[0] == 4 + 8 and counts[3] > 64  # words, and the chat's template
    assert cond.lengths == tuple(min(count, 64) for count in counts)


def test_other_captions_of_a_batch_do_not_matter(fp32):
    assert_rows_are_as_alone(fp32, [*PROMPTS, ""], torch.randn(3, 4, 8, 8), 4.0)


def test_strength_is_of_each_sample(folder):
    """diffusers' own forward joins the tokens of all samples before the embedders, which are adapted too."""
    family = open_family(str(folder))
    model = LoRAModel(family, family.load_network(torch.float32, "cpu"), LoRAConfig(rank=4, alpha=4))
    for name, factor in model.parameters("student").items():
        if ".lora_B." in name:
            torch.nn.init.normal_(factor, std=0.1)
    pair = Pair(folder, torch.float32, 64)
    cond, x, sigma = pair.encoders.encode(PROMPTS), torch.randn(2, 4, 8, 8), torch.tensor([0.7, 0.4])
    with torch.no_grad():
        both = model.velocity("student", x, sigma, cond, torch.tensor([0.0, 1.0]))
        teacher = family.predict(pair.network, x, sigma, cond)
        student = model.velocity("student", x, sigma, cond, torch.ones(2))
    torch.testing.assert_close(both[0], teacher[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[1], student[1], rtol=1e-4, atol=1e-5)
    assert (student - teacher).abs().max() > 0.01


def test_guidance_of_zero_is_neutral(fp32):
    cond, uncond = torch.randn(2, 2, 4, 8, 8)
    guided = fp32.family.guide(cond, uncond, torch.tensor([fp32.family.neutral_guidance, 5.0]).view(2, 1, 1, 1))
    torch.testing.assert_close(guided, torch.stack([cond[0], 6 * cond[1] - 5 * uncond[1]]))


def test_latents_are_scaled_and_shifted(fp32):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = fp32.vae.vae.encode(images).latent_dist.mode()
        decoded = (fp32.vae.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    latents = fp32.vae.encode(images)
    torch.testing.assert_close(latents, (raw - 0.1) * 0.6)
    torch.testing.assert_close(fp32.vae.decode(latents), decoded)


def test_the_true_architecture():
    """Size and linears are published. A pass on the meta device needs no value of a tensor."""
    family = open_family("Tongyi-MAI/Z-Image", offline=True)
    network = family.meta_network()
    assert sum(p.numel() for p in network.parameters()) == 6_154_908_736
    assert sum(isinstance(module, torch.nn.Linear) for module in network.modules()) == 276
    assert len(family.blocks(network)) == 34 and family.width == 3840
    assert family.latent_shape(1024, 1024) == (16, 128, 128)
    assert velocity_on_meta(family, network).shape == (2, 16, 64, 64)
    assert family.shift(4096, 50) == 6.0 and open_family("Tongyi-MAI/Z-Image-Turbo", offline=True).shift(4096, 8) == 3.0
