"""scfm from Python: the images of the command line, with other adapters beside it, and every mistake."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from runs import ALL_TARGETS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_fixtures import smallest_tree

from recipes.cli import main
from scfm_core import load, with_steps
from scfm_core.errors import UserError
from scfm_core.models.families import family_of_pipeline
from scfm_core.train.fit import fit
from scfm_core.train.parse import dump_config, parse_config
from scfm_core.train.trainer import Trainer

PROMPTS = ["a handwritten digit three", "a handwritten digit eight"]


def exported(run_dir):
    """The file of `scfm export`."""
    [path] = (run_dir / "adapter").glob("*.safetensors")
    return path


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A step-scaled run whose adapter is strong enough to change the images, exported."""
    tree = smallest_tree(tiny, tmp_path_factory.mktemp("api") / "run", ALL_TARGETS)
    tree["method"]["step_gain"], tree["train"]["steps"] = {"gamma": 0.5}, 1
    config = parse_config(tree, "test")
    trainer = Trainer(config)
    fit(trainer)
    with torch.no_grad():
        for name, parameter in trainer.model.parameters("student").items():
            if ".lora_B." in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    trainer.state.save()
    (trainer.run_dir / "config.yaml").write_text(dump_config(config))
    assert main(["export", str(trainer.run_dir)]) == 0
    return trainer.run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of the run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def pipe(tiny):
    pipe = FluxPipeline.from_pretrained(tiny / "flux")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def called(pipe, steps, **arguments):
    generators = [torch.Generator().manual_seed(77 + i) for i in range(len(PROMPTS))]
    return pipe(PROMPTS, num_inference_steps=steps, generator=generators, **arguments).images


