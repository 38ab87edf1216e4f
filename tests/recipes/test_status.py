"""A run's history, the output of `scfm status`, and the decisions of a batch job."""

import json
import re
import shutil
import socket
import subprocess
import sys

import pytest

from recipes.cli import main
from recipes.job import verdict
from recipes.status import status
from scfm_core.errors import UserError
from scfm_core.train.history import HISTORY, Start, read_history, write_event
from scfm_core.train.metrics import MetricsFile
from scfm_core.train.run_dir import locked


def make_checkpoint(run_dir, step):
    """Make a folder that looks like a complete checkpoint: its name and a manifest."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


class TestHistory:
    def test_a_finished_run(self, tmp_path):
        with Start(tmp_path).recorded() as start:
            start.begin(0, 10, 4)
            start.end("finished", 10)
        first, last = read_history(tmp_path)
        assert (first["event"], first["step"], first["steps"], first["processes"]) == ("start", 0, 10, 4)
        assert (last["event"], last["how"], last["step"]) == ("end", "finished", 10)

    def test_a_user_error_before_training_is_a_refusal(self, tmp_path):
        with pytest.raises(UserError), Start(tmp_path).recorded():
            raise UserError("data.path: no")
        assert [(row["how"], row["reason"]) for row in read_history(tmp_path)] == [("refused", "data.path: no")]

    @pytest.mark.parametrize("error", [UserError("storage is gone"), KeyError("x"), KeyboardInterrupt()], ids=repr)
    def test_an_exception_during_training_is_a_failure(self, tmp_path, error):
        with pytest.raises(type(error)), Start(tmp_path).recorded() as start:
            start.begin(3, 10, 1)
            raise error
        assert read_history(tmp_path)[-1]["how"] == "failed"

    def test_secrets_are_removed(self, tmp_path, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-77aa")
        with pytest.raises(RuntimeError), Start(tmp_path).recorded():
            raise RuntimeError("s3 said canary-77aa at https://me:canary@host/x?sig=canary")
        text = (tmp_path / HISTORY).read_text()
        assert "RuntimeError: s3 said" in text
        assert "canary" not in text

    def test_other_ranks_write_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with Start(None).recorded() as start:
            start.begin(0, 1, 2)
            start.end("finished", 1)
        assert not list(tmp_path.iterdir())

    def test_names_the_job(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        write_event(tmp_path, "start")
        assert [(row["job"], row["requeued"]) for row in read_history(tmp_path)] == [("17", 2)]

    def test_incomplete_lines_are_ignored(self, tmp_path):
        write_event(tmp_path, "start")
        with (tmp_path / HISTORY).open("a") as file:
            file.write('{"event": "e')
        assert [row["event"] for row in read_history(tmp_path)] == ["start"]
        write_event(tmp_path, "end", how="finished", step=1, reason=None)
        assert [row["event"] for row in read_history(tmp_path)] == ["start", "end"], "it was glued to the cut line"


class TestVerdict:
    def begin(self, run_dir, how=None, reason=None, step=0):
        write_event(run_dir, "start", step=step, steps=10, processes=2, host="h")
        if how is not None:
            write_event(run_dir, "end", how=how, step=step, reason=reason)

    def judge(self, run_dir, exit_code=1, cancelled=False, retries=2):
        return verdict(run_dir, exit_code=exit_code, cancelled=cancelled, retries=retries)

    @pytest.mark.parametrize(
        ("how", "exit_code", "cancelled", "expected"),
        [
            ("finished", 0, False, "finished"),
            ("finished", 0, True, "finished"),  # cancelled too late
            ("finished", 1, False, "finished"),  # a rank fails after the end
            ("stopped", 1, False, "requeue"),
            ("stopped", 0, False, "requeue"),
            ("stopped", 1, True, "cancelled"),
            ("refused", 1, False, "failed"),
            ("refused", 1, True, "cancelled"),
            ("failed", 1, False, "requeue"),
            (None, 137, False, "requeue"),
            (None, 0, False, "requeue"),
            (None, 143, True, "cancelled"),
        ],
    )
    def test_follows_from_the_end_of_the_run(self, tmp_path, how, exit_code, cancelled, expected):
        self.begin(tmp_path, how)
        assert self.judge(tmp_path, exit_code, cancelled)[0] == expected

    def test_gives_the_reason(self, tmp_path):
        self.begin(tmp_path, "refused", "data.path: there is no folder")
        assert self.judge(tmp_path) == ("failed", "the command is invalid: data.path: there is no folder")

    def test_failures_are_tolerated_up_to_the_limit(self, tmp_path):
        found = []
        for _ in range(3):
            self.begin(tmp_path, "failed", "lost")
            found.append(self.judge(tmp_path))
        assert [each[0] for each in found] == ["requeue", "requeue", "failed"]
        assert "1 of at most 3 times in a row" in found[0][1]
        assert "3 times in a row without a new checkpoint: lost" in found[2][1]

    def test_a_new_checkpoint_resets_the_count(self, tmp_path):
        for step in range(4):
            self.begin(tmp_path)
            make_checkpoint(tmp_path, step)
            assert self.judge(tmp_path, retries=0 if step == 0 else 1)[0] == ("failed" if step == 0 else "requeue")

    def test_a_stop_by_a_signal_resets_the_count(self, tmp_path):
        for how in ("failed", "failed", "stopped", "failed", "failed"):
            self.begin(tmp_path, how)
            assert self.judge(tmp_path)[0] == "requeue"
        self.begin(tmp_path, "failed")
        assert self.judge(tmp_path)[0] == "failed"

    def test_the_end_of_an_earlier_job_is_ignored(self, tmp_path):
        self.begin(tmp_path, "finished")
        self.judge(tmp_path, 0)
        assert self.judge(tmp_path, 0)[0] == "requeue"

    def test_the_command_prints_only_the_verdict(self, tmp_path, capsys):
        self.begin(tmp_path, "stopped", "SIGUSR2")
        assert main(["job", "verdict", str(tmp_path), "--exit-code", "1"]) == 0
        printed = capsys.readouterr()
        assert printed.out == "requeue\n"
        assert printed.err == "stopped by SIGUSR2, to be resumed\n"


class TestStatus:
    def rows(self, run_dir, steps):
        file = MetricsFile(run_dir / "metrics.jsonl", 0)
        for step in range(1, steps + 1):
            file.write({"step": step, "loss": 0.5, "samples": 8 * step, "seconds": 2.0 * step})
        file.close()

    def test_a_running_run(self, tmp_path):
        write_event(tmp_path, "start", step=0, steps=100, processes=16, host="n1")
        self.rows(tmp_path, 30)
        make_checkpoint(tmp_path, 20)
        with locked(tmp_path):
            text = status(tmp_path)
        assert text.startswith(f"{tmp_path}: running\n")
        assert text.endswith("from step 0; running")
        assert "30 of 100 (30.0%)" in text
        assert "4.0 samples/s, 2.00 s a step" in text
        assert "2 min 20 s of training" in text
        assert "loss        0.5\n" in text
        assert re.search(r"step_00000020, \d+ s old", text)
        assert "16 processes on n1, from step 0" in text

    @pytest.mark.parametrize(
        ("host", "expected"),
        [
            (socket.gethostname(), "killed without a message"),
            ("n1", "killed without a message, or running on n1: some file systems do not show locks to other machines"),
        ],
    )
    def test_without_a_lock_it_does_not_run(self, tmp_path, host, expected):
        write_event(tmp_path, "start", step=0, steps=9, processes=1, host=host)
        with locked(tmp_path):
            pass
        lines = status(tmp_path).splitlines()
        assert lines[0] == f"{tmp_path}: {expected}"
        assert lines[-1].endswith(f"from step 0; {expected}")

    def test_a_locked_run_that_has_ended_before_is_starting(self, tmp_path):
        write_event(tmp_path, "start", step=0, steps=9, processes=1, host="a")
        write_event(tmp_path, "end", how="stopped", step=4, reason="SIGTERM")
        with locked(tmp_path):
            assert status(tmp_path).startswith(f"{tmp_path}: starting\n")

    def test_a_job_whose_processes_never_started(self, tmp_path):
        verdict(tmp_path, exit_code=1, cancelled=False, retries=2)
        assert "did not start; lost" in status(tmp_path)

    def test_copies_of_checkpoints_do_not_count(self, tmp_path):
        write_event(tmp_path, "start", step=0, steps=9, processes=1, host="a")
        make_checkpoint(tmp_path, 4)
        for name in ("step_best", "step_00000008 (copy)"):
            shutil.copytree(tmp_path / "checkpoints" / "step_00000004", tmp_path / "checkpoints" / name)
        assert "checkpoint  step_00000004" in status(tmp_path)

    def test_lists_every_start_and_its_end(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        write_event(tmp_path, "start", step=0, steps=9, processes=2, host="a")
        write_event(tmp_path, "end", how="stopped", step=4, reason="SIGUSR2")
        write_event(tmp_path, "job", verdict="requeue", reason="", exit_code=1, checkpoint=None, broke_off=False)
        write_event(tmp_path, "start", step=4, steps=9, processes=2, host="b")
        write_event(
            tmp_path, "job", verdict="requeue", reason="exit code 1", exit_code=1, checkpoint=None, broke_off=True
        )
        write_event(tmp_path, "end", how="refused", step=None, reason="all nodes: no data")
        write_event(tmp_path, "start", step=4, steps=9, processes=4, host="b")
        write_event(tmp_path, "end", how="finished", step=9, reason=None)
        lines = status(tmp_path).splitlines()
        assert lines[0] == f"{tmp_path}: finished"
        ends = [line.split("  ", 3)[-1] for line in lines[-4:]]
        assert [len(re.findall("job 12, ", line)) for line in ends] == [1, 1, 1, 1]
        assert "from step 0; stopped at step 4" in ends[0]
        assert ends[0].endswith(": SIGUSR2")
        assert "from step 4; lost" in ends[1]
        assert ends[1].endswith(": exit code 1")
        assert "refused" in ends[2]
        assert ends[2].endswith("all nodes: no data")
        assert "4 processes on b, from step 4; finished at step 9" in ends[3]

    def test_a_real_run(self, make_config, tmp_path, capsys):
        from scfm_core.train.parse import dump_config

        (tmp_path / "recipe.yaml").write_text(dump_config(make_config()))
        assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
        capsys.readouterr()
        assert main(["status", str(tmp_path / "run")]) == 0
        text = capsys.readouterr().out
        assert f"{tmp_path / 'run'}: finished" in text
        assert "4 of 4 (100.0%)" in text
        assert "step_00000004" in text
        assert [row["event"] for row in read_history(tmp_path / "run")] == ["start", "end"]

    def test_a_folder_without_a_run(self, tmp_path, capsys):
        assert main(["status", str(tmp_path)]) == 2
        assert f"{tmp_path} is not a run: it has no history.jsonl" in capsys.readouterr().err


def test_run_dir_is_checked_created_and_printed(make_config, tmp_path, capsys):
    from scfm_core.train.parse import dump_config

    (tmp_path / "recipe.yaml").write_text(dump_config(make_config()))
    assert main(["job", "run-dir", str(tmp_path / "recipe.yaml"), f"run.dir={tmp_path / 'a' / 'b c'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a' / 'b c'}\n"
    assert (tmp_path / "a" / "b c").is_dir()
    (tmp_path / "file").write_text("")
    assert main(["job", "run-dir", str(tmp_path / "recipe.yaml"), f"run.dir={tmp_path / 'file'}"]) == 2
    assert "run.dir" in capsys.readouterr().err


def test_history_is_json_lines(tmp_path):
    write_event(tmp_path, "end", how="failed", step=None, reason='a "quoted"\nreason')
    (line,) = (tmp_path / HISTORY).read_text().splitlines()
    assert json.loads(line)["reason"] == 'a "quoted"\nreason'


WITHOUT_TORCH = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is not for this command")
sys.meta_path.insert(0, Refused())
from recipes.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.processes
@pytest.mark.parametrize("command", [["status"], ["job", "verdict", "--exit-code", "1"]], ids=["status", "verdict"])
def test_works_without_torch(tmp_path, command):
    write_event(tmp_path, "start", step=0, steps=9, processes=1, host="a")
    make_checkpoint(tmp_path, 4)
    MetricsFile(tmp_path / "metrics.jsonl", 0).close()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
