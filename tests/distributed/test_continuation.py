"""Going on: on the same engine exactly, on any other engine and number of processes with the same weights and optimizer."""

import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ALL_TARGETS, ENGINES, distance, joined_trainer, make_tree, run_distributed, tensors, train_all

from recipes.checkpoint import inspect
from recipes.cli import main
from recipes.export import export
from scfm_core.distributed.reader import module_name
from scfm_core.train.checkpoint import find_checkpoint, load_checkpoint
from scfm_core.train.run_dir import checkpoint_path

GROUPS = ("student", "ema_fast", "ema_slow", "exp_avg", "exp_avg_sq")
FAKE_GROUPS = ("fake", "fake_exp_avg", "fake_exp_avg_sq")


def curves(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["samples"]) for row in rows]


INTERRUPTED = [(name, weights) for name in ("fsdp2", "zero2", "zero3") for weights in ("lora", "full")]
INTERRUPTED += [("replicas", "lora"), ("zero1", "full"), ("fsdp2 async", "full")]
INTERRUPTED += [("fsdp2", "lora, matching"), ("zero3", "lora, matching")]


@pytest.mark.parametrize(("name", "weights"), INTERRUPTED)
def test_interrupted_equals_uninterrupted(name, weights, tiny, tmp_path):
    """N + M steps against N, restart, M: bitwise, on every engine, with guard, restart of the EMAs and a schedule; adapters also with
    flow-map rows, or with matching rows and their fake score."""
    rows = "matching" if "matching" in weights else "flow_map"
    weights = weights.partition(",")[0]
    method = {"method__step_gain": {"gamma": 0.5}, f"method__{rows}_fraction": 0.3} if weights == "lora" else {}
    tree = make_tree(
        tiny,
        tmp_path / "a",
        engine=ENGINES[name.removesuffix(" async")],
        train__weights=weights,
        train__warmup_steps=3,
        train__micro_batch_size=4,
        train__steps=4,
        checkpoint__asynchronous=name.endswith("async"),
        ema={"restart_every": 3},
        **method,
    )
    [whole, _] = run_distributed(train_all, 2, tree, 2)
    # All that a run that ended after step 2 leaves.
    shutil.copytree(checkpoint_path(tmp_path / "a", 2), checkpoint_path(tmp_path / "b", 2))
    tree["run"]["dir"] = str(tmp_path / "b")
    [second, _] = run_distributed(train_all, 2, tree)
    assert [row["step"] for row in second] == [3, 4]
    assert curves(second) == curves(whole)[2:]
    assert "ema_restart" in second[0]
    left, right = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert float(left["exp_avg.proj_out.weight" if weights == "full" else "exp_avg.proj_out.lora_B.weight"].norm()) > 0


CHAIN = [(2, "zero2"), (1, "zero3"), (4, "fsdp2"), (2, "zero1"), (1, "fsdp2"), (2, "zero3")]


MATCHING = {"method__step_gain": {"gamma": 0.5}, "method__matching_fraction": 0.4}
MOVES = {"lora": ("lora", CHAIN, {}), "full": ("full", CHAIN[1:4], {}), "matching": ("lora", CHAIN[:3], MATCHING)}


@pytest.mark.parametrize(("weights", "chain", "method"), MOVES.values(), ids=MOVES)
def test_a_run_moves_between_engines_and_world_sizes(weights, chain, method, tiny, tmp_path):
    """2 -> 1 -> 4 processes, ZeRO-2 -> ZeRO-3 -> FSDP2 and on: the losses are those of a run that never moved."""
    tree = make_tree(
        tiny, tmp_path / "still", train__weights=weights, train__steps=len(chain), train__micro_batch_size=8, **method
    )
    [still] = run_distributed(train_all, 1, tree)
    moved: list[dict[str, Any]] = []
    for leg, (world_size, name) in enumerate(chain, 1):
        tree = make_tree(tiny, tmp_path / "moved", train__weights=weights, engine=ENGINES[name], **method)
        tree["train"] |= {"steps": leg, "micro_batch_size": 8 // world_size}
        moved += run_distributed(train_all, world_size, tree)[0]
    assert [row["step"] for row in moved] == list(range(1, len(chain) + 1))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in moved] == pytest.approx([row[key] for row in still], rel=1e-5)
    left, right = tensors(tmp_path / "moved"), tensors(tmp_path / "still")
    groups = (*GROUPS, *FAKE_GROUPS) if method else GROUPS
    assert all(distance(left, right, group) < 1e-5 for group in groups)


