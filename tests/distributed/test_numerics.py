"""A fault on one rank: one decision for all, taken before anything is changed, on every engine."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    ENGINES,
    as_after_steps,
    at_student_passes,
    joined_trainer,
    make_tree,
    rows_of,
    run_distributed,
    scaled,
    train_cli,
    with_nan_gradient,
)


def state_of(trainer: Any) -> dict[str, Any]:
    return {key: slot.local.detach().clone() for key, slot in trainer.engine.slots().items()}


def run_with_faults(tree: dict[str, Any]) -> dict[str, Any]:
    """In a rank: NaN on rank 1 in step 2, a jump on rank 0 in step 4; what changed in each step."""
    at_student_passes(tree, 1, {2: scaled(math.nan)}.get)
    at_student_passes(tree, 0, {4: scaled(1000.0)}.get)
    with joined_trainer(tree) as trainer:
        as_after_steps(trainer, [0.5] * 30)
        before, changed, rows = state_of(trainer), [], []
        for row in trainer.train_steps():
            after = state_of(trainer)
            changed.append(sorted({k.partition(".")[0] for k in after if not torch.equal(before[k], after[k])}))
            before = after
            rows.append(row)
        return {
            "rows": rows,
            "changed": changed,
            "updates": trainer.progress.updates,
            "samples": trainer.progress.samples,
        }


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("replicas", "lora"),
        ("fsdp2", "lora"),
        ("fsdp2", "full"),
        ("zero1", "full"),
        ("zero2", "lora"),
        ("zero3", "full"),
    ],
)
def test_a_fault_on_one_rank_is_skipped_by_all(name, weights, tiny, tmp_path):
    tree = make_tree(tiny, tmp_path / "run", engine=ENGINES[name], train__steps=4, train__weights=weights)
    results = run_distributed(run_with_faults, 2, tree)
    for result in results:
        rows = result["rows"]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert ["skipped" in row for row in rows] == [False, True, False, True]
        assert "nan" in rows[1]["skipped"] and "10 x" in rows[3]["skipped"]
        assert rows[1]["sample_ids"] == list(range(8, 16)) and rows[3]["sample_ids"] == list(range(24, 32))
        # Rank 0 has the first half of each global batch, rank 1 the second.
        assert rows[1]["suspects"] == [12, 13, 14, 15]
        assert set(rows[3]["suspects"]) == {24, 25, 26, 27}
        assert [row["samples"] for row in rows] == [8, 16, 24, 32]
        everything = ["ema_fast", "ema_slow", "exp_avg", "exp_avg_sq", "student"]
        assert result["changed"] == [everything, [], everything, []]
        assert (result["updates"], result["samples"]) == (2, 32)
    left, right = (
        [{k: v for k, v in row.items() if "second" not in k} for row in result["rows"]] for result in results
    )
    assert json.dumps(left) == json.dumps(right)


def roll_back_run(tree: dict[str, Any]) -> Any:
    """In a rank: the command line, with steps 3 and 4 spoilt on rank 1 at their first attempt."""
    at_student_passes(tree, 1, {3: with_nan_gradient, 4: with_nan_gradient}.get)
    return train_cli(tree)


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_too_many_skips_roll_back_to_before_the_fault(name, tiny, tmp_path):
    """Samples 16..31 are bad: steps 3 and 4 are skipped, the run returns to step 2 and continues with sample 32."""
    run_dir = tmp_path / "run"
    tree = make_tree(tiny, run_dir, engine=ENGINES[name], train__steps=4, train__max_skips=1)
    assert run_distributed(roll_back_run, 2, tree) == [0, 0]
    incidents = rows_of(run_dir, "incidents")
    assert [(i["event"], i.get("step")) for i in incidents] == [("skip", 3), ("skip", 4), ("rollback", None)]
    assert incidents[0]["sample_ids"] == list(range(16, 24)) and "gradient norm is nan" in incidents[0]["skipped"]
    assert (incidents[2]["from_step"], incidents[2]["to_step"], incidents[2]["next_sample"]) == (4, 2, 32)
    rows = rows_of(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["samples"] for row in rows] == [8, 16, 40, 48]
    assert not any("skipped" in row for row in rows)
    state = json.loads((sorted((run_dir / "checkpoints").glob("step_*"))[-1] / "state.json").read_text())
    assert (state["step"], state["updates"], state["samples"], state["rollbacks"]) == (4, 4, 48, 1)


def all_bad(tree: dict[str, Any]) -> Any:
    at_student_passes(tree, None, lambda attempt: scaled(math.nan))
    return train_cli(tree)


def test_a_run_that_cannot_go_on_ends_on_every_rank(tiny, tmp_path):
    tree = make_tree(tiny, tmp_path / "run", train__steps=8, train__max_skips=1, checkpoint__every=100)
    outcomes = run_distributed(all_bad, 2, tree, expect_failure=True)
    assert [outcome.value for outcome in outcomes] == [2, 2]
    assert "2 consecutive steps, 1 to 2, were skipped, and there is no checkpoint from before" in outcomes[0].output
    assert "incidents.jsonl" in outcomes[0].output
    assert "scfm: error" not in outcomes[1].output, "one rank speaks for all"
    assert not list(Path(tmp_path / "run").glob("checkpoints/step_*"))


def ranks_of_the_norm(tree: dict[str, Any]) -> list[int]:
    """In a rank: over how many ranks each all-reduce of a scalar goes, in the engine's part of a step."""
    import torch.distributed as dist

    found, all_reduce = [], dist.all_reduce

    def recorded(tensor: torch.Tensor, *arguments: Any, group: Any = None, **options: Any) -> Any:
        if tensor.numel() == 1:
            found.append(dist.get_world_size(group))
        return all_reduce(tensor, *arguments, group=group, **options)

    with joined_trainer(tree) as trainer:
        dist.all_reduce = recorded
        next(trainer.train_steps())
    return found


def test_replicas_clip_by_the_same_bits(tiny, tmp_path):
    """A norm that each group of shards sums on its own may differ in the last bit; the replicas would drift apart."""
    tree = make_tree(tiny, tmp_path / "run", engine={"shard": 2}, train__steps=1)
    assert run_distributed(ranks_of_the_norm, 4, tree) == [[4]] * 4
