"""Every collective of a step, by kind and bytes, on each engine. docs/engines.md shows the table:
`python tests/distributed/test_collectives.py` prints it anew."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ALL_TARGETS, ENGINES, joined_trainer, make_tree, run_distributed
from torch.utils._python_dispatch import TorchDispatchMode

from scfm_core.models.families import open_family
from scfm_core.scfm.meter import SIGMA_BINS
from scfm_core.scfm.plan import SLICES
from scfm_core.train.config import RunConfig
from scfm_core.train.estimate import Estimate, estimate
from scfm_core.train.parse import parse_config
from scfm_core.train.scale import plan_step
from scfm_core.train.stop import SIGNALS

CASES: dict[str, dict[str, Any]] = {"one process": {}, **ENGINES, "hsdp": {"shard": 2}}
KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "broadcast": "broadcast",
    "alltoall": "all-to-all",
    "barrier": "barrier",
    "gather": "gather",
}


class Collectives(TorchDispatchMode):
    """Counts what goes through torch.distributed: calls and bytes of the input, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function.__name__:
            name = function.__name__.replace("_", "")
            kind = next(kind for part, kind in KINDS.items() if part.replace("_", "") in name)
            # The larger side of a gather or scatter is the whole.
            sizes = [
                t.nbytes for t in torch.utils._pytree.tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)
            ]
            self.calls[kind] += 1
            self.bytes[kind] += max(sizes, default=0)
        return function(*args, **(kwargs or {}))


