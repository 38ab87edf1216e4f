"""SD3.5's classes: guidance in two passes, and all steps from training to images in diffusers."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from local_hub import serve
from PIL import Image
from runs import ALL_TARGETS
from tiny_fixtures import adapter_file, adapter_metadata, load_adapter

from recipes.cli import main
from scfm_core.errors import UserError
from scfm_core.models.encoders import TextEncoders
from scfm_core.models.families import open_family
from scfm_core.models.weights import GUIDANCE_MARK
from scfm_core.train.checkpoint import find_checkpoint
from scfm_core.train.fit import fit
from scfm_core.train.parse import dump_config
from scfm_core.train.trainer import Trainer

PROMPTS = ["a handwritten digit three", "a handwritten digit eight"]


@pytest.fixture(scope="module")
def folder(tiny_sd3):
    return tiny_sd3 / "sd3"


@pytest.fixture
def make_sd3(make_config, tiny_sd3):
    def make(changes=None):
        settings = {
            "model.path": str(tiny_sd3 / "sd3"),
            "data.path": str(tiny_sd3 / "cache"),
            "method.guidance": [3.5, 5.0],
            "lora.targets": ALL_TARGETS,
        }
        return make_config({**settings, "train.clip_norm": 2.0, **(changes or {})})

    return make


@pytest.fixture(scope="module")
def family(folder):
    family = open_family(str(folder))
    TextEncoders(family, 8, torch.float32, "cpu")
    return family


def conditions(folder, guidance):
    return TextEncoders(open_family(str(folder)), 8, torch.float32, "cpu").encode(PROMPTS, guidance)


def images_of(pipe, scale):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(77 + i) for i in range(2)]
    images = pipe(
        PROMPTS, num_inference_steps=3, sigmas=[1, 2 / 3, 1 / 3], guidance_scale=scale, height=16, width=16, max_sequence_length=8,
        generator=generators,
    ).images  # fmt: skip
    return [np.asarray(image, dtype=int) for image in images]


def sampled(run_dir, output):
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["sample", str(run_dir), *words, "--seed", "77", "--steps", "3", "--output", str(output)]) == 0
    return [
        np.asarray(Image.open(path), dtype=int)
        for path in sorted(output.glob("*.png"), key=lambda path: path.stem.rpartition("_seed")[2])
    ]


def worst(left, right):
    return max(abs(a - b).max() for a, b in zip(left, right, strict=True))


def test_one_step_of_the_pipeline_is_our_velocity(folder, family):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 1, 8, 8)
    theirs = pipe(
        PROMPTS, num_inference_steps=1, guidance_scale=4.5, height=16, width=16, max_sequence_length=8, latents=noise,
        output_type="latent",
    ).images  # fmt: skip
    with torch.no_grad():
        ours = family.velocity(family.load_network(torch.float32, "cpu"), noise, torch.ones(2), conditions(folder, 4.5))
    torch.testing.assert_close(theirs, noise - ours, rtol=1e-4, atol=1e-4)


def test_guidance_is_of_each_sample(folder, family):
    network, cond, x, sigma = (
        family.load_network(torch.float32, "cpu"),
        conditions(folder, 1.0),
        torch.randn(2, 1, 8, 8),
        torch.tensor([0.3, 0.8]),
    )
    with torch.no_grad():
        plain = family.velocity(network, x, sigma, dataclasses.replace(cond, guidance=None))
        at = {w: family.velocity(network, x, sigma, cond.with_guidance(torch.full((2,), w))) for w in (0.0, 1.0, 3.0)}
        mixed = family.velocity(network, x, sigma, cond.with_guidance(torch.tensor([3.0, 0.0])))
    torch.testing.assert_close(at[1.0], plain)
    torch.testing.assert_close(at[3.0], at[0.0] + 3 * (plain - at[0.0]))
    torch.testing.assert_close(mixed, torch.stack([at[3.0][0], at[0.0][1]]))
    assert (at[0.0] - plain).abs().max() > 1e-3


def test_no_gradient_through_the_unconditional_branch(folder, family):
    """The weights' gradient is that of w times the conditional pass; the empty caption gets no gradient."""
    network, cond, x = family.load_network(torch.float32, "cpu"), conditions(folder, 4.0), torch.randn(2, 1, 8, 8)
    sigma, weight = torch.tensor([0.3, 0.8]), torch.randn(2, 1, 8, 8)
    parameter = network.transformer_blocks[1].attn.to_q.weight
    text = family.unconditional.fields["text"].clone().requires_grad_()
    given = family.unconditional
    family.unconditional = dataclasses.replace(given, fields={**given.fields, "text": text})
    try:
        guided = family.velocity(network, x, sigma, cond)
    finally:
        family.unconditional = given
    found, of_text = torch.autograd.grad((guided * weight).sum(), [parameter, text], allow_unused=True)
    plain = family.velocity(network, x, sigma, dataclasses.replace(cond, guidance=None))
    [expected] = torch.autograd.grad((4 * plain * weight).sum(), [parameter])
    assert of_text is None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_distilled_resumed_sampled_evaluated_exported(make_sd3, folder, tmp_path, weights):
    """The adapter, or the merged pipeline, makes in diffusers the images that `scfm sample` makes."""
    method = {"method.step_gain": {"gamma": 0.5}} if weights == "lora" else {}
    changes = {**method, "train.weights": weights, "train.lr": 1e-2}
    whole = Trainer(make_sd3({**changes, "run.dir": str(tmp_path / "whole")}))
    fit(whole)
    config = make_sd3({**changes, "run.dir": str(tmp_path / "cut")})
    first = Trainer(config)
    steps = first.train_steps()
    next(steps), next(steps)
    first.state.save()
    first.state.wait()
    again = Trainer(config, find_checkpoint(tmp_path / "cut"))
    fit(again)
    for name, parameter in again.model.parameters("student").items():
        assert torch.equal(parameter, whole.model.parameters("student")[name]), name

    run_dir = again.run_dir
    (run_dir / "config.yaml").write_text(dump_config(config))
    ours = sampled(run_dir, tmp_path / "i")
    if weights == "lora":
        assert main(["export", str(run_dir)]) == 0
        card = (run_dir / "adapter" / "README.md").read_text()
        assert "StableDiffusion3Pipeline.from_pretrained" in card and "guidance between 3.5 and 5" in card
        assert "sigmas=[1 - k / 3 for k in range(3)]" in card  # this pipeline's own grid is another
        pipe = StableDiffusion3Pipeline.from_pretrained(folder)
        load_adapter(pipe, run_dir / "adapter")
        pipe.set_adapters("scfm", 3**-0.5)
    else:
        assert main(["export", str(run_dir), "--merged", str(tmp_path / "merged")]) == 0
        pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "merged")
    assert worst(ours, images_of(pipe, 3.5)) <= 2

    assert main(["evaluate", str(run_dir)]) == 0
    result = json.loads((run_dir / "evaluation.json").read_text())
    assert result["student"]["3"]["fid_teacher"] > 0
    assert result["student"]["3"]["mse_teacher"] != result["base"]["3"]["mse_teacher"]