def save_the_start(tree: dict[str, Any]) -> None:
    """In a rank: a checkpoint before the first step."""
    with joined_trainer(tree) as trainer:
        trainer.state.save()


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_adapters_start_from_another_run(name, tiny, tmp_path_factory, tmp_path):
    """`lora.start` on two processes: each fills its own part. A fake score starts as the teacher."""
    source = source_run("fsdp2, matching", tiny, tmp_path_factory)
    start = {"lora__start": str(source), "train__micro_batch_size": 4, **MATCHING}
    run_distributed(save_the_start, 2, make_tree(tiny, tmp_path / "run", engine=ENGINES[name], **start))
    begun, trained = tensors(tmp_path / "run"), tensors(source)
    for key, value in begun.items():
        group, _, factor = key.partition(".")
        if group in ("student", "ema_fast", "ema_slow"):
            assert torch.equal(value, trained[f"student.{factor}"]), key
        elif group != "fake" or "lora_B" in key:
            assert not value.any(), key
        else:
            assert value.any(), key


def save_and_tell(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    """In a rank: train, save, and return the live student as the network has it, gathered by the engine itself."""
    with joined_trainer(tree) as trainer:
        list(trainer.train_steps())
        trainer.state.save()
        live = {}
        for name, parameter in trainer.model.parameters("student").items():
            if hasattr(parameter, "ds_id"):
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter]):
                    live[name] = parameter.detach().clone().numpy()
            else:
                full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                live[name] = full.detach().clone().numpy()
        frozen = sum(p.numel() for n, p in trainer.model.networks["student"].named_parameters() if not p.requires_grad)
        assert frozen > 0
        return live


@pytest.mark.parametrize("name", ENGINES)
def test_the_exported_adapter_is_the_live_one(name, tiny, tmp_path):
    """All linears are adapted. And the frozen base is in no file of the checkpoint."""
    from safetensors.torch import load_file

    tree = make_tree(
        tiny,
        tmp_path / "run",
        engine=ENGINES[name],
        lora__targets=ALL_TARGETS,
        train__micro_batch_size=4,
        train__steps=2,
    )
    live, other = run_distributed(save_and_tell, 2, tree)
    assert all((live[key] == other[key]).all() for key in live)
    (tmp_path / "run").mkdir(exist_ok=True)
    write_config(tree, tmp_path / "run")
    exported = load_file(export(tmp_path / "run", []).files[0])
    assert len(exported) == len(live)
    for key, value in live.items():
        assert torch.equal(exported[f"transformer.{key}"], torch.from_numpy(value)), key

    checkpoint = find_checkpoint(tmp_path / "run")
    base = load_file(next((tiny / "flux" / "transformer").glob("*.safetensors")))
    written = [path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()]
    for key in ("x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"):
        assert not any(base[key].numpy().tobytes()[:64] in content for content in written), key
    some = next(iter(live.values())).tobytes()[:64]
    assert any(some in content for content in written), "the search finds what is stored"
    names = {key.partition(".")[2] for key in load_checkpoint(checkpoint).reader.shapes}
    assert all(".lora_" in key for key in names)


def write_config(tree: dict[str, Any], run_dir: Path) -> None:
    import yaml

    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))


def run_deepspeeds_own_tool(folders: list[str]) -> None:
    """In a process of its own, which has imported DeepSpeed: the script in each folder, as its user starts it."""
    for folder in folders:
        sys.argv = ["zero_to_fp32.py", folder, f"{folder}/../out"]
        runpy.run_path(f"{folder}/zero_to_fp32.py", run_name="__main__")


