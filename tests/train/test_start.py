"""`lora.start`: adapters that start from another run or from a file."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from recipes.export import ExportOptions, export
from scfm_core.distributed.world import World
from scfm_core.errors import UserError
from scfm_core.models.families import open_family
from scfm_core.train.fit import fit
from scfm_core.train.parse import parse_config, to_plain
from scfm_core.train.run_dir import checkpoint_path
from scfm_core.train.start import find_start, open_start
from scfm_core.train.trainer import Trainer

ROLE = "ema_fast"
TARGETS = r"proj_out|transformer_blocks\.0\.attn\.to_[qk]"
TREE = {
    "model": {"text_length": 8},
    "data": {"resolution": [16, 16], "num_workers": 0},
    "method": {"step_gain": {"gamma": 0.5}},
    "ema": {"fast": 0.5},
    "lora": {"rank": 4, "alpha": 8.0, "targets": TARGETS},
    "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 4, "lr": 1e-2, "compute_dtype": "float32"},
    "checkpoint": {"every": 1},
    "sample": {"every": 0, "weights": ROLE},
    "wandb": {"mode": "disabled"},
}


def make(tiny: Path, run_dir: Path, **changes: object):
    """A run's configuration; `changes` as `section__key=value`."""
    tree = json.loads(json.dumps(TREE))
    tree["run"] = {"dir": str(run_dir), "device": "cpu"}
    tree["model"]["path"], tree["data"]["path"] = str(tiny / "flux"), str(tiny / "cache")
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return parse_config(tree, "test")


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """A run's folder, and the weights of its `sample.weights` after two steps."""
    config = make(tiny, tmp_path_factory.mktemp("source") / "run")
    trainer = Trainer(config)
    assert fit(trainer) is None
    (trainer.run_dir / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
    return trainer.run_dir, weights(trainer, ROLE)


def weights(trainer: Trainer, role: str) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.parameters(role).items()}


def exported(run_dir: Path, steps: tuple[int, ...] = ()) -> Path:
    [path] = export(run_dir, [], ExportOptions(dtype="float32", base="none", steps=steps)).files
    return path


