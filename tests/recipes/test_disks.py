"""Full and read-only disks: every command looks at its place before the work, and no figure is lost."""

import errno
import os
from pathlib import Path

import pytest
import torch

from recipes import evaluate as evaluate_module
from recipes import report as report_module
from recipes.cli import main
from scfm_core import files
from scfm_core.errors import UserError
from scfm_core.files import machine, renamed_at_end, written_whole
from scfm_core.train import checkpoint
from scfm_core.train.history import write_event
from scfm_core.train.parse import dump_config


@pytest.fixture
def run_dir(make_config, tmp_path):
    """A run's folder with its configuration and one row of metrics."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(make_config()))
    (folder / "metrics.jsonl").write_text('{"step": 1, "samples": 8, "seconds": 1.0, "loss": 1.0, "grad_norm": 1.0}\n')
    return folder


@pytest.fixture(params=[errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def bad_disk(request, monkeypatch):
    """Nothing can be written, and the work does not begin; gives the reason in the message."""

    def fail(path: Path, *_: object) -> None:
        raise OSError(request.param, os.strerror(request.param), str(path))

    def work(*_: object, **__: object) -> None:
        pytest.fail("it began to work")

    monkeypatch.setattr(Path, "write_bytes", fail)
    monkeypatch.setattr(checkpoint, "verify_checkpoint", work)
    monkeypatch.setattr(report_module, "_training_plot", work)
    return {errno.ENOSPC: "the disk is full", errno.EROFS: "the file system is read-only"}[request.param]


@pytest.mark.parametrize(
    "command",
    [
        "train RUN/config.yaml",
        "evaluate RUN",
        "sample RUN --prompt x",
        "sample RUN --prompt x --output RUN/new/folder",
        "export RUN",
        "export RUN --merged RUN/merged --steps 3",
        "report RUN",
        "checkpoint convert RUN RUN/converted --to dcp",
        "job run-dir RUN/config.yaml",
    ],
)
def test_is_found_before_the_work(run_dir, bad_disk, command, capsys):
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    if "--merged" in command:
        command += " method.step_gain.gamma=0.5"
    assert main(command.replace("RUN", str(run_dir)).split()) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert f"cannot be written ({bad_disk})" in errors[0]
    after = {
        path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name not in (".lock", "history.jsonl")
    }
    assert after == before, "it left something"


def test_the_figures_of_an_evaluation_are_printed_anyway(run_dir, monkeypatch, capsys):
    class Fake:
        has_teacher, prompts, count = False, ["x"], 1
        images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)

        def __init__(self, folder: Path, _: object) -> None:
            self.folder, self.key, self.checkpoint = folder / ".evaluation", "0", "step_00000001"

        def plan(self, steps: list[int]) -> str:
            return ""

        def measure(self, role: str, steps: int) -> dict[str, float]:
            return {"fid_data": 12.5 + steps}

    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate_module, "Evaluator", Fake)
    monkeypatch.setattr(evaluate_module, "save_grid", full)
    assert main(["evaluate", str(run_dir)]) == 2
    printed = capsys.readouterr()
    assert [line.split() for line in printed.out.splitlines()[-2:]] == [
        ["steps", "1", "3"], [*["Fréchet", "distance", "to", "the", "data", "student"], "13.5", "15.5"]
    ]  # fmt: skip
    assert "evaluation.json cannot be written (the disk is full)" in printed.err


def test_the_verdict_of_a_job_is_printed_anyway(run_dir, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_event(run_dir, "end", how="stopped", step=1, reason="SIGTERM")
    monkeypatch.setattr("recipes.job.write_event", full)
    assert main(["job", "verdict", str(run_dir), "--exit-code", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "requeue\n"
    assert "it could not be recorded: [Errno 28]" in printed.err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EROFS, "Read-only file system", "x/y"), "Read-only file system: 'x/y'"),
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), "Permission denied: 'x/y'"),
        (RuntimeError("IoError(Os { code: 28, message: No space left on device })"), "No space left on device"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "No usable temporary directory"),
    ],
    ids=["read-only", "forbidden", "of a library", "temporary files"],
)
def test_of_any_place_is_one_message(tmp_path, monkeypatch, capsys, error, message):
    """Also where no command looks before."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("recipes.status.status", fail)
    assert main(["status", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scfm: error: ") and message in line


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "figure.json"
    with written_whole(path, "x", "y") as partial:
        partial.write_text("first")
    (path.parent / f".figure.{machine()}-{2**22 + 1}-0.tmp.json").write_text("of a process that was killed")
    for error in (KeyError, KeyboardInterrupt):
        with pytest.raises(error), written_whole(path, "x", "y") as partial:
            partial.write_text("sec")
            raise error
    assert [file.read_text() for file in path.parent.iterdir()] == ["first"]


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    """The first that ends has it. What a killed process left goes."""
    path = tmp_path / "new" / "pipeline"
    left = path.with_name(f".pipeline.{machine()}-{2**22 + 1}-0.tmp")
    left.mkdir(parents=True)
    with pytest.raises(UserError, match="exists already: another process has written it"), renamed_at_end(path) as late:
        late.mkdir()
        with renamed_at_end(path) as early:
            early.mkdir()
            (early / "of").write_text("early")
        (late / "of").write_text("late")
    assert [entry.name for entry in path.parent.iterdir()] == ["pipeline"]
    assert (path / "of").read_text() == "early"


def test_two_containers_of_one_machine_do_not_mix(tmp_path, monkeypatch):
    """With one name, one folder and process numbers of their own: neither takes the other's file for what a killed process left."""
    path, own = tmp_path / "manifest.json", machine()
    with renamed_at_end(path) as partial:
        partial.write_text("of the first")
        monkeypatch.setattr(files, "_is_alive", lambda process: False)
        monkeypatch.setattr(files, "machine", lambda: own.replace(str(os.stat("/proc/self/ns/pid").st_ino), "1"))
        with renamed_at_end(path) as other:
            other.write_text("of the second")
        assert path.read_text() == "of the second"
    assert path.read_text() == "of the first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


def test_a_full_disk_does_not_empty_the_configuration_of_a_run(run_dir, monkeypatch, capsys):
    """It would end every later start: the run could not be resumed."""
    before = (run_dir / "config.yaml").read_text()

    def full(path: Path, text: str, **_: object) -> None:
        path.open("w").close()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    (run_dir / "metrics.jsonl").unlink()
    (run_dir.parent / "recipe.yaml").write_text(before)
    monkeypatch.setattr(Path, "write_text", full)
    assert main(["train", str(run_dir.parent / "recipe.yaml"), "train.steps=9"]) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert (run_dir / "config.yaml").read_text() == before