STAGE_1 = {"method.distil_guidance": True, "method.teacher_fraction": 0.0, "method.guidance": [4.0, 4.0]}


def test_guided_paths_in_one_pass(make_sd3, folder, tmp_path):
    """Stored paths of the guided teacher are learned without guidance; those of another scale are refused."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = [
        "--trajectories",
        "--per-prompt",
        "8",
        "--resolution",
        "16",
        "16",
        "--text-length",
        "8",
        "--dtype",
        "float32",
    ]
    generate = [
        "data",
        "generate",
        str(tmp_path / "prompts.txt"),
        "-o",
        str(tmp_path / "paths"),
        "--model",
        str(folder),
    ]
    assert main([*generate, *words, "--guidance", "4.7", "--shift", "3"]) == 0  # not a number of fp32
    paths = {
        "data.path": str(tmp_path / "paths"),
        "method.trajectory_fraction": 1.0,
        "method.guidance": [4.7, 4.7],
        "sample.guidance": 4.7,
    }
    trainer = Trainer(make_sd3({**STAGE_1, **paths, "train.steps": 2}))
    calls, seen = [], []
    trainer.model.bank.network.register_forward_hook(lambda *_: calls.append(1))
    velocity = trainer.model.student_velocity
    trainer.model.student_velocity = lambda x, sigma, cond, strength: (
        seen.append(cond.guidance) or velocity(x, sigma, cond, strength)
    )
    fit(trainer)
    assert len(calls) == 2 * trainer.config.train.global_batch_size // trainer.config.train.micro_batch_size
    assert seen and all(guidance is None for guidance in seen)
    taken = {"method.trajectory_steps": 4, "method.trajectory_grids": [1, 2, 4], "train.steps": 1}
    trainer = Trainer(make_sd3({**STAGE_1, **paths, **taken, "run.dir": str(tmp_path / "taken")}))
    rows, teacher = [], trainer.family.velocity
    trainer.family.velocity = lambda network, x, sigma, cond: (
        rows.append(cond.guidance) or teacher(network, x, sigma, cond)
    )
    fit(trainer)
    for number, guidance in enumerate(rows):  # four steps of the guided teacher, one pass of the student
        assert (guidance is None) == (number % 5 == 4)
        assert guidance is None or (guidance == torch.tensor(4.7)).all()
    other = {"method.guidance": [3.0, 3.0], "sample.guidance": 3.0, "method.trajectory_steps": None}
    with pytest.raises(
        UserError, match=r"have guidance scale 4\.7, but method\.distil_guidance learns only method\.guidance=3"
    ):
        Trainer(make_sd3({**STAGE_1, **paths, **other}))


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_one_pass_learns_the_guidance_of_two(make_sd3, folder, tmp_path, weights):
    """The merged model is a one-pass model, and makes in diffusers the images that `scfm sample` makes."""
    changes = {
        **STAGE_1,
        "method.flow_fraction": 1.0,
        "train.weights": weights,
        "train.steps": 40,
        "lora.rank": 16,
        "checkpoint.every": 40,
    }
    rate = {"train.lr": 5e-3 if weights == "lora" else 1e-3, "lora.alpha": 16.0, "sample.guidance": 4.0}
    first = make_sd3({**changes, **rate, "run.dir": str(tmp_path / "guidance")})
    trainer = Trainer(first)
    cond, x, sigma = conditions(folder, 4.0), torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8])

    @torch.no_grad()
    def distance():
        guided = trainer.model.velocity("teacher", x, sigma, cond, torch.zeros(2))
        learned = trainer.model.velocity("student", x, sigma, cond.with_guidance(None), torch.ones(2))
        return (learned - guided).square().mean()

    def error():
        """Of the student at 3 steps, to the images of the guided teacher."""
        assert main(["evaluate", str(tmp_path / "guidance")]) == 0
        return json.loads((tmp_path / "guidance" / "evaluation.json").read_text())["student"]["3"]["mse_teacher"]

    before = distance()
    trainer.state.save()
    (tmp_path / "guidance" / "config.yaml").write_text(dump_config(first))
    unlearned = error() if weights == "lora" else None
    fit(trainer)
    assert distance() < 0.3 * before
    merged = tmp_path / "one_pass"
    assert main(["export", str(tmp_path / "guidance"), "--merged", str(merged)]) == 0
    if unlearned is not None:
        assert error() < 0.7 * unlearned
        assert main(["export", str(tmp_path / "guidance")]) == 0
        card = (tmp_path / "guidance" / "adapter" / "README.md").read_text()
        assert "An adapter with built-in guidance" in card and "guidance_scale=1.0" in card and "weight |" not in card
    ours = sampled(tmp_path / "guidance", tmp_path / "a")
    assert worst(ours, images_of(StableDiffusion3Pipeline.from_pretrained(merged), 1.0)) <= 2
    assert open_family(str(merged)).passes == 1


def test_a_one_pass_model_is_shortened(make_sd3, folder, tmp_path):
    """A merged model with its mark is trained with one pass where others take two, and runs so in diffusers."""
    merged = tmp_path / "one_pass"
    shutil.copytree(folder, merged)
    (merged / GUIDANCE_MARK).touch()
    config = make_sd3(
        {
            "model.path": str(merged),
            "method.guidance": [1, 1],
            "sample.guidance": 4.5,  # as in the recipe; one pass does not heed it
            "method.step_gain": {"gamma": 0.5},
            "train.steps": 4,
            "train.lr": 1e-2,
            "run.dir": str(tmp_path / "path"),
        }
    )
    trainer = Trainer(config)
    calls = []
    trainer.model.bank.network.register_forward_hook(lambda *_: calls.append(1))
    next(trainer.train_steps())
    assert len(calls) == 3  # near, far, student
    fit(trainer)
    (tmp_path / "path" / "config.yaml").write_text(dump_config(config))
    assert main(["export", str(tmp_path / "path")]) == 0
    pipe = StableDiffusion3Pipeline.from_pretrained(merged)
    adapter = tmp_path / "path" / "adapter"
    load_adapter(pipe, adapter)
    pipe.set_adapters("scfm", 3**-0.5)
    assert worst(sampled(tmp_path / "path", tmp_path / "b"), images_of(pipe, 1.0)) <= 2
    assert "guidance_scale=1.0" in (tmp_path / "path" / "adapter" / "README.md").read_text()
    of_file = adapter_metadata(adapter_file(adapter))
    assert (of_file["guidance"], of_file["teacher_guidance"]) == (1, 1)  # neither is guided a second time
    assert main(["export", str(tmp_path / "path"), "--merged", str(tmp_path / "short"), "--steps", "3"]) == 0
    assert open_family(str(tmp_path / "short")).passes == 1
    with pytest.raises(
        UserError, match=r"method\.distil_guidance is for models with classifier-free guidance in two passes"
    ):
        one_pass = {"model.path": str(merged), "sample.guidance": 4.0}
        Trainer(make_sd3({**STAGE_1, **one_pass, "method.flow_fraction": 1.0, "method.step_gain": None}))


def test_a_one_pass_model_from_the_hub_is_not_guided_twice(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "repository")
    (tmp_path / "repository" / GUIDANCE_MARK).touch()

    snapshot = serve(monkeypatch, tmp_path / "repository", tmp_path / "cache")
    assert open_family("somebody/one_pass").passes == 1
    assert (snapshot / "model_index.json").is_file()


def test_full_weights_have_their_gradients_in_bf16(make_sd3):
    """Autocast keeps the weights that it cast in the unguided pass without gradient."""
    changes = {"train.weights": "full", "train.steps": 1, "train.compute_dtype": "bfloat16"}
    trainer = Trainer(make_sd3(changes))
    parameters, reduce, without = trainer.model.parameters("student"), trainer.engine.reduce, []

    def looked_at():
        without.extend(name for name, p in parameters.items() if p.grad is None or not p.grad.any())
        return reduce()

    trainer.engine.reduce = looked_at
    next(trainer.train_steps())
    # The last block drops its text, whose queries there have no effect.
    assert {name.rpartition(".")[0] for name in without} == {
        f"transformer_blocks.2.attn.{part}" for part in ("add_q_proj", "norm_added_q")
    }


@pytest.mark.parametrize(
    "method",
    [{}, {"method.teacher_fraction": 0.0, "method.trajectory_fraction": 1.0, "method.trajectory_steps": 12}],
    ids=["pairs", "paths"],
)
def test_a_scale_below_one_is_refused(make_sd3, method):
    with pytest.raises(UserError, match=r"method\.guidance is the scale of classifier-free guidance .* starts at 0"):
        Trainer(make_sd3({"method.guidance": [0.0, 8.0], **method}))


def test_flow_map_rows_are_guided(make_sd3):
    """Start, student and target at the same scales. Adapters that are zero have the teacher's velocity at every strength."""
    method = {"flow_map_fraction": 1.0, "teacher_fraction": 0.0, "step_gain": {"gamma": 0.5}, "guidance": [3.5, 5.0]}
    method["flow_map"] = {"difference": "central"}
    trainer = Trainer(make_sd3({"method": method, "train.compute_dtype": "float32"}))
    calls, velocity = [], trainer.family.velocity

    def seen(network, x, sigma, cond):
        result = velocity(network, x, sigma, cond)
        calls.append((x.detach(), cond.guidance, result.detach()))
        return result

    trainer.family.velocity = seen
    next(trainer.train_steps())
    (start, *_), (x, scales, student), (points, all_scales, of_target) = calls[:3]
    assert 0 < len(start) <= len(x) and torch.equal(all_scales, scales.repeat(3)) and (scales > 3.5).all()
    for other in of_target.chunk(3)[:2]:
        torch.testing.assert_close(other, student, rtol=1e-4, atol=1e-4)
    *same, landed = points.chunk(3)
    assert all(torch.equal(point, x) for point in same)
    ways = (x - landed) / student
    assert (ways > 0.01).all() and (ways.flatten(1).std(1) < 1e-3).all()  # one length for each row


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
def test_scores_of_matching_rows_are_guided_as_the_settings_say(make_sd3, share):
    """The teacher's velocity at a share of the distance from the neutral scale; the fake score takes one pass."""
    method = {"matching_fraction": 1.0, "teacher_fraction": 0.0, "step_gain": {"gamma": 0.5}, "guidance": [3.5, 5.0]}
    method["matching"] = {"guidance_share": share, "whole_fraction": 1.0}
    trainer = Trainer(make_sd3({"method": method}))
    scales, velocity = [], trainer.family.velocity
    trainer.family.velocity = lambda network, x, sigma, cond: (
        scales.append(cond.guidance) or velocity(network, x, sigma, cond)
    )
    next(trainer.train_steps())
    student, real, *fakes = scales[:4]
    assert (student > 3.5).all() and fakes == [None, None]
    if share == 0:
        assert real is None
    else:
        torch.testing.assert_close(real, 1 + share * (student - 1))


