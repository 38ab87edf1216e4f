"""What a batch job asks about its run, when two jobs have the same run. The verdicts of one job: test_status.py."""

import json
import os
import socket

import pytest
import yaml

from recipes.cli import main
from recipes.health import check_health
from recipes.job import verdict
from recipes.status import status
from scfm_core.errors import RunBusy, UserError
from scfm_core.train.history import HISTORY, read_history, write_event
from scfm_core.train.parse import to_plain
from scfm_core.train.run_dir import holder, locked


@pytest.fixture
def recipe(make_config, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(to_plain(make_config())))
    return path


@pytest.fixture
def in_job(monkeypatch):
    """Call it with a job's number, and with how often Slurm has requeued it: what follows runs in that job."""

    def enter(job, requeued=0):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(requeued))

    return enter


def start(run_dir, how=None, reason=None):
    run_dir.mkdir(exist_ok=True)
    write_event(run_dir, "start", step=0, steps=10, processes=2, host="n1")
    if how is not None:
        write_event(run_dir, "end", how=how, step=0, reason=reason)


def judge(run_dir, exit_code=1, retries=3, cancelled=False):
    return verdict(run_dir, exit_code=exit_code, cancelled=cancelled, retries=retries)


class TestSubmittedTwice:
    def test_the_second_leaves_the_retries_to_the_first(self, tmp_path, in_job):
        """Also if it is requeued and comes again and again."""
        in_job("17")
        start(tmp_path)
        with locked(tmp_path):
            before = (tmp_path / HISTORY).read_bytes()
            for requeued in range(5):
                in_job("18", requeued)
                found, why = judge(tmp_path)
                assert found == "busy"
                assert f"job 17, process {os.getpid()} on {socket.gethostname()}" in why
            assert judge(tmp_path, cancelled=True)[0] == "busy"
            assert (tmp_path / HISTORY).read_bytes() == before
            assert status(tmp_path).startswith(f"{tmp_path}: running\n")
        in_job("17")
        found, why = judge(tmp_path)
        assert (found, why[:44]) == ("requeue", "it failed (1 of at most 4 times in a row): th"[:44])

    def test_a_job_knows_only_its_own_ends_and_failures(self, tmp_path, in_job):
        """After an earlier job that has used up its retries, or that was stopped, the next one has all of its own."""
        in_job("17")
        for _ in range(4):
            start(tmp_path, "failed", "lost")
            found = judge(tmp_path)
        assert found[0] == "failed"
        in_job("18")
        start(tmp_path)
        in_job("19")
        start(tmp_path, "stopped", "SIGUSR2")
        in_job("18")
        assert judge(tmp_path)[1].startswith(
            "it failed (1 of at most 4 times in a row): the processes ended with exit code 1"
        )
        in_job("19")
        assert judge(tmp_path) == ("requeue", "stopped by SIGUSR2, to be resumed")

    def test_it_is_refused_before_its_nodes_start(self, recipe, tmp_path, in_job, capsys):
        in_job("18")
        (tmp_path / "run").mkdir()
        assert main(["job", "run-dir", str(recipe)]) == 0
        in_job("17")
        with locked(tmp_path / "run"):
            in_job("18")
            assert main(["job", "run-dir", str(recipe)]) == RunBusy.exit_code == 75
            printed = capsys.readouterr().err
            assert f"another scfm train is running in {tmp_path / 'run'}: job 17, process {os.getpid()} on" in printed
            assert "--dependency=afterany:17" in printed
            in_job(
                "17", 1
            )  # its own earlier start may still run on a lost node: a failure like others, to be tried again
            assert main(["job", "run-dir", str(recipe)]) == 0

    def test_its_health_check_writes_nothing_into_the_others_record(self, recipe, tmp_path, in_job):
        in_job("17")
        start(tmp_path / "run")
        with locked(tmp_path / "run"):
            in_job("18")
            with pytest.raises(UserError, match="the run cannot work"):
                check_health(str(recipe), ["data.path=/nowhere"])
        assert [row["event"] for row in read_history(tmp_path / "run")] == ["start"]

    def test_training_names_the_holder(self, tmp_path, in_job):
        in_job("17")
        with locked(tmp_path):
            in_job("18")
            with (
                pytest.raises(RunBusy, match=r"is running in .*: job 17, process \d+ on .*, since 20\d\d-"),
                locked(tmp_path),
            ):
                pass


class TestHolder:
    def test_nobody(self, tmp_path):
        assert holder(tmp_path) is None
        with locked(tmp_path):
            pass
        assert holder(tmp_path) is None

    def test_without_a_job(self, tmp_path, monkeypatch):
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        with locked(tmp_path):
            found = holder(tmp_path)
        assert str(found).startswith(f"process {os.getpid()} on {socket.gethostname()}, since 20")

    @pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"host": 3})])
    def test_a_lock_that_says_nothing(self, tmp_path, content):
        """Of an older version, or not yet written."""
        with locked(tmp_path):
            (tmp_path / ".lock").write_text(content)
            assert str(holder(tmp_path)) == "a process that is unknown"
