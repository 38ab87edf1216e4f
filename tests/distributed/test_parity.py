"""One run on every engine: the same losses, gradient norms and EMAs as one process, from the same global batches.

`SCFM_SHOW_PARITY=1 pytest -s tests/distributed/test_parity.py` runs every combination for 20 steps with all linears adapted
and prints the measured table. Otherwise a run has 4 steps; with adapters all linears are trained in fp32, a few in bf16.
"""

import os
from typing import Any

import pytest
import torch
from runs import ALL_TARGETS, ENGINES, FEW_TARGETS, distance, make_tree, run_distributed, tensors, train_all

from scfm_core.distributed.engine import FAKE_GROUPS, GROUPS

SHOW = bool(os.environ.get("SCFM_SHOW_PARITY"))
STEPS = 20 if SHOW else 4
CASES = {
    "replicas on 2": (2, ENGINES["replicas"]),
    "FSDP2 on 2": (2, ENGINES["fsdp2"]),
    "FSDP2 on 4": (4, ENGINES["fsdp2"]),
    "HSDP on 2 x 2": (4, {"shard": 2}),
    "ZeRO-1 on 2": (2, ENGINES["zero1"]),
    "ZeRO-2 on 2": (2, ENGINES["zero2"]),
    "ZeRO-3 on 2": (2, ENGINES["zero3"]),
    "FSDP2 on 2, offloaded": (2, {"cpu_offload": True}),
    "ZeRO-2 on 2, offloaded": (2, {**ENGINES["zero2"], "cpu_offload": True}),
    "ZeRO-3 on 2, offloaded": (2, {**ENGINES["zero3"], "cpu_offload": True}),
}
# fp32: the order of summation. bf16: a matrix product over other rows rounds otherwise, by 2^-9 of a value, and Adam
# turns a gradient's changed sign into a step of full length; so the EMAs' distance is held against what they moved.
LIMITS = {"float32": (1e-5, 1e-5), "bfloat16": (5e-2, 0.5)}


def common(weights: str, dtype: str) -> dict[str, Any]:
    """Adapters have strengths of each sample; the averages' lag is looked at once, after the last step."""
    return {
        "train__steps": STEPS,
        "train__weights": weights,
        "train__compute_dtype": dtype,
        "ema": {"restart_every": "auto"},
        "method__step_gain": {"gamma": 0.5} if weights == "lora" else None,
    } | ({"lora__targets": ALL_TARGETS} if SHOW or dtype == "float32" else {})


def train_to_the_lag(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """In a rank: `train_all`, whose last step looks at the averages' lag."""
    from scfm_core.scfm import restart

    restart.CHECK_EVERY = tree["train"]["steps"]
    return train_all(tree)


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    """(weights, dtype) -> rows and tensors of one process."""
    known: dict[tuple[str, str], Any] = {}

    def get(weights: str, dtype: str):
        if (weights, dtype) not in known:
            folder = tmp_path_factory.mktemp("one")
            start = make_tree(tiny, folder / "start", **common(weights, dtype), train__lr=1e-12)
            start["train"]["steps"] = 1
            run_distributed(train_all, 1, start)
            tree = make_tree(tiny, folder / "run", **common(weights, dtype), train__micro_batch_size=4)
            [rows] = run_distributed(train_to_the_lag, 1, tree)
            known[weights, dtype] = rows, tensors(folder / "run"), tensors(folder / "start")
        return known[weights, dtype]

    return get


def combinations() -> list[tuple[str, str, str]]:
    """(case, weights, dtype); all of them for the table, and else those that run code of their own."""
    rounded = [name for name, (world_size, engine) in CASES.items() if world_size == 2 and "cpu_offload" not in engine]
    every = [(name, "float32") for name in CASES] + [(name, "bfloat16") for name in rounded]
    found = [(name, weights, dtype) for name, dtype in every for weights in ("lora", "full")]
    if SHOW:
        return found
    seldom = {"offloaded": "lora", "HSDP": "lora", "replicas": "full", "ZeRO-1": "lora"}
    return [
        (name, weights, dtype)
        for name, weights, dtype in found
        if not any(part in name and weights == left_out for part, left_out in seldom.items())
        and (dtype == "float32" or name in ("FSDP2 on 2", "ZeRO-2 on 2", "ZeRO-3 on 2"))
    ]


@pytest.mark.parametrize(("name", "weights", "dtype"), combinations())
def test_every_engine_trains_as_one_process(name, weights, dtype, tiny, tmp_path, reference):
    world_size, engine = CASES[name]
    rows, expected, start = reference(weights, dtype)
    tree = make_tree(
        tiny, tmp_path / "run", **common(weights, dtype), engine=engine, train__micro_batch_size=8 // world_size
    )
    by_rank = run_distributed(train_to_the_lag, world_size, tree)
    timeless = [
        [{k: v for k, v in row.items() if "seconds" not in k and "second" not in k} for row in r] for r in by_rank
    ]
    assert all(other == timeless[0] for other in timeless[1:]), "ranks report different numbers"

    loss, norm = (
        max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(by_rank[0], rows, strict=True))
        for key in ("loss", "grad_norm")
    )
    lag = abs(by_rank[0][-1]["ema_lag_ratio"] / rows[-1]["ema_lag_ratio"] - 1)
    actual = tensors(tmp_path / "run")
    apart = {group: distance(actual, expected, group) for group in ("student", "ema_fast", "ema_slow")}
    if dtype == "bfloat16":
        moved = {group: distance(start, expected, group) for group in apart}
        apart = {group: apart[group] / moved[group] for group in apart}
    if SHOW:
        print(
            f"\n| {name} | {weights} | {dtype} | {loss:.1e} | {norm:.1e} | "
            + " | ".join(f"{a:.1e}" for a in apart.values())
            + " |"
        )
    assert len(by_rank[0]) == STEPS
    limit_curve, limit_weights = LIMITS[dtype]
    assert loss < limit_curve and norm < limit_curve and lag < 10 * limit_curve, (loss, norm, lag)
    assert all(value < limit_weights for value in apart.values()), apart


