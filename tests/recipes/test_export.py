"""Exported weights give the same images in diffusers as here."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from runs import ALL_TARGETS
from safetensors import safe_open
from tiny_fixtures import adapter_file, adapter_metadata, load_adapter, smallest_tree

from recipes.cli import main
from scfm_core.models.weights import save_pipeline
from scfm_core.train.checkpoint import find_checkpoint, load_checkpoint
from scfm_core.train.fit import fit
from scfm_core.train.parse import dump_config, parse_config
from scfm_core.train.runs import load_trained
from scfm_core.train.trainer import Trainer

PROMPTS = ["a handwritten digit three", "a handwritten digit eight"]


def train(config):
    """A short run, whose adapter is then made strong enough to change the images."""
    trainer = Trainer(config)
    fit(trainer)
    with torch.no_grad():
        for name, parameter in trainer.model.parameters("student").items():
            if ".lora_B." in name or config.train.weights == "full":
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    trainer.state.save()
    (trainer.run_dir / "config.yaml").write_text(dump_config(config))
    return trainer.run_dir


def our_images(run_dir, output, *words):
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["sample", str(run_dir), *prompts, "--output", str(output), "--seed", "77", *words]) == 0
    return [
        np.asarray(Image.open(path), dtype=int)
        for path in sorted(output.glob("*.png"), key=lambda path: path.stem.rpartition("_seed")[2])
    ]


def diffusers_images(pipe, steps):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(77 + i) for i in range(len(PROMPTS))]
    images = pipe(
        PROMPTS, num_inference_steps=steps, guidance_scale=3.5, height=16, width=16, max_sequence_length=8, generator=generators
    ).images  # fmt: skip
    return [np.asarray(image, dtype=int) for image in images]


def largest_difference(left, right):
    assert len(left) == len(right) == len(PROMPTS)
    return max(int(abs(a - b).max()) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """A run of each kind, made when a test first asks for it; with its exported adapter."""

    @functools.cache
    def make(kind):
        tree = smallest_tree(tiny, tmp_path_factory.mktemp(kind) / "run", ALL_TARGETS)
        tree["method"] |= {"step-scaled": {"step_gain": {"gamma": 0.5}}}.get(kind, {})
        tree["lora"] |= {"large alpha": {"alpha": 10.0}}.get(kind, {})
        tree["model"] |= {"quantised base": {"base": "nf4"}}.get(kind, {})
        run_dir = train(parse_config(tree, "test"))
        assert main(["export", str(run_dir)]) == 0
        return run_dir

    return make


@pytest.mark.parametrize("kind", ["plain", "large alpha", "quantised base"])
def test_the_adapter_gives_the_same_images_in_diffusers(exported, tiny, tmp_path, monkeypatch, kind):
    run_dir = exported(kind)
    ours = our_images(run_dir, tmp_path / "images", "--steps", "3")
    pipe = FluxPipeline.from_pretrained(tiny / "flux")
    plain = diffusers_images(pipe, 3)
    # Online, diffusers finds the file in the folder by itself, as in the README; offline it needs the name.
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
    pipe.load_lora_weights(run_dir / "adapter")
    assert largest_difference(ours, diffusers_images(pipe, 3)) <= 2
    assert largest_difference(ours, plain) > 20  # the adapter changes the images


def test_a_step_scaled_adapter_with_the_weights_of_its_readme(exported, tiny, tmp_path):
    run_dir = exported("step-scaled")
    metadata = adapter_metadata(adapter_file(run_dir / "adapter"))
    pipe = FluxPipeline.from_pretrained(tiny / "flux")
    load_adapter(pipe, run_dir / "adapter")
    for steps in (1, 3, 4, 8):
        ours = our_images(run_dir, tmp_path / f"{steps}", "--steps", str(steps))
        weight = metadata["strength_by_steps"][str(steps)]
        assert weight == pytest.approx(steps**-0.5, abs=1e-6)
        assert f"| {steps} | {weight:.3f} |" in (run_dir / "adapter" / "README.md").read_text()
        pipe.set_adapters("scfm", weight)
        assert largest_difference(ours, diffusers_images(pipe, steps)) <= 2, steps


def test_a_strength_above_one(exported, tiny, tmp_path):
    run_dir = exported("plain")
    ours = our_images(run_dir, tmp_path / "strong", "--steps", "2", "--strength", "1.6")
    weaker = our_images(run_dir, tmp_path / "plain", "--steps", "2")
    pipe = FluxPipeline.from_pretrained(tiny / "flux")
    load_adapter(pipe, run_dir / "adapter")
    pipe.set_adapters("scfm", 1.6)
    assert largest_difference(ours, diffusers_images(pipe, 2)) <= 2
    assert largest_difference(ours, weaker) > 5


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_merged_pipeline_needs_no_adapter(exported, make_config, tmp_path, weights):
    run_dir = exported("step-scaled") if weights == "lora" else train(make_config({"train.weights": weights}))
    steps = ["--steps", "4"] if weights == "lora" else []
    assert main(["export", str(run_dir), "--merged", str(tmp_path / "merged"), *steps]) == 0
    ours = our_images(run_dir, tmp_path / "images", "--steps", "4")
    assert largest_difference(ours, diffusers_images(FluxPipeline.from_pretrained(tmp_path / "merged"), 4)) <= 2


def test_large_weights_are_written_in_several_files(tiny, tmp_path):
    """The names and the index are those of diffusers, which loads the same weights."""
    before = FluxTransformer2DModel.from_pretrained(tiny / "flux" / "transformer").state_dict()
    save_pipeline(tiny / "flux", tmp_path / "new", before.items(), torch.float32, None, shard_bytes=300_000)
    names = sorted(path.name for path in (tmp_path / "new" / "transformer").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"diffusion_pytorch_model-00001-of-{len(names):05d}.safetensors"
    after = FluxTransformer2DModel.from_pretrained(tmp_path / "new" / "transformer").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    save_pipeline(tiny / "flux", tmp_path / "one", before.items(), torch.float32, None)
    assert [path.name for path in (tmp_path / "one" / "transformer").glob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]


def test_sampling_loads_one_copy_of_full_weights(make_config):
    """In the dtype of the exported pipeline: three networks in fp32 would need more memory than the pipeline."""
    config = make_config({"train.weights": "full", "train.steps": 2, "train.compute_dtype": "bfloat16"})
    run_dir = train(config)
    whole = load_checkpoint(find_checkpoint(run_dir)).reader.group("ema_slow")
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, weights="ema_slow"))
    model = load_trained(run_dir, config, with_teacher=False)
    assert list(model.networks) == ["ema_slow"]
    for name, parameter in model.parameters("ema_slow").items():
        assert torch.equal(parameter, whole[name].to(torch.bfloat16)), name
    assert set(load_trained(run_dir, config, with_teacher=True).networks) == {"ema_slow", "teacher"}


def test_training_exports_the_adapter_of_its_last_step(make_config, tiny):
    config = make_config({"method.step_gain": {"gamma": 0.5}})
    path = tiny / "recipe.yaml"
    path.write_text(dump_config(config))
    assert main(["train", str(path)]) == 0
    trainer = Trainer(config, resume=sorted((Trainer(config).run_dir / "checkpoints").glob("step_*"))[-1])
    with safe_open(adapter_file(trainer.run_dir / "adapter"), framework="pt") as file:
        live = trainer.model.parameters("student")
        assert set(file.keys()) == {f"transformer.{name}" for name in live}
        for name, parameter in live.items():
            assert torch.equal(file.get_tensor(f"transformer.{name}"), parameter)
        assert json.loads(file.metadata()["scfm"])["step_gain_gamma"] == 0.5


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"train.weights": "full"}, [], "give --merged FOLDER"),
        ({"method.step_gain": {"gamma": 0.5}}, ["--merged", "x"], "choose the step count with --steps N"),
        ({"method.step_gain": {"gamma": 0.5}}, ["--merged", "x", "--steps", "0"], "--steps must be at least 1, got 0"),
        ({}, ["--steps", "3"], "--steps is for merging a step-scaled adapter"),
        ({}, ["--merged", "x", "--steps", "3"], "--steps is for merging a step-scaled adapter"),
    ],
)
def test_impossible_exports_are_errors(make_config, capsys, changes, words, message):
    run_dir = train(make_config({**changes, "train.steps": 1}))
    assert main(["export", str(run_dir), *words]) == 2
    assert message in capsys.readouterr().err