def test_deepspeeds_own_tool_reads_the_checkpoint(tiny, tmp_path):
    """zero_to_fp32.py as DeepSpeed left it beside the checkpoints, by its pointer, without our code."""
    run_dirs = [tmp_path / name for name in ("zero1", "zero2", "zero3")]
    for run_dir in run_dirs:
        engine = ENGINES[run_dir.name]
        tree = make_tree(tiny, run_dir, engine=engine, train__weights="full", train__micro_batch_size=4, train__steps=1)
        run_distributed(train_all, 2, tree)
    run_distributed(run_deepspeeds_own_tool, 1, [str(run_dir / "checkpoints") for run_dir in run_dirs])
    for run_dir in run_dirs:
        state = torch.load(run_dir / "out" / "pytorch_model.bin", weights_only=True)
        ours = {key.removeprefix("student."): t for key, t in tensors(run_dir).items() if key.startswith("student.")}
        assert state.keys() == {module_name(key) for key in ours}
        assert all(torch.equal(state[module_name(key)], value) for key, value in ours.items())


@pytest.mark.parametrize(
    ("source", "kind", "stage", "ranks"),
    [  # what reads a checkpoint knows nothing of what writes the other one: each of both, not each pair
        ("fsdp2", "zero", 3, 4),
        ("zero2", "zero", 1, 3),
        ("zero3", "dcp", 2, 1),
        ("fsdp2, matching", "zero", 3, 4),
        ("fsdp2, matching", "dcp", 2, 1),
    ],
)
def test_convert_keeps_every_bit(source, kind, stage, ranks, tiny, tmp_path_factory, tmp_path, monkeypatch):
    run_dir = source_run(source, tiny, tmp_path_factory)
    engine, _, matching = source.partition(", ")
    tree = make_tree(
        tiny,
        run_dir,
        engine=ENGINES[engine],
        train__micro_batch_size=4,
        train__steps=2,
        **(MATCHING if matching else {}),
    )
    numbers = ["--stage", str(stage), "--ranks", str(ranks)]
    monkeypatch.chdir(run_dir / "checkpoints")
    name = find_checkpoint(run_dir).name
    assert main(["checkpoint", "convert", name, str(tmp_path / "new"), "--to", kind, *numbers]) == 0
    left, right = tensors(tmp_path / "new"), tensors(run_dir)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert f"{'ZeRO-' + str(stage) if kind == 'zero' else 'fsdp2'} on {ranks}" in inspect(tmp_path / "new")
    if kind == "zero":  # the names that DeepSpeed looks for
        whole, parts = (
            "mp_rank_00_model_states.pt",
            [f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in range(ranks)],
        )
        assert sorted(path.name for path in (tmp_path / "new").rglob("*_model_states.pt")) == (
            parts if stage == 3 else [whole]
        )
    # And a run resumes from it, on yet another engine.
    tree |= {"run": {**tree["run"], "dir": str(tmp_path / "new")}, "engine": {}}
    tree["train"] |= {"steps": 3, "micro_batch_size": 8}
    [rows] = run_distributed(train_all, 1, tree)
    assert [row["step"] for row in rows] == [3]


_SOURCES: dict[str, Path] = {}


def source_run(name: str, tiny: Path, factory: pytest.TempPathFactory) -> Path:
    """A finished run on two processes, one for all tests."""
    if name not in _SOURCES:
        run_dir = factory.mktemp("source") / "run"
        engine, _, matching = name.partition(", ")
        method = MATCHING if matching else {}
        tree = make_tree(tiny, run_dir, engine=ENGINES[engine], train__micro_batch_size=4, train__steps=2, **method)
        run_distributed(train_all, 2, tree)
        _SOURCES[name] = run_dir
    return _SOURCES[name]


def test_pytorchs_own_loader_reads_the_checkpoint(tiny, tmp_path_factory):
    import torch.distributed.checkpoint as dcp

    run_dir = source_run("fsdp2", tiny, tmp_path_factory)
    ours = tensors(run_dir)
    loaded = {key: torch.zeros_like(value) for key, value in ours.items()}
    dcp.load(loaded, checkpoint_id=find_checkpoint(run_dir) / "dcp", no_dist=True)
    assert all(torch.equal(loaded[key], ours[key]) for key in ours)