def without_header(path: Path, folder: Path) -> Path:
    """As PEFT saves an adapter: its own scale beside the file."""
    tensors = load_file(path)
    halved = {name: tensor / 2 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(halved, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    return folder


@pytest.mark.parametrize("kind", ["run", "checkpoint", "file", "PEFT's folder"])
def test_student_and_averages_start_from(kind, tiny, source, tmp_path):
    """Whatever the scale of the run that starts, the jump is the same. A fake score starts as the teacher."""
    run_dir, trained = source
    places = {"run": run_dir, "checkpoint": checkpoint_path(run_dir, 2)}
    start = places[kind] if kind in places else exported(run_dir)
    if kind == "PEFT's folder":
        start = without_header(start, tmp_path)
    changes = {"lora__alpha": 4.0, "method__matching_fraction": 0.5} if kind == "run" else {}
    trainer = Trainer(make(tiny, tmp_path / "run", lora__start=str(start), **changes))
    assert any(factor.any() for name, factor in trained.items() if "lora_B" in name)
    for role in ("student", "ema_fast", "ema_slow"):
        for name, factor in weights(trainer, role).items():
            scale = 8.0 / trainer.config.lora.alpha if "lora_B" in name else 1.0
            assert torch.equal(factor, scale * trained[name]), (role, name)
    if kind == "run":
        fake = weights(trainer, "fake")
        assert not any(factor.any() for name, factor in fake.items() if "lora_B" in name)
        assert all(factor.any() for name, factor in fake.items() if "lora_A" in name)


def test_a_run_that_resumes_takes_its_own_checkpoint(tiny, source):
    """Also if what it started from is gone."""
    run_dir, trained = source
    config = make(tiny, run_dir, lora__start="gone")
    resumed = Trainer(config, checkpoint_path(run_dir, 2))
    assert all(torch.equal(factor, trained[name]) for name, factor in weights(resumed, ROLE).items())


def test_a_run_without_a_fake_score_does_not_resume_with_one(tiny, source):
    config = make(tiny, source[0], method__matching_fraction=0.5)
    with pytest.raises(
        UserError, match=r"(?s)matching_fraction: 0.0 in .*no fake score.* start another run with lora.start=.*run"
    ):
        Trainer(config, checkpoint_path(source[0], 2))


BAD = {
    "nothing": ({}, "neither a run's folder, nor a checkpoint, nor a safetensors file"),
    "empty run": ({}, "has no complete checkpoint. Train that run first"),
    "damaged checkpoint": ({}, "is damaged"),
    "damaged file": ({}, "cannot be read"),
    "rank": ({"lora__rank": 2}, "has rank 4, but lora.rank is 2. Set lora.rank=4"),
    "rank of a file": ({"lora__rank": 2}, "has rank 4, but lora.rank is 2. Set lora.rank=4"),
    "more linears": ({"lora__targets": f"x_embedder|{TARGETS}"}, r"lacks 1 linear \(x_embedder\), which this run adapts. Set lora.targets"),
    "fewer linears": ({"lora__targets": "proj_out"}, r"has 2 linears \(transformer.*\), which this run does not adapt. Set lora.targets"),
    "gamma": ({"method__step_gain": {"gamma": 0.75}}, r"with method.step_gain.gamma=0.5, this run has gamma 0.75: .* Set method.step_gain.gamma=0.5"),
    "gamma of a file": ({"method__step_gain": None}, "with method.step_gain.gamma=0.5, this run has none"),
    "folded": ({}, "has the strength of 4 steps in its weights.* Export without --steps"),
    "full weights": ({}, "has full weights, not adapters. Export that run with --merged"),
    "another model": ({}, "was trained on another model than model.path"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_what_does_not_fit_is_refused(fault, tiny, source, tmp_path):
    changes, message = BAD[fault]
    run_dir, _ = source
    start = checkpoint_path(run_dir, 2)
    if fault in ("nothing", "empty run"):
        start = tmp_path / "other"
    if fault == "empty run":
        (start / "checkpoints").mkdir(parents=True)
    if fault in ("damaged checkpoint", "full weights", "another model"):
        start = shutil.copytree(start, tmp_path / "step")
    if fault == "damaged checkpoint":
        next((start / "dcp").glob("*.distcp")).write_bytes(b"damaged")
    if fault in ("full weights", "another model"):
        state = json.loads((start / "state.json").read_text())
        if fault == "full weights":
            state["config"]["train"]["weights"] = "full"
        else:
            state["base_fingerprint"] = "0123 transformer/config.json=4567"
        (start / "state.json").write_text(json.dumps(state))
    if fault in ("damaged file", "rank of a file", "gamma of a file", "folded"):
        start = exported(run_dir, (4,) if fault == "folded" else ())
    if fault == "damaged file":
        start = Path(shutil.copy(start, tmp_path))
        start.write_bytes(start.read_bytes()[:-9])
    config = make(tiny, tmp_path / "run", lora__start=str(start), **changes)
    family = open_family(str(tiny / "flux"))
    linears = {
        name: module
        for name, module in family.meta_network().named_modules()
        if isinstance(module, torch.nn.Linear) and re.fullmatch(config.lora.targets, name)
    }
    rank = config.lora.rank
    shapes = {f"{name}.lora_A.weight": (rank, linear.in_features) for name, linear in linears.items()}
    shapes |= {f"{name}.lora_B.weight": (linear.out_features, rank) for name, linear in linears.items()}
    with pytest.raises(UserError, match=f"(?s)lora.start.*{message}"):
        open_start(_found(config, fault), config, family, shapes)


def _found(config, fault: str) -> Path:
    """The state of two copies is changed on purpose: they are not verified."""
    if fault in ("full weights", "another model"):
        return Path(config.lora.start)
    return find_start(config.lora.start, World())
