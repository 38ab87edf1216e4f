"""Every shipped recipe, found recursively, is complete, documented and dry-runs without network or weights."""

import re
from pathlib import Path

import pytest

from recipes.cli import main
from recipes.demo import make_assets
from scfm_core.train.parse import find_recipe, load_config

CONFIGS = sorted(find_recipe("flux_dev_lora").parent.rglob("*.yaml"))
DATA = sorted((find_recipe("flux_dev_lora").parents[1] / "data").rglob("*.yaml"))


@pytest.fixture(scope="module")
def demo_root(tmp_path_factory):
    """What the tiny recipes expect to find below the working directory."""
    root = tmp_path_factory.mktemp("cwd")
    make_assets(root / "runs" / "demo", vae_steps=0)
    (root / "runs" / "demo" / "teacher").symlink_to(root / "runs" / "demo" / "tiny_flux")
    return root


def test_all_promised_recipes_are_there():
    names = {path.stem for path in CONFIGS}
    assert names >= {
        "flux_dev_lora",
        "flux_dev_full",
        "flux_dev_fewshot",
        "flux_pretrain",
        "tiny_pretrain",
        "tiny_distill",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dry_run(path, demo_root, monkeypatch, capsys):
    monkeypatch.chdir(demo_root)
    assert main(["train", str(path), "--dry-run"]) == 0
    page = capsys.readouterr().out
    for heading in ("model", "base", "trained", "compute", "A100-day", "this run", "memory"):
        assert re.search(rf"^{heading}", page, re.MULTILINE), heading


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_states_command_hardware_hours_and_loss(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("command:", "hardware:", "hours:", "expect:"):
        assert word in header, word
    assert load_config(path).run.dir.startswith("runs/")


def test_all_promised_data_recipes_are_there():
    names = {path.stem for path in DATA}
    assert names >= {"laion_pop", "self_generated", "fewshot_10", "cc12m_mds", "digits"}


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_data_recipe_is_swapped_in_by_one_argument(path, demo_root, monkeypatch, capsys):
    """As the command in its header says."""
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "make:" in header
    use = re.search(r"use: +scfm train (\S+) data=(\S+)(.*)", header)
    assert use and use[2] == path.name
    monkeypatch.chdir(demo_root)
    assert main(["train", use[1], f"data={use[2]}", *use[3].replace("'", "").split(), "--dry-run"]) == 0
    assert "memory" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tiny_pretrain", "tiny_distill"])
def test_tiny_recipes_train(name, demo_root, monkeypatch):
    monkeypatch.chdir(demo_root)
    small = ["train.steps=2", "train.warmup_steps=0", "train.global_batch_size=4", "train.micro_batch_size=2"]
    assert main(["train", name, *small, f"run.dir=runs/test_{name}", "sample.steps=[1]"]) == 0
    assert len(Path(f"runs/test_{name}/metrics.jsonl").read_text().splitlines()) == 2


def test_overrides_may_stand_anywhere(capsys):
    assert main(["train", "flux_dev_lora", "train.lr=1e-4", "--dry-run", "train.steps=7"]) == 0
    assert "this run    7 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "flux_dev_lora", "--dryrun"])
    assert "unrecognized arguments: --dryrun" in capsys.readouterr().err
