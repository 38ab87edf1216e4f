"""The step and the loop on a real tiny Flux."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.encode import EncodeConfig
from data_tools.generate import FIRST_ID, generate
from recipes.runs import load_trained
from recipes.tiny import caption
from scfm_core.data.corpus import Corpus
from scfm_core.data.loader import batches
from scfm_core.distributed.engine import GROUPS
from scfm_core.errors import UserError
from scfm_core.models.families import open_family
from scfm_core.scfm import restart
from scfm_core.scfm.loss import LossMeter
from scfm_core.train import trainer as trainer_module
from scfm_core.train.build import transformer_blocks
from scfm_core.train.checkpoint import checkpoint_path, find_checkpoint, load_checkpoint, verify_checkpoint
from scfm_core.train.trainer import SkippedTooOften, Trainer, fit, learning_rate

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_losses.json"
GOLDEN_METHOD = {"method.step_gain": {"gamma": 0.5}, "method.flow_fraction": 0.1}

# What a run can be: each must train, resume and keep its base.
VARIANTS = {
    "lora": {},
    "step_gain": {"method.step_gain": {"gamma": 0.5}},
    "full": {"train.weights": "full", "method.flow_fraction": 0.25},
    "pretrain": {"train.weights": "full", "method.flow_fraction": 1.0, "method.teacher_fraction": 0.0},
    "step_embedding": {
        "train.weights": "full",
        "method.flow_fraction": 0.5,
        "method.teacher_fraction": 0.0,
        "method.step_embedding": True,
    },
}


def run(config, resume=None, poisoned=()):
    trainer = Trainer(config, resume)
    poison(trainer, poisoned)
    assert fit(trainer) is None
    return trainer, rows_of(trainer, "metrics.jsonl")


def rows_of(trainer, name):
    """Of a file of JSON lines, as any reader takes them: without NaN."""
    lines = (trainer.run_dir / name).read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def poison(trainer, samples):
    """Data: the latents of these global samples are no numbers."""
    encode, bad = trainer.encoder.encode, torch.tensor(sorted(samples), dtype=torch.int64)

    def poisoned(batch):
        latents, cond = encode(batch)
        return latents.masked_fill(torch.isin(batch.sample_ids, bad).view(-1, 1, 1, 1), math.nan), cond

    trainer.encoder.encode = poisoned


def steps_of(*steps):
    """The global samples of these steps, counted from 1, at the tests' batch of eight."""
    return [sample for step in steps for sample in range(8 * step - 8, 8 * step)]


def everything(trainer):
    """Weights, moments and averages, as a checkpoint would hold them, and the optimizer's own count of updates."""
    state = {name: tensor.detach().clone() for name, tensor in trainer.engine.state().items()}
    assert {name.partition(".")[0] for name in state} == set(GROUPS)
    counts = {entry["step"].item() for entry in trainer.engine._optimizer.state.values()}
    return {**state, "updates": torch.tensor(sorted(counts))}


def snapshot(trainer):
    return {
        f"{role}.{name}": tensor.detach().clone()
        for role in ("student", "ema_fast", "ema_slow")
        for name, tensor in trainer.model.parameters(role).items()
    }


