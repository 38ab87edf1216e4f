"""A wrong command line gives the usage of its subcommand in one line, and what the user may have meant; and what `scfm` shows of itself."""

import shlex
from pathlib import Path

import pytest
import yaml

from recipes.cli import main
from scfm_core.train.parse import load_config

TRAIN = "usage: scfm train config [section.key=value ...] [options]    (--help lists the options)\nscfm train: error: "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian x", "usage: scfm COMMAND [options]    (--help lists the options)\nscfm: error: argument COMMAND: invalid "
         "choice: 'trian'; did you mean train?"),
        ("zzz", "choose from train, sample, evaluate"),
        ("train", f"{TRAIN}the following arguments are required: config\n"),
        ("train x --dry-rum", f"{TRAIN}unrecognized arguments: --dry-rum; did you mean --dry-run?\n"),
        ("train x --steps 10", f"{TRAIN}unrecognized arguments: --steps 10; settings have no dashes: train.steps=10 or "
         "sample.steps=10 or evaluate.steps=10\n"),
        ("train x --train.lr=1e-4", "settings have no dashes: train.lr=1e-4\n"),
        ("train x --learning-rate 1e-4 run.dir=y", "settings have no dashes: train.lr=1e-4\n"),
        ("train x --dry-run run.dir=y --verbose", f"{TRAIN}unrecognized arguments: --verbose\n"),
        ("status x y", "usage: scfm status run_dir [options]    (--help lists the options)\nscfm status: error: unrecognized "
         "arguments: y\n"),
        ("data encode x", "usage: scfm data encode source [data.key=value ...] --output OUTPUT --model MODEL [options]"),
        ("data encode x --model m -o z --resolutoin 8 8", "did you mean --resolution?\n"),
        ("data pack x -o y --to tar", "argument --to: invalid choice: 'tar'; choose from webdataset, mds"),
        ("checkpoint verif x", "invalid choice: 'verif'; did you mean verify?"),
    ],
    ids=lambda value: value if len(value) < 40 else None,
)  # fmt: skip
def test_usage_errors(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(words))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sample runs/x 'a red fox'", "'a red fox' is not of the form section.key=value. A prompt: --prompt 'a red fox'\n"),
        ("train flux_dev_lora.yaml --gpus 8", "torchrun --nproc-per-node 8 --no-python scfm train flux_dev_lora.yaml\n"),
        ("data inspect x resolution=[8,8]", "not of the form data.key=value; did you mean data.resolution=[8,8]?\n"),
        ("data inspect gone.yaml", "on the command line: data: there is no file 'gone.yaml'. Shipped data recipes: cc12m"),
        ("train flux_dev_lora.yaml train.lr=0 lr=1", "2 mistakes in the configuration:\n"),
        ("train flux_dev_lora.yaml train.lr=0 --show-config", "train.lr and train.clip_norm must be positive"),
    ],
)  # fmt: skip
def test_hints(words, message, capsys):
    assert main(shlex.split(words)) == 2
    assert message in capsys.readouterr().err


class TestShowConfig:
    def test_it_can_be_read_back(self, tmp_path, capsys):
        overrides = [
            "data=laion_pop.yaml",
            "method.step_gain.gamma=1",
            "sample.prompts=['a: #1', \"x'\\n猫\", '~', 'no', '']",
        ]
        overrides += ["data.sources.0.weight=2", "train.clip_norm=.inf", "run.dir='1e3'"]
        assert main(["train", "flux_dev_lora.yaml", *overrides, "--show-config"]) == 0
        (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
        assert load_config(tmp_path / "mine.yaml") == load_config("flux_dev_lora.yaml", overrides)
        assert main(["train", str(tmp_path / "mine.yaml"), "--show-config"]) == 0
        assert "# default" not in capsys.readouterr().out

    def test_each_value_has_its_place(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        Path("mine.yaml").write_text("run: {dir: x}\nmodel:\n  path: y\ndata: photos.yaml\ntrain: {lr: 1.0e-3}\n")
        Path("photos.yaml").write_text("path: photos\nseed: none\n")
        assert main(["train", "mine.yaml", "train.steps=7", "data.verify=false", "--show-config"]) == 0
        shown = capsys.readouterr().out
        places = {tuple(part.strip() for part in line.split("  # ")) for line in shown.splitlines() if "  # " in line}
        assert {
            ("dir: x", "mine.yaml, line 1"),
            ("path: y", "mine.yaml, line 3"),
            ("path: photos", "photos.yaml, line 1"),
            ("seed: null", "photos.yaml, line 2"),
            ("lr: 0.001", "mine.yaml, line 5"),
            ("steps: 7", "on the command line"),
            ("verify: false", "on the command line"),
            ("global_batch_size: 16", "default"),
        } <= places
        [section] = [yaml.safe_load(shown)["data"]]
        assert section["verify"] is False


def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert (
        "  flux_dev_lora.yaml           Flux.1-dev -> a 3-step sampler: step-scaled SCFM, LoRA rank 64 on all 504 linears\n"
        in shown
    )
    assert all(title in shown for title in ("\nstudies:\n", "\ndata recipes:\n", "  laion_pop.yaml "))


def test_recipes_and_job_scripts_are_copied(tmp_path, capsys):
    assert main(["recipes", "--copy", str(tmp_path)]) == 0
    assert (tmp_path / "recipes" / "configs" / "study" / "digits.yaml").is_file()
    assert (tmp_path / "slurm" / "distill_flux.sh").stat().st_mode & 0o100
    assert (tmp_path / "slurm" / "clusters" / "example.env").is_file()
    assert main(["recipes", "--copy", str(tmp_path)]) == 0  # nothing would change
    edited = tmp_path / "slurm" / "lib.sh"
    edited.write_text("mine")
    assert main(["recipes", "--copy", str(tmp_path)]) == 2
    assert f"1 files exist and differ, the first is {edited}" in capsys.readouterr().err
    assert edited.read_text() == "mine"