def count(tree: dict[str, Any]) -> dict[str, dict[str, tuple[int, int]]]:
    """In a rank: the collectives of the last step, by part of the step."""
    with joined_trainer(tree) as trainer:
        parts: dict[str, Any] = {}

        def counted(name: str, function: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                with Collectives() as seen:
                    result = function(*arguments, **options)
                known = parts.setdefault(name, Collectives())
                known.calls += seen.calls
                known.bytes += seen.bytes
                return result

            return call

        engine, emas = trainer.engine, trainer.emas
        engine.forward = counted("passes", engine.forward)
        engine.backward = counted("backward", engine.backward)
        engine.reduce = counted("reduce", engine.reduce)
        engine.step = counted("update", engine.step)
        emas.update = counted("ema", emas.update)
        engine.after_ema_update = counted("ema", engine.after_ema_update)
        steps = trainer.train_steps()
        for _ in range(tree["train"]["steps"] - 1):
            next(steps)
        parts.clear()
        with Collectives() as rest:
            next(steps)
        for part in parts.values():
            rest.calls -= part.calls
            rest.bytes -= part.bytes
        parts["metrics"] = rest
        return {
            name: {kind: (calls, part.bytes[kind]) for kind, calls in part.calls.items() if calls}
            for name, part in parts.items()
        }


def measure(name: str, weights: str, tiny: Path, tmp_path: Path) -> tuple[dict[str, Any], RunConfig, Estimate]:
    """One step's collectives on rank 0; the run, and its estimate.

    It is the second step; under ZeRO-3, which records the order of the modules in the first and plans with it in the second,
    the third.
    """
    world_size = {"one process": 1, "hsdp": 4}.get(name, 2)
    settings = tmp_path / "deepspeed.json"
    # DeepSpeed keeps weights below 100,000 elements gathered, which is all of them here and next to none of Flux.
    settings.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    engine = {**CASES[name], "deepspeed_config": str(settings)} if name == "zero3" else CASES[name]
    tree = make_tree(
        tiny, tmp_path / f"{name}_{weights}", engine=engine, lora__targets=ALL_TARGETS, train__weights=weights,
        train__steps=3 if name == "zero3" else 2, train__micro_batch_size=2,
    )  # fmt: skip
    config = parse_config(tree, "test")
    result = estimate(config, open_family(str(tiny / "flux")), world_size)
    return run_distributed(count, world_size, tree)[0], config, result


@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize("name", CASES)
def test_what_a_step_sends(name, weights, tiny, tmp_path):
    """Of PyTorch's engine also: exactly the collectives of the plan for many GPUs, with their bytes."""
    parts, config, result = measure(name, weights, tiny, tmp_path)
    trained = 4 * result.trained_parameters
    assert parts["ema"] == {}, "an EMA's update is local"
    if name == "one process":
        assert not any(parts.values())
        return
    losses = 2 * (len(SLICES) + 1) * SIGMA_BINS
    assert parts["metrics"] == {"all-reduce": (1, 8 * (losses + len(SIGNALS) + 2))}  # signals, and how the data are
    if (
        name == "replicas"
    ):  # one all-reduce of the trained weights' gradients within the last backward, and nothing else
        assert parts["passes"] == parts["reduce"] == parts["update"] == {}
        assert parts["backward"] == {"all-reduce": (1, trained)}
    elif name in ("fsdp2", "hsdp"):
        assert set(parts["passes"]) == {"all-gather"} and parts["update"] == {}
        assert parts["reduce"] == {"all-reduce": (1, 4)}, "the squared norm"
        scattered = parts["backward"]["reduce-scatter"][1]
        accumulation = 8 // (2 * (4 if name == "hsdp" else 2))
        assert scattered == pytest.approx(accumulation * trained, rel=0.05)  # padding
        if name == "hsdp":  # a shard's gradients, between the replicas
            assert parts["backward"]["all-reduce"][1] == pytest.approx(trained / 2, rel=0.05)
        else:
            assert "all-reduce" not in parts["backward"]
    elif name in ("zero1", "zero2"):
        assert parts["passes"] == {}
        assert parts["reduce"]["all-reduce"] == (1, 8)
        assert parts["update"]["all-gather"][1] == pytest.approx(trained, rel=0.05)
        accumulation = 1 if name == "zero1" else 2
        assert sum(size for _, size in parts["backward"].values()) == pytest.approx(accumulation * trained, rel=0.05)
    else:
        assert set(parts["passes"]) == {"all-gather"}
        assert parts["backward"]["reduce-scatter"][1] == pytest.approx(2 * trained, rel=0.05)
    if config.engine.name == "fsdp2":
        assert_planned(config, result, [parts[part] for part in ("passes", "backward", "reduce")], tiny)


def assert_planned(config: RunConfig, result: Estimate, parts: list[dict[str, tuple[int, int]]], tiny: Path) -> None:
    family = open_family(str(tiny / "flux"))
    units = len(family.blocks(family.meta_network())) + 1
    planned: dict[str, tuple[int, float]] = {}
    for each in plan_step(config, result, units).exchanges:
        calls, size = planned.get(each.kind, (0, 0.0))
        planned[each.kind] = calls + each.calls, size + each.size
    norm = ("all-reduce", (1, 4))  # not planned: four bytes
    seen: dict[str, tuple[int, int]] = {}
    for kind, (calls, size) in (item for part in parts for item in part.items() if item != norm):
        seen[kind] = seen.get(kind, (0, 0))[0] + calls, seen.get(kind, (0, 0))[1] + size
    assert {kind: calls for kind, (calls, _) in seen.items()} == {kind: calls for kind, (calls, _) in planned.items()}
    for kind, (_, size) in planned.items():
        assert seen[kind][1] == pytest.approx(size, rel=0.05), kind  # padding


def table(tiny: Path, tmp_path: Path) -> str:
    """The docs' table."""
    lines = [
        "| engine | weights | passes | backward | reduce | update | EMA update | metrics |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        for weights in ("lora", "full"):
            parts, _, result = measure(name, weights, tiny, tmp_path)
            trained = 4 * result.trained_parameters
            cells = [
                ", ".join(f"{calls} {kind} ({_size(size, trained)})" for kind, (calls, size) in parts[part].items())
                or "-"
                for part in ("passes", "backward", "reduce", "update", "ema", "metrics")
            ]
            lines.append(f"| {name} | {weights} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _size(size: int, trained: int) -> str:
    return f"{size} B" if size < 1000 else f"{size / trained:.2f} T"


if __name__ == "__main__":
    import tempfile

    import tiny_fixtures

    with tempfile.TemporaryDirectory() as folder:
        print(table(tiny_fixtures.write_tiny(Path(folder)), Path(folder)))
