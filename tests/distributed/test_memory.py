"""The dry run's memory and checkpoints against the bytes that an engine really holds and writes."""

from typing import Any

import pytest
import torch
from runs import ENGINES, joined_trainer, make_tree, run_distributed

from scfm_core.models.families import open_family
from scfm_core.train.estimate import estimate
from scfm_core.train.parse import parse_config

CASES = {
    "one": (1, {}),
    "hsdp": (4, {"shard": 2}),
    **{name: (2, engine) for name, engine in ENGINES.items()},
    "fsdp2 on 4": (4, {}),
}


def size(tensors: Any) -> int:
    """Bytes of the distinct storages behind tensors, each once, counting what a view uses of a shared flat buffer."""
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors if t is not None and t.numel()}.values())


def held(tree: dict[str, Any]) -> dict[str, int]:
    """In a rank: bytes by part, at their most in a step."""
    with joined_trainer(tree) as trainer:
        engine, model = trainer.engine, trainer.model
        found: dict[str, int] = {}
        plain, backward, gradients = engine.step, engine.backward, []

        def local(parameter: Any) -> torch.Tensor:
            if hasattr(parameter, "ds_tensor"):
                return parameter.ds_tensor
            return parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()

        def counted_backward(loss: torch.Tensor) -> None:
            backward(loss)
            # Between micro-batches: ZeRO-1 keeps whole gradients here, ZeRO-2 and 3 this rank's part.
            trained = [p for role in model.trained for p in model.parameters(role).values()]
            kept = [local(p.grad) for p in trained if p.grad is not None]
            gradients.append(size([*kept, *(engine._zero.reduced_gradients() if hasattr(engine, "_zero") else ())]))

        def step(lr: float) -> None:
            found["gradients (fp32)"] = max(gradients)
            roles = {*model.trained, "ema_fast", "ema_slow"}
            trained = {id(p) for role in roles for p in model.parameters(role).values()}
            frozen = [p for network in model.networks.values() for p in network.parameters() if id(p) not in trained]
            found["frozen base"] = found["teacher"] = size(map(local, frozen))
            found["student (fp32)"] = size(map(local, model.parameters("student").values()))
            found["fake score (fp32)"] = size(
                local(p) for role in model.trained[1:] for p in model.parameters(role).values()
            )
            found["EMAs, fast and slow (fp32)"] = size(
                local(p) for role in ("ema_fast", "ema_slow") for p in model.parameters(role).values()
            )
            if hasattr(engine, "_zero"):
                states = [engine._zero.adam_state(master) for master in engine._zero.masters]
                weights = {local(p).data_ptr() for role in model.trained for p in model.parameters(role).values()}
                own = [master for master in engine._zero.masters if master.data_ptr() not in weights]
                found["optimizer's masters (fp32)"] = size(own) if engine._stage < 3 else 0
            else:
                states = list(engine._optimizer.state.values())
            found["Adam (fp32)"] = size(state[moment] for state in states for moment in ("exp_avg", "exp_avg_sq"))
            plain(lr)

        engine.step, engine.backward = step, counted_backward
        list(trainer.train_steps())
        folder = trainer.state.save()
        trainer.state.wait()
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
        found["checkpoint"] = sum(path.stat().st_size for path in files)
        return found


MATCHING = {"method__step_gain": {"gamma": 0.5}, "method__matching_fraction": 0.4}
KINDS = [("lora", "float32", {}), ("full", "bfloat16", {})]
RUNS = [(name, *kind) for name in CASES for kind in KINDS]
RUNS += [(name, "lora", "float32", MATCHING) for name in ("one", "zero2", "zero3")]


@pytest.mark.parametrize(
    ("name", "weights", "dtype", "method"),
    RUNS,
    ids=["-".join([*map(str, run[:3]), *(["matching"] if run[3] else [])]) for run in RUNS],
)
def test_the_estimate_is_within_a_tenth(name, weights, dtype, method, tiny, tmp_path):
    world_size, engine = CASES[name]
    tree = make_tree(
        tiny, tmp_path / "run", engine=engine, train__steps=1, train__weights=weights, train__compute_dtype=dtype,
        train__micro_batch_size=4 // world_size, **method,
    )  # fmt: skip
    tree["lora"]["rank"] = 16  # a checkpoint of some 500 kB, of which most are tensors
    whole = estimate(parse_config(tree, "test"), open_family(str(tiny / "flux")), world_size)
    expected = whole.memory
    measured = run_distributed(held, world_size, tree)[0]
    parts = ("frozen base" if weights == "lora" else "teacher", "student (fp32)", "EMAs, fast and slow (fp32)",
             "fake score (fp32)", "optimizer's masters (fp32)", "gradients (fp32)", "Adam (fp32)")  # fmt: skip
    compared = {part: (expected.get(part, 0), measured.get(part, 0)) for part in parts}
    for part, (wanted, got) in compared.items():
        assert got == pytest.approx(wanted, rel=0.1), (part, compared)
    total = [sum(pair[i] for pair in compared.values()) for i in (0, 1)]
    assert total[1] == pytest.approx(total[0], rel=0.1)
    assert measured["checkpoint"] == pytest.approx(sum(whole.checkpoint.values()), rel=0.03)