def assert_bitwise(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def one_global_batch(config, micro_batch_size):
    """Loss and gradients of the first eight samples."""
    trainer = Trainer(config)
    meter, total = LossMeter("cpu"), 0.0
    for batch in batches(
        trainer.corpus, seed=0, global_batch_size=8, micro_batch_size=micro_batch_size, start=0, stop=8
    ):
        loss = trainer.micro_step(batch, meter)
        (loss * micro_batch_size / 8).backward()
        total += loss.item() * micro_batch_size / 8
    return total, {name: p.grad for name, p in trainer.model.parameters("student").items()}, meter.compute()


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_do_not_change_loss_or_gradients(make_config, variant):
    loss, gradients, slices = one_global_batch(make_config(VARIANTS[variant]), 8)
    for size in (1, 2, 4):
        other_loss, other_gradients, other_slices = one_global_batch(
            make_config({"train.micro_batch_size": size}), size
        )
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_slices == pytest.approx(slices, rel=1e-5)
        scale = max(gradient.abs().max() for gradient in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-5, atol=1e-5 * scale.item())


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_is_bitwise_the_uninterrupted_run(make_config, tmp_path, variant):
    changes = {**VARIANTS[variant], "train.steps": 6, "train.micro_batch_size": 4, "ema.restart_every": 4}
    whole, rows = run(make_config({**changes, "run.dir": str(tmp_path / "whole")}))
    make_config({"run.dir": str(tmp_path / "parts"), "train.steps": 3})
    run(make_config())
    resume = find_checkpoint(tmp_path / "parts")
    assert resume == checkpoint_path(tmp_path / "parts", 3)
    parts, part_rows = run(make_config({"train.steps": 6}), resume)
    assert_bitwise(snapshot(parts), snapshot(whole))
    clock = ("seconds", "samples_per_second", "data_seconds")
    assert [{k: v for k, v in row.items() if k not in clock} for row in part_rows] == [
        {k: v for k, v in row.items() if k not in clock} for row in rows
    ]
    assert [row["step"] for row in part_rows] == [1, 2, 3, 4, 5, 6]


def test_automatic_restarts_resume_bitwise(make_config, tmp_path, monkeypatch):
    """Looked at at every step, with a limit that the ratio of four steps falls below."""
    monkeypatch.setattr(restart, "CHECK_EVERY", 1)
    monkeypatch.setattr(restart, "threshold", lambda config: 0.975)
    changes = {"train.steps": 8, "ema.restart_every": "auto"}
    whole, rows = run(make_config({**changes, "run.dir": str(tmp_path / "whole")}))
    ratios = [row["ema_lag_ratio"] for row in rows]
    assert [row.get("ema_restart", False) for row in rows] == [ratio < 0.975 for ratio in ratios]
    restarts = [row["step"] for row in rows if "ema_restart" in row]
    assert restarts and restarts[0] > 1
    make_config({"run.dir": str(tmp_path / "parts"), "train.steps": restarts[0]})
    run(make_config())
    parts, part_rows = run(make_config({"train.steps": 8}), find_checkpoint(tmp_path / "parts"))
    assert_bitwise(snapshot(parts), snapshot(whole))
    assert [row["ema_lag_ratio"] for row in part_rows] == ratios


@pytest.mark.parametrize("variant", ["lora", "full"])
def test_training_leaves_the_teacher_bitwise_alone_and_moves_the_rest(make_config, variant):
    config = make_config({**VARIANTS[variant], "train.compute_dtype": "bfloat16"})
    trainer = Trainer(config)
    role = "teacher" if variant == "full" else "student"
    frozen = {n: p.detach().clone() for n, p in trainer.model.networks[role].named_parameters() if ".lora_" not in n}
    before = snapshot(trainer)
    assert fit(trainer) is None
    after = dict(trainer.model.networks[role].named_parameters())
    assert frozen
    for name, tensor in frozen.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(after[name], tensor), name
    moved = snapshot(trainer)
    for which in ("student", "ema_fast", "ema_slow"):
        names = [name for name in moved if name.startswith(which)]
        assert all(moved[name].dtype == torch.float32 for name in names)
        assert any(not torch.equal(moved[name], before[name]) for name in names)


def test_emas_move_once_a_step_not_once_a_micro_batch(make_config):
    config = make_config({"train.steps": 1, "train.micro_batch_size": 2, "ema.fast": 0.9})
    trainer = Trainer(config)
    start = snapshot(trainer)
    fit(trainer)
    end = snapshot(trainer)
    for name in trainer.model.parameters("student"):
        expected = 0.9 * start[f"ema_fast.{name}"].double() + 0.1 * end[f"student.{name}"].double()
        torch.testing.assert_close(end[f"ema_fast.{name}"].double(), expected, rtol=1e-6, atol=1e-8)


def test_restart_sets_the_averages_to_the_student(make_config):
    trainer, _ = run(make_config({"train.steps": 4, "ema.restart_every": 4}))
    state = snapshot(trainer)
    for name in trainer.model.parameters("student"):
        assert torch.equal(state[f"ema_slow.{name}"], state[f"student.{name}"])


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_activation_checkpointing_changes_no_gradient(make_config, mode, weights):
    loss, gradients, _ = one_global_batch(make_config({"train.weights": weights}), 8)
    other_loss, other, _ = one_global_batch(make_config({"train.activation_checkpointing": mode}), 8)
    assert other_loss == loss
    assert_bitwise(other, gradients)


def test_full_checkpointing_recomputes_every_block(make_config):
    def forwards(mode):
        config = make_config({"train.activation_checkpointing": mode})
        trainer, count = Trainer(config), 0

        def hook(*_):
            nonlocal count
            count += 1

        blocks = trainer.model.networks["student"].single_transformer_blocks
        for block in blocks:
            # a method, not a hook on __call__: recomputation calls forward again either way
            block.attn.register_forward_pre_hook(hook)
        batch = next(iter(batches(trainer.corpus, seed=0, global_batch_size=8, micro_batch_size=8, start=0, stop=8)))
        trainer.micro_step(batch, LossMeter("cpu")).backward()
        return count / len(blocks)

    assert forwards("none") == 3  # near, far, student
    assert forwards("full") == 4
    assert forwards("selective") == 4


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compiled_blocks_agree(make_config, monkeypatch, checkpointing):
    """Capture, guards on the chosen adapter and the joint graph; inductor itself takes two minutes on two cores."""
    loss, gradients, _ = one_global_batch(make_config(), 8)
    torch._dynamo.reset()
    compile_block, compiled = torch.nn.Module.compile, []

    def compile_without_inductor(module):
        compiled.append(module)
        compile_block(module, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_inductor)
    changes = {"train.compile": True, "train.activation_checkpointing": checkpointing}
    other_loss, other, _ = one_global_batch(make_config(changes), 8)
    assert len(compiled) == 4
    assert other_loss == pytest.approx(loss, rel=1e-5)
    scale = max(gradient.abs().max() for gradient in gradients.values()).item()
    for name, gradient in gradients.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-4 * scale)


