"""FLUX.2 (klein-base, dev) against diffusers' own pipelines: text, every pass, images, VAE, shift, true sizes."""

import json
import math
import shutil

import diffusers
import pytest
import tiny_flux2
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from scfm_core.errors import UserError
from scfm_core.flow.sampler import euler_sample
from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.encoders import Autoencoder, TextEncoders, load_tokenizer
from scfm_core.models.families import open_family
from scfm_core.models.initial import zero_modulation

PROMPTS = ["a handwritten digit three", "a seven"]
VARIANTS = ("klein", "dev")
TEXT_LENGTH = 16
HEIGHT, WIDTH = 16, 24  # 4 x 6 tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux2")
    for variant in VARIANTS:
        tiny_flux2.write(folder / variant, variant=variant)
    return folder


def open_both(folder, dtype):
    """Our family and diffusers' pipeline."""
    family = open_family(str(folder))
    pipe = getattr(diffusers, family.pipeline).from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return family, pipe


def as_latents(tokens):
    return tokens.transpose(1, 2).unflatten(2, (HEIGHT // 4, WIDTH // 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_four_guided_steps_of_the_pipeline(folders, variant, dtype):
    """Text and every pass are the pipeline's (in bf16 bit by bit), and so are the images.

    The pipeline rounds its state to bf16 after each step; `euler_sample` keeps it in fp32.
    """
    family, pipe = open_both(folders / variant, dtype)
    passes = []
    pipe.transformer.register_forward_hook(
        lambda module, arguments, inputs, output: passes.append((inputs, output[0])), with_kwargs=True
    )
    noise = torch.randn(2, *family.latent_shape(HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs = pipe(
        prompt=PROMPTS, num_inference_steps=4, height=HEIGHT, width=WIDTH, latents=noise, output_type="pt",
        **family.call_arguments(4.0, TEXT_LENGTH),
    ).images  # fmt: skip

    sigmas = sigma_grid(4, family.shift(family.image_tokens(noise), 4))
    torch.testing.assert_close(pipe.scheduler.sigmas, sigmas, rtol=0, atol=1e-7)
    network, encoders = family.load_network(dtype, "cpu"), TextEncoders(family, TEXT_LENGTH, dtype, "cpu")
    cond = encoders.encode(PROMPTS, guidance=4.0)
    if variant == "klein":
        assert family.passes == 2 and len(passes) == 8
        assert all(
            torch.equal(row, passes[1][0]["encoder_hidden_states"][0]) for row in family.unconditional.fields["text"]
        )
        passes = passes[::2]
    assert torch.equal(cond.fields["text"], passes[0][0]["encoder_hidden_states"])
    assert (cond.fields["text"][0] - cond.fields["text"][1]).abs().max() > 0.1
    for (inputs, output), sigma in zip(passes, sigmas[:-1], strict=True):
        found = family.predict(network, as_latents(inputs["hidden_states"]), sigma.expand(2), cond)
        torch.testing.assert_close(
            found, as_latents(output), rtol=0, atol=0 if dtype == torch.bfloat16 else 1e-4, msg=str(sigma)
        )

    latents = euler_sample(lambda x, sigma: family.velocity(network, x, sigma, cond), noise, sigmas)
    ours = Autoencoder(family, dtype, "cpu").decode(latents)
    error = (ours - theirs).abs().max()
    assert theirs.std() > 0.1 and error < (0.05 if dtype == torch.bfloat16 else 1e-4)  # measured 0.016 in bf16


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_captions_is_one_by_one(folders, variant):
    captions = [*PROMPTS, "", "digit " * 20]
    family = open_family(str(folders / variant))
    encoders = TextEncoders(family, TEXT_LENGTH, torch.float32, "cpu")
    together = encoders.encode(captions).fields["text"]
    assert together.shape == (4, *family.shapes(TEXT_LENGTH)["text"])
    alone = torch.cat([encoders.encode([caption]).fields["text"] for caption in captions])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(("variant", "template"), [("klein", 7), ("dev", 6)])
def test_tokens_of_the_template_count(folders, variant, template):
    """By the pipeline's tokenizer or processor, and by the tokenizer alone, which `--dry-run` loads."""
    family = open_family(str(folders / variant))
    encoders = TextEncoders(family, TEXT_LENGTH, torch.float32, "cpu")
    expected = [template + 4, template + 2, template, template + 40]
    captions = [*PROMPTS, "", "digit " * 40]
    assert encoders.token_counts(captions) == expected
    assert family.count_tokens(load_tokenizer(family), captions) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_missing_chat_template_is_named(folders, tmp_path, variant):
    shutil.copytree(folders / variant, tmp_path / "model")
    (tmp_path / "model" / "tokenizer" / "chat_template.jinja").unlink()
    family = open_family(str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"text encoders in .* chat template.* download the model again"):
        TextEncoders(family, TEXT_LENGTH, torch.float32, "cpu")
    with pytest.raises(UserError, match=r"tokenizer in .* chat template.* download the model again"):
        load_tokenizer(family)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_latents_are_those_of_the_pipeline(folders, dtype):
    """Both ways; and the way back undoes the way there."""
    family, pipe = open_both(folders / "klein", dtype)
    vae = Autoencoder(family, dtype, "cpu")
    images = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(images)
    assert latents.shape == (2, *family.latent_shape(HEIGHT, WIDTH))
    assert torch.equal(latents, pipe._encode_vae_image(images.to(dtype), None))
    # The lines of the pipeline's call.
    mean, std = pipe.vae.bn.running_mean, torch.sqrt(pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps)
    decoded = pipe.vae.decode(pipe._unpatchify_latents(latents * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1))).sample
    # Of other strides in memory, so that convolutions round differently.
    expected = pipe.image_processor.postprocess(decoded.float(), output_type="pt")
    torch.testing.assert_close(vae.decode(latents), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)
    if dtype == torch.float32:
        plain = pipe.vae.decode(pipe.vae.encode(images).latent_dist.mode()).sample
        torch.testing.assert_close(decoded, plain, rtol=0, atol=1e-5)


def test_the_shift_is_the_pipelines(folders):
    family = open_family(str(folders / "dev"))
    for tokens in (16, 1024, 4096, 4300, 4301, 16384):
        for steps in (1, 4, 50, 200):
            assert family.shift(tokens, steps) == pytest.approx(math.exp(compute_empirical_mu(tokens, steps)))


def test_a_distilled_klein_is_not_guided(folders, tmp_path):
    """As in the pipeline, which ignores guidance then."""
    shutil.copytree(folders / "klein", tmp_path / "distilled")
    index = json.loads((tmp_path / "distilled" / "model_index.json").read_text())
    assert index["is_distilled"] is False
    (tmp_path / "distilled" / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    kinds = [open_family(str(path)).guidance_kind for path in (tmp_path / "distilled", *folders.iterdir())]
    assert sorted(kinds) == ["input", "none", "passes"] and kinds[0] == "none"


@torch.no_grad()
def test_from_scratch_every_block_starts_as_the_identity(folders):
    family = open_family(str(folders / "klein"))
    network = family.load_network(torch.float32, "cpu")
    zero_modulation(network)
    changes = []
    for block in network.single_transformer_blocks:
        block.register_forward_hook(
            lambda module, arguments, inputs, output: changes.append(output - inputs["hidden_states"]),
            with_kwargs=True,
        )
    for block in network.transformer_blocks:
        block.register_forward_hook(
            lambda module, arguments, inputs, output: changes.append(output[1] - inputs["hidden_states"]),
            with_kwargs=True,
        )
    fields = {name: torch.randn(1, *shape) for name, shape in family.shapes(8).items()}
    x = torch.randn(1, *family.latent_shape(HEIGHT, WIDTH))
    velocity = family.predict(network, x, torch.ones(1), Conditioning(fields=fields))
    assert len(changes) == len(family.blocks(network)) and not any(bool(change.any()) for change in changes)
    assert not velocity.any()


@pytest.mark.parametrize(
    ("name", "parameters", "linears", "width"),
    [
        ("klein-base-4B", 3_875_544_576, 109, 3072),
        ("klein-base-9B", 9_078_581_248, 153, 4096),
        ("dev", 32_223_281_152, 203, 6144),
    ],
)
def test_true_sizes(name, parameters, linears, width):
    family = open_family(f"black-forest-labs/FLUX.2-{name}", offline=True)
    network = family.meta_network()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert sum(isinstance(module, torch.nn.Linear) for module in network.modules()) == linears
    assert family.width == width and family.latent_shape(1024, 512) == (128, 64, 32)
    assert family.guidance_kind == ("input" if name == "dev" else "passes")
    assert (
        len(family.blocks(network)) == family.network_config["num_layers"] + family.network_config["num_single_layers"]
    )
    fields = {field: torch.empty(1, *shape, device="meta") for field, shape in family.shapes(512).items()}
    cond = Conditioning(fields=fields, guidance=torch.empty(1, device="meta"))
    x = torch.empty(1, 128, 64, 32, device="meta")
    assert family.predict(network, x, torch.empty(1, device="meta"), cond).shape == x.shape