def difference(left, right):
    pairs = zip(left, right, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


@pytest.mark.processes
def test_importing_scfm_core_imports_no_torch():
    code = (
        "import sys, scfm_core; assert not {'torch', 'diffusers', 'scfm_core.api'} & sys.modules.keys(); scfm_core.load"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_adapter_gives_the_images_of_its_run(run_dir, pipe, tiny):
    """At every step count, size and guidance; the pipeline keeps its class, its other methods and its object."""
    student, adapter, own = load(run_dir), load(run_dir / "adapter"), dict(pipe.scheduler.config)
    assert adapter.base == str(tiny / "flux")  # a local folder, which the file does not name, but the run
    assert with_steps(pipe, run_dir / "adapter") is pipe and isinstance(pipe, FluxPipeline)
    pipe = pipe.to("cpu")
    images = {}
    for steps, more in ((1, {}), (4, {}), (4, {"height": 24, "width": 16}), (2, {"guidance": 1.5})):
        settings = student.settings(steps=steps, **more)
        assert settings == adapter.settings(steps=steps, **more)
        assert settings["strength"] == pytest.approx(steps**-0.5)
        key = (steps, *more)
        images[key] = student.sample(PROMPTS, steps=steps, seed=77, **more)
        assert images[key][0].size == (settings["width"], settings["height"])
        assert difference(images[key], adapter.sample(PROMPTS, steps=steps, seed=77, **more)) <= 2
        call = {name.replace("guidance", "guidance_scale"): value for name, value in more.items()}
        assert difference(images[key], called(pipe, steps, **call)) <= 2
    plain = student.sample(PROMPTS, steps=4, seed=77, undistilled=True)
    assert difference(plain, called(pipe, 4, adapter_weight=0.0)) <= 2
    assert difference(plain, adapter.sample(PROMPTS, steps=4, seed=77, undistilled=True)) <= 2
    assert difference(plain, images[4,]) > 20
    assert difference(images[4,], student.sample(PROMPTS, seed=77, strength=0.1)) > 20
    assert difference(images[4,][1:], student.sample(PROMPTS[1:], seed=[78 + i for i in range(len(PROMPTS) - 1)])) <= 2
    with pytest.raises(UserError, match="1 prompt and 2 seeds: give a seed for each prompt"):
        student.sample("one", seed=[1, 2])
    assert family_of_pipeline(pipe).scheduler_config == own, "not the one of the last call"
    again = with_steps(pipe, run_dir / "adapter")  # in place of the one before
    assert again.get_list_adapters() == {"transformer": ["scfm"]}
    assert difference(images[4,], called(again, 4)) <= 2


def test_a_style_beside_the_adapter_keeps_its_weight(run_dir, pipe, tmp_path):
    """Loaded before or after; the same as the style fused into the base of the run."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 64, generator=generator), torch.randn(256, 3, generator=generator)
    name = "transformer.single_transformer_blocks.0.proj_mlp"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "style.safetensors")
    style = f"model.adapters=[{{path: {tmp_path / 'style.safetensors'}, weight: 0.7}}]"
    expected = load(run_dir, overrides=[style]).sample(PROMPTS, steps=4, seed=77)
    assert difference(expected, load(run_dir).sample(PROMPTS, steps=4, seed=77)) > 5
    pipe.load_lora_weights(tmp_path, weight_name="style.safetensors", adapter_name="style")
    pipe.set_adapters("style", 0.7)
    with_steps(pipe, run_dir / "adapter")
    assert difference(expected, called(pipe, 4)) <= 2
    pipe.set_adapters("style", 0.7)  # which puts the other to sleep
    assert difference(expected, called(pipe, 4)) <= 2
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["sample", str(run_dir), *words, "--steps", "4", "--seed", "77", style, "--output", str(tmp_path)]) == 0


def test_a_dynamic_shift_is_that_of_the_models_scheduler(run_dir, pipe, tiny, tmp_path):
    """It may be fixed. A pipeline with a dynamic one keeps its scheduler."""
    rewrite(run_dir, shift="dynamic")
    assert load(run_dir, overrides=["sample.shift=dynamic"]).settings()["shift"] == 3.0
    base = Path(shutil.copytree(tiny / "flux", tmp_path / "base"))
    type(pipe.scheduler)(use_dynamic_shifting=True).save_pretrained(base / "scheduler")
    adapter = load(run_dir / "adapter", base=str(base))
    run = load(run_dir, overrides=["sample.shift=dynamic", f"model.path={base}"])
    expected = run.sample(PROMPTS, steps=4, seed=77)
    assert adapter.settings()["shift"] == run.settings()["shift"] != 3.0
    assert difference(expected, adapter.sample(PROMPTS, steps=4, seed=77)) <= 2
    pipe.scheduler = type(pipe.scheduler)(shift=3.0, use_dynamic_shifting=True)
    own = pipe.scheduler
    with_steps(pipe, run_dir / "adapter")
    assert difference(expected, called(pipe, 4)) <= 2
    assert pipe.scheduler is own


def rewrite(run_dir, **changes):
    """Change the header of the exported file."""
    path = exported(run_dir)
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    header["scfm"] = json.dumps({**json.loads(header["scfm"]), **changes})
    save_file(load_file(path), path, metadata=header)


def test_a_folded_file_has_weight_one_at_its_step_count(run_dir, pipe):
    expected = load(run_dir).sample(PROMPTS, steps=4, seed=77)
    path = exported(run_dir)
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    save_file({n: t * 0.5 if "lora_B" in n else t for n, t in load_file(path).items()}, path, metadata=header)
    rewrite(run_dir, folded_steps=4)
    with_steps(pipe, path)
    assert difference(expected, called(pipe, 4)) <= 2
    assert difference(expected, called(pipe, None)) <= 2
    with pytest.raises(UserError, match="is folded for 4 steps, and cannot be used with 3"):
        called(pipe, 3)
    with pytest.raises(UserError, match="is folded for 4 steps, and cannot be used with 8"):
        pipe(PROMPTS[0], sigmas=[1 - k / 8 for k in range(8)])
    with pytest.raises(UserError, match="8 sigmas are not 4 steps"):
        pipe(PROMPTS[0], num_inference_steps=4, sigmas=[1 - k / 8 for k in range(8)])


def test_methods_that_change_the_adapter_are_found(run_dir, pipe):
    """After them the weight of the step count would have no effect."""
    with_steps(pipe, run_dir / "adapter")
    base, expected = called(pipe, 2, adapter_weight=0), called(pipe, 2)
    pipe.fuse_lora()
    with pytest.raises(UserError, match=r"`fuse_lora` fixed the weight .* Call `pipe.unfuse_lora\(\)`"):
        called(pipe, 2)
    pipe.unfuse_lora()
    pipe.disable_lora()
    with pytest.raises(UserError, match=r"Call `pipe.enable_lora\(\)`"):
        called(pipe, 2)
    pipe.enable_lora()
    assert difference(expected, called(pipe, 2)) <= 2 < 20 < difference(expected, base)
    pipe.delete_adapters("scfm")
    with pytest.raises(UserError, match=r"is no longer in this pipeline .* Call `with_steps` again"):
        called(pipe, 2)
    assert difference(base, called(pipe, 2, adapter_weight=0)) <= 2
    assert difference(expected, called(with_steps(pipe, run_dir / "adapter"), 2)) <= 2


def test_a_pipeline_without_its_adapters_is_that_of_diffusers(run_dir, pipe):
    """No weight, scheduler, sigmas or arguments of ours are left; a file that is loaded then has the weight that diffusers gives it."""
    scheduler, plain = pipe.scheduler, called(pipe, 3, height=16, width=16)
    for _ in range(2):
        with_steps(pipe, run_dir / "adapter")
        expected = called(pipe, 4)
        assert pipe.scheduler is not scheduler
        pipe.unload_lora_weights()
        assert type(pipe) is FluxPipeline and pipe.scheduler is scheduler
        assert difference(plain, called(pipe, 3, height=16, width=16)) == 0
    assert main(["export", str(run_dir), "--steps", "4"]) == 0
    pipe.load_lora_weights(run_dir / "adapter", weight_name="scfm_flux_4steps_fp32.safetensors", adapter_name="scfm")
    arguments = {"height": 16, "width": 16, "guidance_scale": 3.5, "max_sequence_length": 8}
    assert difference(expected, called(pipe, 4, sigmas=[1, 0.75, 0.5, 0.25], **arguments)) <= 2


def test_mistakes_name_what_to_do(run_dir, pipe, tiny, tmp_path):
    with pytest.raises(UserError, match=r"is neither a run .* nor the folder of an adapter"):
        load(tiny)
    with pytest.raises(UserError, match="there is no adapter"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a run, which `overrides` are for"):
        load(run_dir / "adapter", overrides=["sample.weights=ema_slow"])
    with pytest.raises(UserError, match=r"names no base model, because that was a folder. Give it: `load\(.*base="):
        load(shutil.copytree(run_dir / "adapter", tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"there is no folder '\./nowhere'"):
        load(run_dir / "adapter", base="./nowhere")
    student = load(run_dir)
    for arguments, message in (
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": "x", "steps": 0}, "steps must be at least 1, got 0"),
        ({"prompts": "x", "height": 17}, "an image of 17 x 16 pixels cannot be packed"),
    ):
        with pytest.raises(UserError, match=message):
            student.sample(**arguments)
    shutil.copytree(run_dir, tmp_path / "new")
    shutil.rmtree(tmp_path / "new" / "checkpoints")
    with pytest.raises(UserError, match="has no complete checkpoint yet; train first"):
        load(tmp_path / "new")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"transformer.x_embedder.lora_A.weight": torch.zeros(2, 4)}, foreign)
    with pytest.raises(UserError, match="is not an adapter of `scfm export`"):
        with_steps(pipe, foreign)
    with safe_open(exported(run_dir), "pt") as file:
        header = file.metadata()
    factors = {
        f"transformer.x_embedder.lora_{side}.weight": torch.zeros(shape)
        for side, shape in (("A", (2, 99)), ("B", (64, 2)))
    }
    save_file(factors, foreign, metadata=header)
    with pytest.raises(UserError, match=r"does not fit this FluxTransformer2DModel: .* It was made for another model"):
        with_steps(pipe, foreign)
    with pytest.raises(UserError, match="scfm does not know the pipeline int"):
        with_steps(3, run_dir / "adapter")


def test_the_code_of_the_readme_runs(run_dir, tiny, tmp_path, monkeypatch):
    """With the tiny model in fp32 in place of Flux.1-dev on a GPU, and the test's run under the name of the recipe's."""
    page = (Path(__file__).parents[1] / "README.md").read_text()
    [code] = [
        block for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if "scfm_core" in block
    ]
    assert len(code.strip().splitlines()) <= 10
    code = code.replace("black-forest-labs/FLUX.1-dev", str(tiny / "flux"))
    code = code.replace("torch.bfloat16", "torch.float32").replace('.to("cuda")', "")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "flux_dev_lora").symlink_to(run_dir)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    [expected] = found["student"].sample(["a red fox in fresh snow"], steps=3, seed=5)
    image = found["pipe"]("a red fox in fresh snow", num_inference_steps=3, generator=torch.Generator().manual_seed(5))
    assert difference([expected], image.images) <= 2
    assert found["image"].size == found["teacher"].size == (16, 16)