def test_pretrained_from_scratch(make_sd3):
    """The data's velocity is learned without guidance, and without captions in the configured fraction of rows."""
    changes = {"model.init": "random", "train.weights": "full", "train.lr": 2e-3, "train.steps": 12}
    method = {"method.flow_fraction": 1.0, "method.teacher_fraction": 0.0, "method.caption_dropout": 0.5}
    trainer = Trainer(make_sd3({**changes, **method}))
    seen = []
    velocity = trainer.model.student_velocity
    trainer.model.student_velocity = lambda x, sigma, cond, strength: (
        seen.append(cond) or velocity(x, sigma, cond, strength)
    )
    fit(trainer)
    empty = trainer.family.unconditional
    assert all(cond.guidance is None for cond in seen)
    dropped = torch.cat(
        [
            (cond.fields["pooled"] == empty.fields["pooled"]).all(1)
            & (cond.fields["text"] == empty.fields["text"]).all((1, 2))
            for cond in seen
        ]
    )
    assert 30 <= int(dropped.sum()) <= 66  # of 96
    rows = [json.loads(line)["loss"] for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] < 0.9 * rows[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernels.fused": "triton"}, "no fused blocks for the network of StableDiffusion3Pipeline"),
        ({"kernels.attention": "xformers"}, "call PyTorch's attention. Choose among flash, math"),
    ],
)
def test_kernels_of_other_blocks_are_refused(make_sd3, changes, message):
    with pytest.raises(UserError, match=message):
        Trainer(make_sd3(changes))


