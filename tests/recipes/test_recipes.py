"""Every shipped recipe, found recursively, is complete and documented, and its dry run needs no network or weights."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from small_emoji import make_small

from recipes.cli import main
from recipes.demo import make_assets
from recipes.study import _check_data
from recipes.study_file import load_study, runs_of
from scfm_core.train.parse import dump_config, find_recipe, load_config

FOLDER = find_recipe("flux_dev_lora").parent
CONFIGS = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "study")
STUDIES = sorted((FOLDER / "study").glob("*.yaml"))
DATA = sorted((find_recipe("flux_dev_lora").parents[1] / "data").rglob("*.yaml"))


@pytest.fixture(scope="module")
def demo_root(tmp_path_factory):
    """A working directory with the files that the tiny recipes need."""
    root = tmp_path_factory.mktemp("cwd")
    make_assets(root / "runs" / "demo", vae_steps=0)
    demo, shape = root / "runs" / "demo", ["--resolution", "16", "16", "--text-length", "8"]
    (demo / "teacher").symlink_to(demo / "tiny_flux")
    words = ["data", "generate", str(demo / "prompts.txt"), "-o", str(demo / "paths_many"), "--trajectories", *shape]
    assert main([*words, "--model", str(demo / "teacher"), "--dtype", "float32", "--shift", "3"]) == 0
    emoji = root / "runs" / "emoji"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert main([*make_small(emoji, monkeypatch), "--only-assets"]) == 0
    (emoji / "teacher").symlink_to(emoji / "tiny_flux")
    return root


def test_all_promised_recipes_exist():
    names = {path.stem for path in CONFIGS}
    assert names >= {
        "flux_dev_lora",
        "flux_dev_full",
        "flux_dev_fewshot",
        "flux_dev_paper",
        "flux_pretrain",
        "krea2_lora",
        "sana_lora",
        "sd35_large_guidance",
        "sd35_large_lora",
        "sd35_large_paper",
        "tiny_pretrain",
        "tiny_pretrain_shortcut",
        "tiny_distill",
        "tiny_emoji_distill",
        "tiny_emoji_pretrain",
        "tiny_trajectories",
    }


@pytest.mark.xdist_group("dry runs")  # a process traces each network once
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dry_run(path, demo_root, monkeypatch, capsys):
    monkeypatch.chdir(demo_root)
    assert main(["train", str(path), "--dry-run", "--estimate"]) == 0
    page = capsys.readouterr().out
    is_tiny = path.name.startswith("tiny")  # its FLOPs do not decide how long it takes
    headings = ("model", "base", "trained", "compute", "this run", "memory", *(() if is_tiny else ("A100-day", "fits")))
    for heading in headings:
        assert re.search(rf"^{heading}", page, re.MULTILINE), heading


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can run it")
@pytest.mark.parametrize("override", ["run.device=cuda", "kernels.cuda_graphs=true", "kernels.attention=cudnn"])
def test_a_dry_run_on_a_machine_that_cannot_run_it(override, capsys):
    assert main(["train", "flux_dev_lora.yaml", "--dry-run", "--estimate", override]) == 0
    page = capsys.readouterr().out
    assert "kernels     unavailable here: " in page and "this run" in page


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_states_command_hardware_hours_and_loss(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("command:", "hardware:", "hours:", "expect:"):
        assert word in header, word
    assert load_config(path).run.dir.startswith("runs/")


def test_all_promised_data_recipes_exist():
    names = {path.stem for path in DATA}
    assert names >= {"laion_pop", "self_generated", "fewshot_10", "cc12m_mds", "digits", "emoji"}


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_data_recipe_works_with_one_argument(path, demo_root, monkeypatch, capsys):
    """With the command of its header."""
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "make:" in header
    use = re.search(r"use: +scfm train (\S+) data=(\S+)(.*)", header)
    assert use and use[2] == path.name
    monkeypatch.chdir(demo_root)
    assert main(["train", use[1], f"data={use[2]}", *use[3].replace("'", "").split(), "--dry-run", "--estimate"]) == 0
    assert "memory" in capsys.readouterr().out


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_arm_of_a_study_is_a_valid_run(path):
    study = load_study(path.stem)
    assert all(arm.about for arm in study.arms.values()) and len(study.seeds) >= 3
    runs = runs_of(study, Path("runs/x"), [])
    configs = [load_config(study.recipe, run.overrides) for run in runs]
    against = [name for name in study.metrics if name.endswith("_data")]
    _check_data(against, list(zip(runs, configs, strict=True)))
    assert len({dump_config(config) for config in configs}) == len(study.arms) * len(study.seeds)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_header_of_a_study(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert ("first:" in header) != bool(load_study(path.stem).first), "one of them says what comes first"
    for word in (f"command:  scfm study {path.stem}", "hardware:", "hours:", "expect:"):
        assert word in header, word


@pytest.mark.parametrize("name", ["tiny_pretrain", "tiny_pretrain_shortcut", "tiny_distill", "tiny_trajectories"])
def test_tiny_recipes_train(name, demo_root, monkeypatch):
    monkeypatch.chdir(demo_root)
    small = ["train.steps=2", "train.warmup_steps=0", "train.global_batch_size=4", "train.micro_batch_size=2"]
    assert main(["train", name, *small, f"run.dir=runs/test_{name}", "sample.steps=[1]"]) == 0
    assert len(Path(f"runs/test_{name}/metrics.jsonl").read_text().splitlines()) == 2


def test_overrides_may_follow_options(capsys):
    assert main(["train", "flux_dev_lora", "train.lr=1e-4", "--dry-run", "--estimate", "train.steps=7"]) == 0
    assert "this run    7 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "flux_dev_lora", "--dryrun"])
    assert "unrecognized arguments: --dryrun" in capsys.readouterr().err


def test_a_run_that_compiles_says_why_its_first_step_takes_minutes(make_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(make_config({"train.compile": True, "train.steps": 1})))
    line = "train.compile: the first steps compile the network's blocks, and take longer\n"
    assert main(["train", str(recipe)]) == 0
    assert line in capsys.readouterr().out
    assert main(["train", str(recipe)]) == 0
    assert line not in capsys.readouterr().out, "all steps are done"


def test_a_recipe_of_generated_data_leaves_the_size_to_the_cache():
    """`scfm data generate --resolution` chooses it; a recipe with another one would refuse the cache."""
    [path] = [path for path in DATA if path.stem == "self_generated"]
    assert set(yaml.safe_load(path.read_text())) == {"path"}
