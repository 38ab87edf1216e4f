"""`--resume auto | never | PATH`, and its errors. `test_kill.py` proves that the result is bitwise the same."""

import fcntl
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load
from tiny_fixtures import adapter_file, adapter_metadata

from recipes.cli import main
from scfm_core.train.checkpoint import find_checkpoint, load_checkpoint
from scfm_core.train.history import read_history
from scfm_core.train.parse import dump_config


@pytest.fixture
def recipe(make_config, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(make_config({"train.steps": 6, "checkpoint.every": 2, "checkpoint.keep": 9})))
    return path


@pytest.fixture
def run_dir(recipe, tmp_path):
    """A finished run of six steps."""
    assert main(["train", str(recipe)]) == 0
    return tmp_path / "run"


def steps(run_dir):
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def saved(run_dir):
    """Names of the checkpoints; `latest` must name the newest of them."""
    folder = run_dir / "checkpoints"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert {path.name for path in folder.iterdir()} - set(names) == {"latest"}
    assert (folder / "latest").read_text() == names[-1]
    return names


def test_resume_never_keeps_the_earlier_attempt(recipe, run_dir):
    before = losses(run_dir)
    assert main(["train", str(recipe), "--resume", "never", "train.steps=2"]) == 0
    assert steps(run_dir) == [1, 2]
    assert losses(run_dir / "previous-1") == before
    assert saved(run_dir / "previous-1") == [f"step_{step:08d}" for step in (2, 4, 6)]


def test_resume_never_moves_no_file_if_the_new_run_cannot_start(recipe, run_dir):
    assert main(["train", str(recipe), "--resume", "never", "data.path=nowhere"]) == 2
    assert steps(run_dir) == [1, 2, 3, 4, 5, 6]
    assert not (run_dir / "previous-1").exists()


def test_going_back_in_the_same_run(recipe, run_dir, capsys):
    before = losses(run_dir)
    target = run_dir / "checkpoints" / "step_00000002"
    assert main(["train", str(recipe), "--resume", str(target), "train.steps=4", "train.lr=5e-4"]) == 0
    assert "train.lr changes from 0.001 to 0.0005" in capsys.readouterr().out
    assert steps(run_dir) == [1, 2, 3, 4]
    # The third loss comes from the weights of the second step; the fourth changes with the lower rate.
    assert losses(run_dir)[:3] == before[:3]
    assert losses(run_dir)[3] != before[3]
    assert saved(run_dir) == ["step_00000002", "step_00000004"]
    kept = sorted(path.name for path in (run_dir / "previous-1").iterdir())
    assert kept == ["step_00000004", "step_00000006"]


def test_going_back_updates_latest(recipe, run_dir):
    """If the run is killed before its next checkpoint, `latest` must not name one that was moved."""
    target = run_dir / "checkpoints" / "step_00000002"
    assert main(["train", str(recipe), "--resume", str(target), "train.steps=2"]) == 0
    assert saved(run_dir) == ["step_00000002"]


def test_latest_names_the_copy_after_resuming_from_another_run(recipe, run_dir, tmp_path, monkeypatch):
    """Also if it is called in the folder of the checkpoint."""
    command = ["train", str(recipe), f"run.dir={tmp_path / 'other'}"]
    monkeypatch.chdir(run_dir / "checkpoints")
    assert main([*command, "--resume", "step_00000004", "train.steps=4"]) == 0
    assert saved(tmp_path / "other") == ["step_00000004"]
    assert find_checkpoint(tmp_path / "other").name == "step_00000004"


def test_resuming_from_another_run(recipe, run_dir, tmp_path):
    other = tmp_path / "other"
    command = ["train", str(recipe), f"run.dir={other}"]
    assert main([*command, "--resume", str(run_dir), "train.steps=8"]) == 0
    assert steps(other) == list(range(1, 9))
    assert losses(other)[:6] == losses(run_dir)
    assert saved(other) == ["step_00000006", "step_00000008"]
    assert main([*command, "train.steps=9"]) == 0
    assert steps(other) == list(range(1, 10))


def test_checkpoints_written_on_a_thread_are_the_same(recipe, run_dir, tmp_path):
    other = tmp_path / "other"
    assert main(["train", str(recipe), f"run.dir={other}", "checkpoint.asynchronous=true"]) == 0
    assert saved(other) == saved(run_dir) == [f"step_{step:08d}" for step in (2, 4, 6)]
    for name in saved(other):
        one, two = (load_checkpoint(folder / "checkpoints" / name) for folder in (other, run_dir))
        assert one.reader.shapes == two.reader.shapes
        assert all(torch.equal(one.reader.tensor(key), two.reader.tensor(key)) for key in one.reader.shapes)
        assert {key for key in one.state if one.state[key] != two.state[key]} <= {"seconds", "config"}
    assert main(["train", str(recipe), f"run.dir={other}", "train.steps=7"]) == 0
    assert losses(other)[:6] == losses(run_dir)


