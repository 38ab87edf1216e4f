"""A fault on one rank: one decision for all, taken before anything is changed, on every engine."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ENGINES, joined_trainer, make_tree, run_distributed, train_cli


def spoil(trainer: Any, faults: dict[int, float], rank: int) -> None:
    """Multiply the loss of `rank` in these steps, in value and gradient; NaN makes it NaN."""
    plain = trainer.micro_step

    def micro_step(batch: Any, meter: Any) -> torch.Tensor:
        loss = plain(batch, meter)
        step = trainer.progress.step + 1
        if step in faults and trainer.world.rank == rank:
            loss = loss * faults[step]
            meter.sums[0].mul_(faults[step])
            meter._samples[-1] = (meter._samples[-1][0], meter._samples[-1][1] * faults[step])
        return loss

    trainer.micro_step = micro_step


def state_of(trainer: Any) -> dict[str, Any]:
    return {key: slot.local.detach().clone() for key, slot in trainer.engine.slots().items()}


def run_with_faults(tree: dict[str, Any]) -> dict[str, Any]:
    """In a rank: NaN on rank 1 in step 3, a jump on rank 0 in step 5; what changed in each step."""
    with joined_trainer(tree) as trainer:
        spoil(trainer, {3: math.nan}, rank=1)
        spoil(trainer, {5: 1e4}, rank=0)
        trainer.guard._recent.extend([0.5] * 30)  # as after thirty steps
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
    tree = make_tree(tiny, tmp_path / "run", engine=ENGINES[name], train__steps=6, train__weights=weights)
    results = run_distributed(run_with_faults, 2, tree)
    for result in results:
        rows = result["rows"]
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert ["skipped" in row for row in rows] == [False, False, True, False, True, False]
        assert "nan" in rows[2]["skipped"] and "10 x" in rows[4]["skipped"]
        assert rows[2]["sample_ids"] == list(range(16, 24)) and rows[4]["sample_ids"] == list(range(32, 40))
        # Rank 0 has the first half of each global batch, rank 1 the second.
        assert rows[2]["suspects"] == [20, 21, 22, 23]
        assert set(rows[4]["suspects"]) <= {32, 33, 34, 35}
        assert [row["samples"] for row in rows] == [8, 16, 24, 32, 40, 48]
        everything = ["ema_fast", "ema_slow", "exp_avg", "exp_avg_sq", "student"]
        assert result["changed"] == [everything, everything, [], everything, [], everything]
        assert (result["updates"], result["samples"]) == (4, 48)
    left, right = (
        [{k: v for k, v in row.items() if "second" not in k} for row in result["rows"]] for result in results
    )
    assert json.dumps(left) == json.dumps(right)


def roll_back_run(tree: dict[str, Any]) -> Any:
    """In a rank: the command line, with steps 5 to 8 spoilt on rank 1 at their first attempt."""
    from scfm_core.train import trainer as module

    original = module.Trainer.__init__

    def patched(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        plain, spoilt = self.micro_step, range(32, 32 + 8 * 3)

        def micro_step(batch: Any, meter: Any) -> torch.Tensor:
            loss = plain(batch, meter)
            bad = bool(((batch.sample_ids >= spoilt.start) & (batch.sample_ids < spoilt.stop)).any())
            return loss * math.nan if bad and self.world.rank == 1 else loss

        self.micro_step = micro_step

    module.Trainer.__init__ = patched  # type: ignore[method-assign]
    return train_cli(tree)


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_too_many_skips_roll_back_to_before_the_fault(name, tiny, tmp_path):
    """Samples 32..55 are bad: steps 5, 6 and 7 are skipped, the run returns to step 4 and goes on with sample 56."""
    run_dir = tmp_path / "run"
    tree = make_tree(tiny, run_dir, engine={**ENGINES[name], "timeout": 60.0}, train__steps=8, train__max_skips=2)
    assert run_distributed(roll_back_run, 2, tree) == [0, 0]
    incidents = [json.loads(line) for line in (run_dir / "incidents.jsonl").read_text().splitlines()]
    assert [(i["event"], i.get("step")) for i in incidents] == [
        ("skip", 5),
        ("skip", 6),
        ("skip", 7),
        ("rollback", None),
    ]
    assert incidents[0]["sample_ids"] == list(range(32, 40)) and "gradient norm is nan" in incidents[0]["skipped"]
    assert (incidents[3]["from_step"], incidents[3]["to_step"], incidents[3]["next_sample"]) == (7, 4, 56)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["samples"] for row in rows[4:]] == [64, 72, 80, 88]
    assert not any("skipped" in row for row in rows)
    state = json.loads((sorted((run_dir / "checkpoints").glob("step_*"))[-1] / "state.json").read_text())
    assert (state["step"], state["updates"], state["samples"], state["rollbacks"]) == (8, 8, 88, 1)


def all_bad(tree: dict[str, Any]) -> Any:
    from scfm_core.train import trainer as module

    plain = module.Trainer.micro_step
    module.Trainer.micro_step = lambda self, batch, meter: plain(self, batch, meter) * math.nan  # type: ignore[method-assign]
    return train_cli(tree)


def test_a_run_that_cannot_go_on_ends_on_every_rank(tiny, tmp_path):
    tree = make_tree(tiny, tmp_path / "run", train__steps=8, train__max_skips=1, checkpoint__every=100)
    outcomes = run_distributed(all_bad, 2, tree, expect_failure=True)
    assert [outcome.value for outcome in outcomes] == [2, 2]
    assert "2 consecutive steps, 1 to 2, were skipped, and there is no checkpoint from before" in outcomes[0].output
    assert "incidents.jsonl" in outcomes[0].output
    assert "scfm: error" not in outcomes[1].output, "one rank speaks for all"
    assert not list(Path(tmp_path / "run").glob("checkpoints/step_*"))
