"""The step and the loop on a real tiny Flux."""

import json
import math
from pathlib import Path

import pytest
import torch

from scfm_core.data.loader import batches
from scfm_core.distributed.engine import NonFiniteGradient
from scfm_core.errors import UserError
from scfm_core.scfm.loss import LossMeter
from scfm_core.train.checkpoint import checkpoint_path, find_checkpoint, load_checkpoint
from scfm_core.train.trainer import Trainer, fit, learning_rate

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_losses.json"

# What a run can be: each must train, resume and keep its base.
VARIANTS = {
    "lora": {},
    "step_gain": {"method.step_gain": {"gamma": 0.5}},
    "full": {"train.weights": "full", "method.flow_fraction": 0.25},
    "pretrain": {"train.weights": "full", "method.flow_fraction": 1.0, "method.teacher_fraction": 0.0},
}


def run(config, resume=None):
    trainer = Trainer(config, resume)
    assert fit(trainer) is None
    return trainer, [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]


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
    for batch in batches(trainer.dataset, config.data, seed=0, micro_batch_size=micro_batch_size, start=0, stop=8):
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
    clock = ("seconds", "samples_per_second")
    assert [{k: v for k, v in row.items() if k not in clock} for row in part_rows] == [
        {k: v for k, v in row.items() if k not in clock} for row in rows
    ]
    assert [row["step"] for row in part_rows] == [1, 2, 3, 4, 5, 6]


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
        batch = next(iter(batches(trainer.dataset, config.data, seed=0, micro_batch_size=8, start=0, stop=8)))
        trainer.micro_step(batch, LossMeter("cpu")).backward()
        return count / len(blocks)

    assert forwards("none") == 3  # near, far, student
    assert forwards("full") == 4
    assert forwards("selective") == 4


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
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
    _, rows = run(make_config({"train.steps": 8, "method.step_gain": {"gamma": 0.5}, "method.flow_fraction": 0.1}))
    losses = [row["loss"] for row in rows]
    if not GOLDEN.is_file():
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
        pytest.fail(f"wrote {GOLDEN}; look at it and run again")
    # Another CPU may sum in another order.
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-3)


def test_a_wild_gradient_stops_before_anything_changes(make_config, monkeypatch):
    trainer = Trainer(make_config({"train.steps": 3, "checkpoint.every": 1}))
    steps = iter(trainer.train_steps())
    next(steps)
    before = snapshot(trainer)
    next(iter(trainer.model.parameters("student").values())).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        UserError, match=r"step 2 stopped: .*samples are 8\.\.\.15; weights and EMAs are as after step 1"
    ):
        next(steps)
    assert_bitwise(snapshot(trainer), before)
    assert issubclass(NonFiniteGradient, RuntimeError)


def test_learning_rate_schedules(make_config):
    train = make_config({"train.steps": 100, "train.warmup_steps": 10, "train.lr": 1.0}).train
    assert [learning_rate(train, step) for step in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    train = make_config({"train.lr_schedule": "cosine"}).train
    assert learning_rate(train, 10) == 1
    assert learning_rate(train, 55) == pytest.approx(0.5)
    assert learning_rate(train, 99) < 0.001


def test_frozen_base_and_pickles_stay_out_of_the_checkpoint(make_config):
    trainer, _ = run(make_config())
    checkpoint = load_checkpoint(find_checkpoint(trainer.run_dir))
    assert checkpoint.tensors.keys() == {"student", "ema_fast", "ema_slow", "optimizer"}
    assert all(".lora_" in name for group in checkpoint.tensors.values() for name in group)
    assert {path.suffix for path in checkpoint.path.iterdir()} == {".safetensors", ".json"}


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