def test_the_scale_that_is_distilled_must_guide(make_sd3):
    stage = {**STAGE_1, "method.flow_fraction": 1.0, "method.guidance": [1.0, 1.0], "sample.guidance": 1.0}
    with pytest.raises(UserError, match=r"needs a scale above 1, which is no guidance"):
        Trainer(make_sd3(stage))


def test_a_backend_of_pytorchs_attention(make_sd3):
    assert "math attention (asked for)" in str(Trainer(make_sd3({"kernels.attention": "math"})).kernels)


def test_a_step_size_has_no_input_to_go_to(make_sd3):
    changes = {"train.weights": "full", "method.teacher_fraction": 0.0, "method.step_embedding": True}
    with pytest.raises(
        UserError, match=r"method\.step_embedding gives the step size to the network's embedded guidance"
    ):
        Trainer(make_sd3(changes))


@pytest.mark.parametrize(("size", "billions"), [("large", 8.06), ("medium", 2.24)])
def test_parameters_of_the_real_architectures(size, billions):
    """8.1 and 2.5 B are published, with 0.09 and 0.23 B of position table, which is no parameter in diffusers."""
    family = open_family(f"stabilityai/stable-diffusion-3.5-{size}", offline=True)
    network = family.meta_network()
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert network.pos_embed.pos_embed.numel() / 1e9 == pytest.approx({"large": 0.09, "medium": 0.23}[size], abs=0.005)
