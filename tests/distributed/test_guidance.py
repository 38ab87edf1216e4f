"""Guidance in two passes, and its distillation, where networks are sharded: the losses of one process."""

import pytest
from runs import ENGINES, make_tree, run_distributed, train_all

DISTIL = {"distil_guidance": True, "teacher_fraction": 0.0, "flow_fraction": 1.0, "guidance": [4.0, 4.0]}
METHODS = {"distil": DISTIL, "guided": {"guidance": [3.5, 5.0]}}


@pytest.fixture(scope="module")
def alone():
    """(method, weights) -> the rows of one process."""
    known = {}

    def get(method, weights, tree):
        if (method, weights) not in known:
            [known[method, weights]] = run_distributed(train_all, 1, tree)
        return known[method, weights]

    return get


@pytest.mark.parametrize(
    ("method", "name", "weights"),
    [
        ("distil", "fsdp2", "lora"),
        ("distil", "fsdp2", "full"),
        ("distil", "zero3", "lora"),
        ("guided", "zero3", "full"),
    ],
)
def test_sd3_trains_as_in_one_process(method, name, weights, tiny, tiny_sd3, tmp_path, alone):
    common = {
        "method": METHODS[method],
        "model": {"path": str(tiny_sd3 / "sd3")},
        "data": {"path": str(tiny_sd3 / "cache")},
        "sample__guidance": 4.0,
        "train__weights": weights,
        "train__steps": 2,
        "train__lr": 1e-5,  # Adam's first update is a whole step also where a gradient is rounding error, which depends on the machine
    }
    one = make_tree(tiny, tmp_path / "one", **common, train__micro_batch_size=8)
    two = make_tree(tiny, tmp_path / "two", **common, train__micro_batch_size=4, engine=ENGINES[name])
    expected = alone(method, weights, one)
    for rows in run_distributed(train_all, 2, two):
        for row, wanted in zip(rows, expected, strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5, abs=1e-6)
            assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
