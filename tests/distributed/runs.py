"""Small runs on several processes, as functions that a test hands to `run_distributed`."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from launch import run_distributed

ENGINES: dict[str, dict[str, Any]] = {
    "replicas": {"shard": 1},
    "fsdp2": {},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
    # Before it releases a module's weights, ZeRO-3 looks for their next use within a billion weights: in the whole step of a tiny
    # network, for each of its modules again. That was up to half of the time of these tests.
    "zero3": {"name": "deepspeed", "zero_stage": 3, "deepspeed_config": str(Path(__file__).with_name("zero3.json"))},
}

# One linear of each kind that Flux and SD3 have: of the sample as a whole, of the last layer, of an attention, of both kinds
# of blocks. A rank's time grows with the number of sharded tensors, not with their size.
FEW_TARGETS = (
    r"time_text_embed\.timestep_embedder\.linear_1|proj_out|transformer_blocks\.0\.(attn\.to_q|ff\.net\.2)|"
    r"single_transformer_blocks\.0\.proj_mlp"
)
ALL_TARGETS = ".*"


def make_tree(tiny: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """The smallest complete configuration as plain values; `changes` as `section__key=value`."""
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir), "device": "cpu"},
        "model": {"path": str(tiny / "flux"), "text_length": 8},
        "data": {"path": str(tiny / "cache"), "resolution": [16, 16], "num_workers": 0},
        "method": {"self_grids": [16, 8, 4, 2]},
        "lora": {"rank": 4, "alpha": 4.0, "targets": FEW_TARGETS},
        "train": {
            "steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "lr": 1e-3,
            "compute_dtype": "float32",
        },
        "engine": {"timeout": 60.0},
        "checkpoint": {"every": 2},
        "sample": {"every": 0},
        "wandb": {"mode": "disabled"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree.setdefault(section, {}).update(value)
    return tree


def joined_trainer(tree: dict[str, Any]) -> Any:
    """In a rank: the world and a trainer in it; a context manager."""
    import contextlib

    from scfm_core.distributed.world import join_world
    from scfm_core.train.checkpoint import find_checkpoint
    from scfm_core.train.parse import parse_config
    from scfm_core.train.trainer import Trainer

    @contextlib.contextmanager
    def make() -> Any:
        config = parse_config(tree, "test")
        needs_group = config.engine.name == "deepspeed" or config.checkpoint.asynchronous
        with join_world(torch.device("cpu"), config.engine.timeout, always=needs_group) as world:
            yield Trainer(config, find_checkpoint(Path(config.run.dir), world=world), world)

    return make()


def train_all(tree: dict[str, Any], *save_after: int) -> list[dict[str, Any]]:
    """In a rank: resume, run to the end, save after the given steps and the last; the rows of this start."""
    with joined_trainer(tree) as trainer:
        rows = []
        for row in trainer.train_steps():
            rows.append(row)
            if row["step"] in save_after:
                trainer.state.save()
        trainer.state.save()
        trainer.state.wait()
        return rows


def train_cli(tree: dict[str, Any], *arguments: str) -> int:
    """In a rank: `scfm train` with this configuration; its exit code."""
    import yaml

    from recipes.cli import main

    path = Path(f"{tree['run']['dir']}.rank{os.environ['RANK']}.yaml")
    path.write_text(yaml.safe_dump(tree))
    return main(["train", str(path), *arguments])


def tensors(run_dir: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Everything that the newest (or a given) checkpoint of a run holds."""
    from scfm_core.train.checkpoint import find_checkpoint, load_checkpoint
    from scfm_core.train.run_dir import checkpoint_path

    path = checkpoint_path(run_dir, step) if step is not None else find_checkpoint(run_dir)
    assert path is not None
    reader = load_checkpoint(path).reader
    return {key: reader.tensor(key).clone() for key in reader.shapes}


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], group: str) -> float:
    """||left - right|| / ||right|| over all tensors of a group."""
    assert left.keys() == right.keys()
    keys = [key for key in right if key.startswith(f"{group}.")]
    difference = sum(float((left[key] - right[key]).double().square().sum()) for key in keys)
    return float((difference / sum(float(right[key].double().square().sum()) for key in keys)) ** 0.5)


def rows_of(run_dir: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl` or `incidents.jsonl`; none if there is no such file."""
    path = run_dir / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# Faults within a step. All that knows how a step is made is here.


def at_student_passes(
    tree: dict[str, Any], rank: int | None, hook: Callable[[int], Callable[[torch.Tensor], torch.Tensor] | None]
) -> None:
    """In a rank: call `hook(attempt)` before each pass of the student, on `rank` alone or (None) on all.

    Attempts at steps are counted from 1, those after a rollback too. What the hook returns, if anything, changes the
    student's velocity.
    """
    from scfm_core.models.student import FullModel, LoRAModel

    if rank not in (None, int(os.environ["RANK"])):
        return
    train, passes = tree["train"], 0
    micro_batches = train["global_batch_size"] // (train["micro_batch_size"] * int(os.environ["WORLD_SIZE"]))

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def student_velocity(*arguments: Any) -> Any:
            nonlocal passes
            change = hook(1 + passes // micro_batches)
            passes += 1
            velocity = original(*arguments)
            return velocity if change is None else change(velocity)

        return student_velocity

    for model in (LoRAModel, FullModel):
        model.student_velocity = wrapped(model.student_velocity)  # type: ignore[method-assign]


def scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change of a velocity: the loss and its gradient change with it."""
    return lambda velocity: velocity * factor


def with_nan_gradient(velocity: torch.Tensor) -> torch.Tensor:
    """A change of a velocity: the loss stays as it is."""
    velocity.register_hook(lambda gradient: gradient * float("nan"))
    return velocity


def as_after_steps(trainer: Any, losses: list[float]) -> None:
    """In a rank: the guard remembers these losses of applied steps."""
    trainer.state.guard.load_state_dict({**trainer.state.guard.state_dict(), "recent": losses})


__all__ = [
    "ALL_TARGETS",
    "ENGINES",
    "FEW_TARGETS",
    "as_after_steps",
    "at_student_passes",
    "distance",
    "joined_trainer",
    "make_tree",
    "rows_of",
    "run_distributed",
    "scaled",
    "tensors",
    "train_all",
    "train_cli",
    "with_nan_gradient",
]