def test_losses_are_the_golden_ones(make_config):
    """A refactoring must not move these; after a change of the method, delete the file, run, and explain in the commit."""
    _, rows = run(make_config({"train.steps": 8, **GOLDEN_METHOD}))
    losses = [row["loss"] for row in rows]
    if not GOLDEN.is_file():
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
        pytest.fail(f"wrote {GOLDEN}; look at it and run again")
    # Another CPU may sum in another order.
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-3)


def test_fused_blocks_do_not_move_the_golden_losses(make_config):
    kernels = {"kernels.fused": "reference", "kernels.attention": "math"}
    trainer, rows = run(make_config({"train.steps": 8, **GOLDEN_METHOD, **kernels}))
    blocks = transformer_blocks(trainer.model.networks["student"])
    assert {type(block).__name__ for block in blocks} == {"FusedDoubleBlock", "FusedSingleBlock"}
    assert [row["loss"] for row in rows] == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-3)


def test_kernels_do_not_move_the_losses(make_config, tmp_path):
    """One sample a step: Triton's interpreter takes seconds a forward."""
    small = {"train.steps": 2, "train.global_batch_size": 1, "train.micro_batch_size": 1, **GOLDEN_METHOD}
    _, plain = run(make_config({**small, "run.dir": str(tmp_path / "plain")}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels = {"kernels.fused": "triton", "kernels.attention": "triton", "run.device": device}
    trainer, rows = run(make_config({**small, **kernels}))
    assert (trainer.kernels.fused, trainer.kernels.attention.backend) == ("triton", "triton")
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in plain], rel=1e-4)


def test_fp8_moves_the_target_by_some_per_cent(make_config, tmp_path):
    _, plain = run(make_config({"train.steps": 1, "run.dir": str(tmp_path / "plain")}))
    _, rows = run(make_config({"train.steps": 1, "kernels.fp8": True}))
    assert rows[0]["loss"] != plain[0]["loss"]
    assert rows[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.2)


PATH_GRIDS = {"method.trajectory_grids": [1, 2, 4], "method.step_gain": {"gamma": 0.5}}
ON_PATHS = {**PATH_GRIDS, "method.trajectory_fraction": 1.0, "method.teacher_fraction": 0.0}
AMONG_OTHERS = {
    **PATH_GRIDS,
    "method.trajectory_fraction": 0.4,
    "method.teacher_fraction": 0.2,
    "method.flow_fraction": 0.2,
}