def test_a_run_without_an_intact_checkpoint_does_not_start_over(recipe, run_dir, capsys):
    for path in (run_dir / "checkpoints").glob("step_*"):
        os.truncate(path / "dcp" / "__0_0.distcp", 10)
    assert main(["train", str(recipe), "train.steps=7"]) == 2
    assert "none of the 3 checkpoints" in capsys.readouterr().err
    assert steps(run_dir) == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_skipped_with_a_message(recipe, run_dir, capsys):
    whole = losses(run_dir)
    os.truncate(run_dir / "checkpoints" / "step_00000006" / "dcp" / "__0_0.distcp", 10)
    assert main(["train", str(recipe)]) == 0
    output = capsys.readouterr().out
    assert "step_00000006 is damaged: dcp/__0_0.distcp differs" in output
    assert "step_00000004 at step 4" in output
    assert losses(run_dir) == whole
    assert find_checkpoint(run_dir).name == "step_00000006"


def test_one_run_at_a_time(recipe, run_dir, capsys):
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["train", str(recipe)]) == 75
    assert f"another scfm train is running in {run_dir}" in capsys.readouterr().err
    assert main(["train", str(recipe)]) == 0


def test_another_base_in_the_same_folder_is_an_error(recipe, run_dir, tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny / "flux", tmp_path / "flux")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x80\x3f")
    assert main(["train", str(recipe), f"model.path={folder}", "train.steps=8"]) == 2
    assert "was trained on another model" in capsys.readouterr().err
    assert main(["sample", str(run_dir), f"model.path={folder}", "--prompt", "x"]) == 2
    assert "is not the model that" in capsys.readouterr().err


def test_a_run_can_be_used_from_any_folder(recipe, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny)
    words = [
        "model.path=flux",
        "data.path=cache",
        "evaluate.features_path=classifier",
        f"run.dir={tmp_path / 'my run'}",
    ]
    assert main(["train", str(recipe), *words]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "my run", "--prompt", "a handwritten digit one", "--steps", "1"]) == 0
    assert main(["evaluate", "my run"]) == 0


def test_every_start_exports_the_adapter_again(recipe, run_dir):
    """A run killed between its last checkpoint and the export has an old adapter."""
    path = adapter_file(run_dir / "adapter")
    final, metadata = load(path.read_bytes()), adapter_metadata(path)
    path.write_bytes(b"stale")
    assert main(["train", str(recipe), "sample.guidance=2.0"]) == 0
    again = load(path.read_bytes())
    assert again.keys() == final.keys() and all(torch.equal(again[name], final[name]) for name in final)
    # Those of the run's own settings: this command's have no effect. The order of keys in the file is random.
    assert adapter_metadata(path) == metadata and metadata["guidance"] == 3.5


def test_a_missing_last_grid_is_made(recipe, run_dir):
    words = ["sample.every=2", "sample.prompts=[a handwritten digit one]", "sample.steps=[1]"]
    assert main(["train", str(recipe), *words, "train.steps=8"]) == 0
    grids = sorted(path.name for path in (run_dir / "samples").glob("step_*.png"))
    assert grids == ["step_00000006.png", "step_00000008.png"]


def test_the_record_of_a_finished_run_is_kept(recipe, run_dir, capsys):
    before = (run_dir / "config.yaml").read_text()
    assert main(["train", str(recipe), "train.lr=5e-2"]) == 0
    text = capsys.readouterr().out
    assert "nothing to do" in text and "train.lr: 0.001 in the run, 0.05 now" in text
    assert (run_dir / "config.yaml").read_text() == before
    assert main(["train", str(recipe), "train.steps=3"]) == 0
    assert "has its 6 steps\n" in capsys.readouterr().out


def test_the_history_names_settings_that_change_when_a_run_resumes(recipe, run_dir):
    assert main(["train", str(recipe), "train.lr=5e-2", "train.steps=7"]) == 0
    starts = [row for row in read_history(run_dir) if row["event"] == "start"]
    assert "changed" not in starts[0]
    assert starts[1]["changed"] == {"train.lr": [0.001, 0.05], "train.steps": [6, 7]}
    assert "lr: 0.05" in (run_dir / "config.yaml").read_text()
