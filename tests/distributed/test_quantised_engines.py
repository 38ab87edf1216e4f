"""A quantised base on several processes: the losses and gradient norms of one process, from the same global batches."""

import pytest
from runs import ENGINES, make_tree, run_distributed, train_all

from scfm_core.train.parse import parse_config
from scfm_core.train.trainer import Trainer


def train_each(trees):
    """In a rank: one run after the other."""
    return [train_all(tree) for tree in trees]


def test_two_processes_train_as_one(tiny, tmp_path):
    """Replicas on a base in nf4 and int8, with offloaded blocks, and ZeRO-2 without."""
    changes = {"model__base": "nf4", "method__step_gain": {"gamma": 0.5}, "train__steps": 2}
    one = make_tree(tiny, tmp_path / "one", **changes, train__micro_batch_size=4)
    expected = list(Trainer(parse_config(one, "test")).train_steps())
    cases = {"replicas": {"model__offload_blocks": 2}, "zero2": {}}
    trees = [
        make_tree(tiny, tmp_path / name, **changes, **more, engine=ENGINES[name], train__micro_batch_size=4)
        for name, more in cases.items()
    ]
    by_rank = run_distributed(train_each, 2, trees)
    for number, name in enumerate(cases):
        for rows in by_rank:
            for found, row in zip(rows[number], expected, strict=True):
                for key in ("loss", "grad_norm"):
                    assert found[key] == pytest.approx(row[key], rel=1e-5), name