def make_paths(tiny, folder, intervals=4):
    generate(
        [caption(digit) for digit in range(10)],
        folder,
        open_family(str(tiny / "flux")),
        EncodeConfig(text_length=8, keep_padding=True, dtype=torch.float32, samples_per_shard=20),
        sizes=((16, 16),), per_prompt=4, num_steps=4, shift=3.0, guidance=2.0, seed=5, intervals=intervals,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stored_paths(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths") / "cache"
    make_paths(tiny, folder)
    return {"data.path": str(folder), "sample.guidance": 2.0}


class TestTrajectories:
    """Runs on paths of the teacher, alone and among the other slices."""

    @pytest.fixture()
    def paths(self, stored_paths):
        return stored_paths

    @pytest.mark.parametrize("where", ["stored", "taken"])
    @pytest.mark.parametrize("method", ["alone", "among others"])
    def test_resuming_is_bitwise_the_uninterrupted_run(self, make_config, tmp_path, paths, method, where):
        changes = {
            **(ON_PATHS if method == "alone" else AMONG_OTHERS),
            **(paths if where == "stored" else {"method.trajectory_steps": 4}),
            "train.global_batch_size": 16,
            "train.steps": 4,
        }
        whole, rows = run(make_config({**changes, "run.dir": str(tmp_path / "whole")}))
        config = make_config({**changes, "run.dir": str(tmp_path / "cut")})
        first = Trainer(config)
        steps = first.train_steps()
        next(steps), next(steps)
        first.save()
        first.writer.wait()
        other, _ = run(config, find_checkpoint(tmp_path / "cut"))
        assert_bitwise(everything(other), everything(whole))
        slices = {name.removeprefix("loss/") for row in rows for name in row if name.startswith("loss/")}
        expected = {"trajectory"} if method == "alone" else {"trajectory", "flow", "teacher", "self"}
        assert {name for name in slices if not name.startswith("sigma")} == expected

    def test_alone_it_runs_one_pass_a_step(self, make_config, paths):
        trainer = Trainer(make_config({**ON_PATHS, **paths}))
        passes = []
        velocity = trainer.family.velocity
        trainer.family.velocity = lambda *arguments: passes.append(1) or velocity(*arguments)
        next(trainer.train_steps())
        assert len(passes) == 1

    @pytest.mark.parametrize("weights", ["lora", "full"])
    def test_paths_of_the_stored_noise_give_the_stored_losses(self, make_config, tmp_path, monkeypatch, paths, weights):
        """Taken within the training from the noise that the stored ones came from, at their shift and guidance."""
        same = {**ON_PATHS, **paths, "train.weights": weights, "train.steps": 2, "run.seed": 5}
        same |= {} if weights == "lora" else {"method.step_gain": None}
        _, stored = run(make_config(same))
        noise = trainer_module.sample_noise
        numbers = []

        def noise_of_the_paths(latents, sample_ids, seed):
            return noise(latents, torch.tensor(numbers.pop(0)) + FIRST_ID, seed)

        at = {
            "run.dir": str(tmp_path / "taken"),
            "method.trajectory_steps": 4,
            "method.shift": [3.0, 3.0],
            "method.guidance": [2.0, 2.0],
        }
        trainer = Trainer(make_config({**same, **at}))
        monkeypatch.setattr(trainer_module, "sample_noise", noise_of_the_paths)
        encode = trainer.encoder.encode
        trainer.encoder.encode = lambda batch: numbers.append([int(key) for key in batch.keys]) or encode(batch)
        for row, other in zip(trainer.train_steps(), stored, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)

    def test_paths_taken_cost_their_steps(self, make_config):
        trainer = Trainer(make_config({**ON_PATHS, "method.trajectory_steps": 4}))
        passes = []
        velocity = trainer.family.velocity
        trainer.family.velocity = lambda *arguments: passes.append(1) or velocity(*arguments)
        next(trainer.train_steps())
        assert len(passes) == 4 + 1
        assert trainer.config.method.passes(1) == (1, 4)

    def test_captions_of_images_are_enough(self, make_config, tiny):
        images = {"data.path": str(tiny / "digits"), "data.format": "folder", "train.steps": 1}
        _, rows = run(make_config({**ON_PATHS, **images, "method.trajectory_steps": 4}))
        assert math.isfinite(rows[0]["loss"])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"sample.shift": 1.5}, r"taken at shift 3 and guidance 2, but sample\.shift is 1\.5 .*Set both"),
            (
                {"sample.guidance": 3.5},
                r"taken at shift 3 and guidance 2, but .* and sample\.guidance 3\.5: .*Set both",
            ),
        ],
    )
    def test_a_sampler_of_other_settings(self, make_config, paths, change, message):
        with pytest.raises(UserError, match=message):
            Trainer(make_config({**ON_PATHS, **paths, **change}))

    def test_paths_of_another_teacher(self, make_config, tiny, tmp_path, paths):
        folder = tmp_path / "other"
        shutil.copytree(tiny / "flux", folder)
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, weights)
        with pytest.raises(UserError, match=r"were taken by another network \(\w{12}\) than that of .*other"):
            Trainer(make_config({**ON_PATHS, **paths, "model.path": str(folder)}))
        scratch = {"model.init": "random", "train.weights": "full", "method.step_gain": None}
        Trainer(make_config(scratch))  # of that folder it has the architecture alone

    def test_sources_of_different_numbers_of_intervals(self, make_config, tiny, tmp_path, paths):
        make_paths(tiny, tmp_path / "two", intervals=2)
        sources = [{"name": "four", "uri": paths["data.path"]}, {"name": "two", "uri": str(tmp_path / "two")}]
        changes = {**ON_PATHS, **paths, "method.trajectory_grids": [1, 2], "data.path": None, "data.sources": sources}
        with pytest.raises(UserError, match=r"different numbers of intervals, \{'four': 4, 'two': 2\}"):
            Trainer(make_config(changes))

    def test_full_weights_alone_are_held_against_their_teacher(self, make_config, paths):
        changes = {**ON_PATHS, "method.step_gain": None, "train.weights": "full", "train.steps": 1, **paths}
        config = make_config(changes)
        trainer, _ = run(config)
        assert "teacher" not in trainer.model.networks, "training has no pass of it"
        assert "teacher" in load_trained(Path(config.run.dir), config, with_teacher=True).networks

    def test_the_loss_falls(self, make_config, paths):
        changes = {**ON_PATHS, **paths, "train.steps": 30, "train.lr": 3e-3, "train.global_batch_size": 40}
        _, rows = run(make_config({**changes, "train.micro_batch_size": 40, "checkpoint.every": 100}))
        first, last = (sum(row["loss"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
        assert last < 0.8 * first

    def test_grids_that_do_not_lie_on_the_nodes(self, make_config, paths, monkeypatch):
        """Told at the start, with the source's name, and in a step if its first path could not be read."""
        config = make_config({**ON_PATHS, **paths, "method.trajectory_grids": [1, 3]})
        message = (
            r"have 4 intervals, of which method\.trajectory_grids=\[1, 3\] .* Set method\.trajectory_grids=\[1\], or"
        )
        with pytest.raises(UserError, match=rf"paths of source '\w+' {message}"):
            Trainer(config)
        monkeypatch.setattr(Corpus, "first_items", lambda self: {})
        with pytest.raises(UserError, match=f"paths {message}"):
            next(Trainer(config).train_steps())

    def test_data_without_paths(self, make_config, tiny):
        with pytest.raises(UserError, match="scfm data generate --trajectories"):
            next(Trainer(make_config(ON_PATHS)).train_steps())
        images = {"data.path": str(tiny / "digits"), "data.format": "folder"}
        with pytest.raises(UserError, match="the sources are images"):
            Trainer(make_config({**ON_PATHS, **images}))


class TestSkippedSteps:
    """A step that is no number, or a spike, is not applied: it leaves no trace but its row and its incident."""

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("micro_batch_size", [8, 2])
    def test_nothing_changes_but_the_counters(self, make_config, variant, micro_batch_size):
        """One sample of eight is bad, in the second of four micro-batches; averages were due for a restart."""
        changes = {"train.micro_batch_size": micro_batch_size, "ema.restart_every": 2}
        trainer = Trainer(make_config({**VARIANTS[variant], **changes}))
        poison(trainer, [11])
        steps = trainer.train_steps()
        assert "skipped" not in next(steps)
        before = everything(trainer)
        row = next(steps)
        assert_bitwise(everything(trainer), before)
        assert row["skipped"] == "loss is nan"
        assert math.isnan(row["loss"])
        assert row["sample_ids"] == list(range(8, 16))
        assert row["suspects"] == [11]
        progress = trainer.progress
        assert (progress.step, progress.samples, progress.updates) == (2, 16, 1)
        assert "skipped" not in next(steps)
        assert (progress.step, progress.samples, progress.updates) == (3, 24, 2)
        assert not torch.equal(everything(trainer)["updates"], before["updates"])

    @pytest.mark.parametrize("micro_batch_size", [8, 2])
    def test_the_run_goes_on_as_if_the_samples_were_not_there(self, make_config, tmp_path, micro_batch_size):
        """Bitwise: no gradient of the bad step stays behind, and Adam's bias correction counts updates."""
        config = make_config({"train.steps": 4, "train.micro_batch_size": micro_batch_size})
        trainer, _ = run(config, poisoned=[11])
        other = Trainer(make_config({"run.dir": str(tmp_path / "other")}))
        next(other.train_steps())
        other.progress.step, other.progress.samples = 2, 16
        for _ in other.train_steps():
            pass
        assert other.progress.updates == trainer.progress.updates == 3
        assert_bitwise(everything(trainer), everything(other))

    def test_resuming_behind_one_is_bitwise_the_uninterrupted_run(self, make_config, tmp_path):
        """The optimizer has made fewer updates than there were steps."""
        changes = {"train.steps": 5, "train.micro_batch_size": 4, "checkpoint.every": 3}
        whole, rows = run(make_config({**changes, "run.dir": str(tmp_path / "whole")}), poisoned=[11])
        run(make_config({"run.dir": str(tmp_path / "parts"), "train.steps": 3}), poisoned=[11])
        parts, part_rows = run(make_config({"train.steps": 5}), checkpoint_path(tmp_path / "parts", 3), poisoned=[11])
        assert parts.progress.updates == whole.progress.updates == 4
        assert_bitwise(everything(parts), everything(whole))
        assert [row["loss"] for row in part_rows] == [row["loss"] for row in rows]

    @pytest.mark.parametrize("wild", [math.nan, math.inf])
    def test_gradient_alone(self, make_config, monkeypatch, wild):
        """The loss is fine, its derivative is not: a backward can overflow where the forward does not."""
        trainer = Trainer(make_config())
        steps = trainer.train_steps()
        next(steps)
        before = everything(trainer)
        hook = next(iter(trainer.model.parameters("student").values())).register_hook(lambda g: g + wild)
        row = next(steps)
        hook.remove()
        assert_bitwise(everything(trainer), before)
        assert row["skipped"] == f"gradient norm is {wild}"
        assert math.isfinite(row["loss"])
        assert len(row["suspects"]) == 4  # the largest losses
        assert set(row["suspects"]) < set(row["sample_ids"])
        assert "skipped" not in next(steps)

    def test_metrics_and_incidents_tell_of_it(self, make_config, capsys):
        trainer, rows = run(make_config(), poisoned=[11, 13])
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert [row["samples"] for row in rows] == [8, 16, 24, 32]
        assert ["skipped" in row for row in rows] == [False, True, False, False]
        assert (rows[1]["loss"], rows[1]["grad_norm"], rows[1]["skipped"]) == (None, None, "loss is nan")
        assert all(math.isfinite(row["loss"]) for number, row in enumerate(rows) if number != 1)
        (incident,) = rows_of(trainer, "incidents.jsonl")
        assert (incident["event"], incident["step"], incident["skipped"]) == ("skip", 2, "loss is nan")
        assert incident["sample_ids"] == list(range(8, 16))
        assert incident["suspects"] == [11, 13]
        assert "step 2 skipped: loss is nan; samples to look at: [11, 13]" in capsys.readouterr().out
        state = load_checkpoint(find_checkpoint(trainer.run_dir)).state
        assert (state["step"], state["updates"], state["samples"]) == (4, 3, 32)

    def test_without_one_there_is_no_file_of_incidents(self, make_config):
        trainer, _ = run(make_config())
        assert not (trainer.run_dir / "incidents.jsonl").exists()

    def test_spikes(self, make_config):
        """A factor this small makes every loss above the median one; the first twenty steps are applied all the same."""
        trainer = Trainer(make_config({"train.steps": 40, "train.spike_factor": 1.0001, "train.max_skips": 99}))
        skipped, before = [], everything(trainer)
        for row in trainer.train_steps():
            after = everything(trainer)
            same = all(torch.equal(before[name], after[name]) for name in before)
            assert same == ("skipped" in row)
            if "skipped" in row:
                skipped.append(row["step"])
                assert "is more than 1.0001 x" in row["skipped"]
                assert len(row["suspects"]) == 4
            before = after
        assert skipped
        assert min(skipped) > 20
        assert trainer.progress.updates == 40 - len(skipped)

    def test_spikes_are_applied_without_a_factor(self, make_config):
        _, rows = run(make_config({"train.steps": 24, "train.spike_factor": None}))
        assert not any("skipped" in row for row in rows)

    def test_suspects_of_a_spike_are_its_largest_losses(self, make_config):
        config = make_config({"train.steps": 1})
        trainer = Trainer(config)
        meter = LossMeter("cpu")
        for batch in batches(trainer.corpus, seed=0, global_batch_size=8, micro_batch_size=2, start=0, stop=8):
            trainer.micro_step(batch, meter)
        losses = dict(meter.by_sample())
        assert sorted(losses) == list(range(8))
        assert sum(losses.values()) / 8 == pytest.approx(meter.compute()["loss"])
        assert trainer._suspects(meter) == sorted(losses, key=losses.get, reverse=True)[:4]


ROLLING = {"train.steps": 8, "train.max_skips": 1, "checkpoint.every": 2, "checkpoint.keep": 9}


class TestRollback:
    """More skipped steps in a row than are borne: back to the checkpoint before them, and on with the data behind."""

    def test_the_trainer_says_so_after_the_row(self, make_config):
        trainer = Trainer(make_config({**ROLLING, "train.max_skips": 2}))
        poison(trainer, steps_of(2, 3, 4))
        steps, rows = trainer.train_steps(), []
        with pytest.raises(SkippedTooOften):
            rows.extend(steps)
        assert [row["step"] for row in rows] == [1, 2, 3, 4]

    def test_weights_are_those_before_and_the_data_those_behind(self, make_config, tmp_path):
        trainer, rows = run(make_config(ROLLING), poisoned=steps_of(4, 5))
        assert [row["step"] for row in rows] == list(range(1, 9))
        assert not any("skipped" in row for row in rows)
        # Steps 3 to 8 were done with what would have been the samples of steps 6 to 11.
        assert [row["samples"] for row in rows] == [8, 16, 48, 56, 64, 72, 80, 88]
        assert (trainer.progress.rollbacks, trainer.progress.updates) == (1, 8)
        assert trainer.guard.first_skipped is None

        other = Trainer(make_config({"run.dir": str(tmp_path / "other")}))
        for row in other.train_steps():
            if row["step"] == 2:
                break
        other.progress.samples = 40
        assert [row["loss"] for row in other.train_steps()] == [row["loss"] for row in rows[2:]]
        assert_bitwise(everything(trainer), everything(other))

    def test_incidents_stay_on_record(self, make_config):
        trainer, _ = run(make_config(ROLLING), poisoned=steps_of(4, 5))
        incidents = rows_of(trainer, "incidents.jsonl")
        rollback = incidents[-1]
        assert [(row["event"], row.get("step")) for row in incidents] == [("skip", 4), ("skip", 5), ("rollback", None)]
        assert (rollback["from_step"], rollback["to_step"], rollback["next_sample"]) == (5, 2, 40)
        assert "2 steps in a row, 4 to 5, could not be applied" in rollback["reason"]

    def test_a_row_that_is_borne_is_none(self, make_config):
        trainer, rows = run(make_config({**ROLLING, "train.max_skips": 2}), poisoned=steps_of(3, 4, 6, 7))
        assert trainer.progress.rollbacks == 0
        assert [row["step"] for row in rows if "skipped" in row] == [3, 4, 6, 7]

    def test_a_second_time_ends_the_run(self, make_config):
        """The first rollback leads to step 2 and sample 40; steps 7 and 8 of the second attempt are bad again."""
        trainer = Trainer(make_config(ROLLING))
        poison(trainer, [*steps_of(4, 5), *range(72, 88)])
        with pytest.raises(UserError) as caught:
            fit(trainer)
        message = str(caught.value)
        assert "2 steps in a row, 7 to 8, could not be applied, and the run has gone back 1 times already" in message
        assert f"{trainer.run_dir / 'incidents.jsonl'} names the reasons and the samples" in message
        assert "lower train.lr or train.clip_norm, or raise train.max_skips" in message
        events = [row["event"] for row in rows_of(trainer, "incidents.jsonl")]
        assert events == ["skip", "skip", "rollback", "skip", "skip"]

    def test_as_often_as_is_allowed(self, make_config):
        config = make_config({**ROLLING, "train.max_rollbacks": 2})
        trainer, rows = run(config, poisoned=[*steps_of(4, 5), *range(72, 88)])
        assert trainer.progress.rollbacks == 2
        assert [row["step"] for row in rows] == list(range(1, 9))

    def test_never_if_none_is_allowed(self, make_config):
        trainer = Trainer(make_config({**ROLLING, "train.max_rollbacks": 0}))
        poison(trainer, steps_of(4, 5))
        with pytest.raises(UserError, match="the run has gone back 0 times already"):
            fit(trainer)

    def test_without_a_checkpoint_before_the_row(self, make_config):
        trainer = Trainer(make_config(ROLLING))
        poison(trainer, steps_of(2, 3))
        with pytest.raises(
            UserError, match=r"2 steps in a row, 2 to 3, .* there is no checkpoint from before to go back"
        ):
            fit(trainer)
        assert [row["step"] for row in rows_of(trainer, "metrics.jsonl")] == [1, 2, 3]

    def test_a_checkpoint_within_the_row_is_not_gone_back_to(self, make_config):
        """It would be as bad as what followed; nor may it push out the one before."""
        changes = {"checkpoint.every": 1, "checkpoint.keep": 2, "train.max_skips": 3}
        trainer, rows = run(make_config({**ROLLING, **changes}), poisoned=steps_of(4, 5, 6, 7))
        assert rows_of(trainer, "incidents.jsonl")[-1]["to_step"] == 3
        assert [row["step"] for row in rows] == list(range(1, 9))

    @pytest.mark.parametrize("stopped_at", [4, 5])
    def test_resumed_within_the_row_it_happens_all_the_same(self, make_config, tmp_path, stopped_at):
        """The row's length and beginning are in the checkpoint."""
        bad = steps_of(4, 5, 6)
        changes = {**ROLLING, "train.max_skips": 2, "checkpoint.every": 1}
        whole, rows = run(make_config({**changes, "run.dir": str(tmp_path / "whole")}), poisoned=bad)
        run(make_config({"run.dir": str(tmp_path / "parts"), "train.steps": stopped_at}), poisoned=bad)
        resume = find_checkpoint(tmp_path / "parts")
        assert resume == checkpoint_path(tmp_path / "parts", stopped_at)
        parts, part_rows = run(make_config({"train.steps": 8}), resume, poisoned=bad)
        assert whole.progress.rollbacks == parts.progress.rollbacks == 1
        assert_bitwise(everything(parts), everything(whole))
        assert [(row["step"], row["loss"]) for row in part_rows] == [(row["step"], row["loss"]) for row in rows]

    def test_resumed_after_it_the_run_remembers(self, make_config):
        """Neither the samples that are left out nor the number of rollbacks is forgotten."""
        config = make_config({**ROLLING, "train.steps": 4})
        run(config, poisoned=steps_of(3, 4))
        trainer = Trainer(make_config({"train.steps": 8}), find_checkpoint(Path(config.run.dir)))
        assert (trainer.progress.step, trainer.progress.samples, trainer.progress.rollbacks) == (4, 48, 1)
        poison(trainer, range(48, 64))
        with pytest.raises(UserError, match="has gone back 1 times already"):
            fit(trainer)

    def test_checkpoints_are_whole_afterwards(self, make_config):
        trainer, _ = run(make_config(ROLLING), poisoned=steps_of(4, 5))
        folder = trainer.run_dir / "checkpoints"
        assert (folder / "latest").read_text() == "step_00000008"
        names = sorted(path.name for path in folder.glob("step_*"))
        assert names == [f"step_{step:08d}" for step in (2, 4, 6, 8)]
        for name in names:
            verify_checkpoint(folder / name)
        assert load_checkpoint(folder / "step_00000004").state["samples"] == 56  # of the second attempt


def test_learning_rate_schedules(make_config):
    train = make_config({"train.steps": 100, "train.warmup_steps": 10, "train.lr": 1.0}).train
    assert [learning_rate(train, step) for step in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    train = make_config({"train.lr_schedule": "cosine"}).train
    assert learning_rate(train, 10) == 1
    assert learning_rate(train, 55) == pytest.approx(0.5)
    assert learning_rate(train, 99) < 0.001


def test_frozen_base_stays_out_of_the_checkpoint(make_config):
    trainer, _ = run(make_config())
    checkpoint = load_checkpoint(find_checkpoint(trainer.run_dir))
    reader = checkpoint.reader
    assert {key.partition(".")[0] for key in reader.shapes} == set(GROUPS)
    assert all(".lora_" in key for key in reader.shapes)
    trained = trainer.model.parameters("student")
    assert checkpoint.state["shapes"] == {name: list(parameter.shape) for name, parameter in trained.items()}
    assert len(reader.shapes) == len(GROUPS) * len(trained)
    # DCP's own index is a pickle, which is read with a list of what it may hold (tests/distributed/test_reader.py).
    files = {path.relative_to(checkpoint.path).as_posix() for path in checkpoint.path.rglob("*") if path.is_file()}
    assert files == {"state.json", "manifest.json", "dcp/.metadata", "dcp/__0_0.distcp"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": 2}, r"lora.rank: 4 there, 2 now"),
        ({"run.seed": 7}, r"run.seed: 0 there, 7 now"),
        ({"ema.slow": 0.99}, r"another recipe"),
        ({"data.format": "folder"}, r"another recipe|other data"),
    ],
)
def test_another_recipe_is_refused(make_config, tiny, changes, message):
    trainer, _ = run(make_config())
    if "data.format" in changes:
        changes = {**changes, "data.path": str(tiny / "digits")}
    with pytest.raises(UserError, match=message):
        Trainer(make_config(changes), find_checkpoint(trainer.run_dir))


@pytest.mark.processes
def test_what_does_not_change_the_result_may_change_on_resuming(make_config):
    trainer, _ = run(make_config({"train.steps": 2}))
    changes = {"train.steps": 3, "train.micro_batch_size": 2, "checkpoint.every": 7, "data.num_workers": 1}
    resumed, rows = run(make_config(changes), find_checkpoint(trainer.run_dir))
    assert resumed.progress.step == 3
    assert len(rows) == 3


def test_images_encoded_on_the_fly_train_like_their_cache(make_config, tiny):
    _, cached = run(make_config())
    config = make_config({"data.format": "folder", "data.path": str(tiny / "digits"), "run.dir": str(tiny / "fly")})
    _, on_the_fly = run(config)
    assert [row["loss"] for row in on_the_fly] == pytest.approx([row["loss"] for row in cached], rel=1e-5)


def test_validation_grid_is_drawn_at_its_interval_and_from_fixed_seeds(make_config):
    prompts = ["a handwritten digit one", "a handwritten digit two", "a handwritten digit six"]
    config = make_config(
        {"sample.every": 2, "sample.prompts": prompts, "sample.steps": [1, 2], "train.micro_batch_size": 2}
    )
    trainer, _ = run(config)
    grids = sorted(path.name for path in (trainer.run_dir / "samples").glob("*.png"))
    assert grids == ["step_00000002.png", "step_00000004.png"]
    first = (trainer.run_dir / "samples" / grids[1]).read_bytes()
    assert trainer.validation.grid(trainer).read_bytes() == first


@pytest.mark.parametrize("variant", ["step_gain", "full"])
def test_the_distance_to_the_teacher_is_written_beside_the_grid(make_config, variant):
    """Nothing at first, when the student is its teacher; something once it has learned; the same again from its noise."""
    prompts = ["a handwritten digit one", "a handwritten digit two", "a handwritten digit six"]
    settings = {"sample.every": 2, "sample.prompts": prompts, "sample.steps": [1, 4], "sample.teacher_steps": 4}
    config = make_config({**VARIANTS[variant], **settings, "train.micro_batch_size": 2, "train.lr": 1e-2})
    untrained = Trainer(config)
    apart = json.loads(untrained.validation.grid(untrained).with_suffix(".json").read_text())["mse_teacher"]
    assert apart.keys() == {"1", "4"} and apart["4"] == 0 < apart["1"]
    trainer, _ = run(config)
    files = sorted(path.name for path in (trainer.run_dir / "samples").glob("*.json"))
    assert files == ["step_00000000.json", "step_00000002.json", "step_00000004.json"]
    last = json.loads((trainer.run_dir / "samples" / files[-1]).read_text())["mse_teacher"]
    assert last["4"] > 0 and last["1"] != apart["1"]
    again = json.loads(trainer.validation.grid(trainer).with_suffix(".json").read_text())["mse_teacher"]
    assert again == last


def test_a_run_from_scratch_has_no_teacher_to_compare_with(make_config):
    with pytest.raises(UserError, match=r"sample\.teacher_steps needs a teacher"):
        make_config({**VARIANTS["pretrain"], "sample.teacher_steps": 4})