def test_the_comparison_sees_a_wrong_ema(reference):
    """The limit would catch an average that misses one update."""
    _, expected, _ = reference("lora", "float32")
    late = {
        key: torch.lerp(t, expected[key.replace("ema_fast", "student")], -0.01) if "ema_fast" in key else t
        for key, t in expected.items()
    }
    assert distance(late, expected, "ema_fast") > 1e-5


@pytest.mark.parametrize("name", ["FSDP2 on 2", "ZeRO-3 on 2"])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_paths_taken_within_the_training(name, weights, tiny, tmp_path):
    """With adapters also flow-map rows. A process without such rows enters the sharded network as often as the others; the losses are
    those of one process."""
    world_size, engine = CASES[name]
    method = {"trajectory_fraction": 0.1, "trajectory_steps": 4, "trajectory_grids": [1, 2, 4]}
    slices = ["loss/trajectory"]
    if weights == "lora":
        method["flow_map_fraction"] = 0.2
        slices.append("loss/flow_map")
    changes = {f"method__{key}": value for key, value in method.items()} | common(weights, "float32")
    changes |= {"lora__targets": FEW_TARGETS, "train__steps": 3}
    [one] = run_distributed(train_all, 1, make_tree(tiny, tmp_path / "one", **changes, train__micro_batch_size=2))
    tree = make_tree(tiny, tmp_path / "two", **changes, train__micro_batch_size=2, engine=engine)
    two = run_distributed(train_all, world_size, tree)[0]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    for part in slices:
        assert any(part in row for row in one) and not all(part in row for row in one), part


MATCHING = {
    "method__step_gain": {"gamma": 0.5},
    "method__matching_fraction": 0.4,
    "method__matching": {"fake_lr": 3.0},
    "lora__targets": FEW_TARGETS,
    "train__steps": 3,
    "train__clip_norm": 0.05,
}


@pytest.mark.parametrize("name", [name for name in CASES if name != "FSDP2 on 4"])  # nothing but more of FSDP2 on 2
def test_a_fake_score_beside_the_student(name, tiny, tmp_path):
    """Two micro-batches a process, so that the gradients of both roles accumulate in turn. The norm is over both, and it is clipped."""
    if "one" not in _MATCHED:
        run_dir = tmp_path / "one"
        [rows] = run_distributed(train_all, 1, make_tree(tiny, run_dir, **MATCHING, train__micro_batch_size=2))
        _MATCHED["one"] = rows, tensors(run_dir)
    rows, expected = _MATCHED["one"]
    assert all("loss/matching" in row and "loss/fake" in row for row in rows)
    assert all(row["grad_norm"] > MATCHING["train__clip_norm"] for row in rows)
    world_size, engine = CASES[name]
    tree = make_tree(tiny, tmp_path / "run", **MATCHING, train__micro_batch_size=4 // world_size, engine=engine)
    found = run_distributed(train_all, world_size, tree)[0]
    for key in ("loss", "loss/fake", "grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in rows], rel=1e-5), key
    actual = tensors(tmp_path / "run")
    assert actual.keys() == expected.keys()
    for group in (*GROUPS, *FAKE_GROUPS):
        assert distance(actual, expected, group) < 1e-5, group


_MATCHED: dict[str, Any] = {}


def test_the_students_pass_before_those_of_the_target(tiny, tmp_path):
    """`method.near=student`, with activation checkpointing: the backward comes after passes of other adapters."""
    changes = common("lora", "float32") | {"method__step_gain": None, "lora__targets": FEW_TARGETS, "train__steps": 3}
    changes |= {"method__near": "student"}
    [one] = run_distributed(train_all, 1, make_tree(tiny, tmp_path / "one", **changes, train__micro_batch_size=8))
    changes |= {"train__activation_checkpointing": "full", "train__micro_batch_size": 1}
    for name in ("FSDP2 on 2", "ZeRO-3 on 2"):
        world_size, engine = CASES[name]
        two = run_distributed(train_all, world_size, make_tree(tiny, tmp_path / name, **changes, engine=engine))[0]
        for key in ("loss", "grad_norm"):
            assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-5), name
