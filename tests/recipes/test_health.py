"""`scfm health` names every node that cannot run; with real processes."""

import contextlib
import io
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from launch import run_distributed

from recipes import health
from recipes.cli import main
from recipes.health import Report, check_health, find_problems, time_all_reduce
from scfm_core.distributed.world import World
from scfm_core.errors import UserError
from scfm_core.progress import beat
from scfm_core.train import estimate
from scfm_core.train.history import read_history
from scfm_core.train.parse import to_plain

ROOT = Path(__file__).parents[2]


def reports(**changes):
    """Reports of two processes on each of three nodes; `n2__clock=...` changes those of a node."""
    found = [Report(node=f"n{n}", clock=1e9, versions={"torch": "2.10"}, device="A100") for n in (1, 1, 2, 2, 3, 3)]
    for key, value in changes.items():
        node, _, name = key.partition("__")
        for report in found:
            if report.node == node:
                setattr(report, name, value)
    return found


@pytest.fixture
def recipe(make_config, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(to_plain(make_config())))
    return path


class TestComparison:
    def test_equal_nodes_have_no_problem(self):
        assert find_problems(reports(n2__clock=1e9 + 1)) == []

    def test_names_the_node_with_another_version(self):
        assert find_problems(reports(n2__versions={"torch": "2.9"})) == ["n2: torch 2.9, the others have 2.10"]

    def test_names_the_node_whose_clock_is_off(self):
        (problem,) = find_problems(reports(n3__clock=1e9 - 90))
        assert problem.startswith("n3: its clock is 90 s behind")
        (problem,) = find_problems(reports(n1__clock=1e9 + 60))
        assert problem.startswith("n1: its clock is 60 s ahead")

    def test_names_the_node_with_another_gpu(self):
        assert find_problems(reports(n1__device="V100")) == ["n1: V100, the others have A100"]

    def test_a_problem_of_several_nodes_is_listed_once(self):
        found = find_problems(reports(n1__faults=["GPU 0 is taken"], n2__faults=["GPU 0 is taken", "no disk"]))
        assert found == ["n1, n2: GPU 0 is taken", "n2: no disk"]

    def test_a_problem_of_all_nodes_is_the_runs(self):
        everywhere = {f"n{n}__{kind}": ["no folder"] for n in (1, 2, 3) for kind in ("problems", "faults")}
        assert find_problems(reports(**everywhere)) == ["all nodes: no folder"]

    def test_the_only_node_may_be_at_fault_itself(self):
        """Then a job that is requeued may get a better one."""
        report = Report(node="n1", problems=["data: no folder"], faults=["GPU 0 is taken"])
        assert find_problems([report]) == ["all nodes: data: no folder", "n1: GPU 0 is taken"]


class TestOneProcess:
    def test_no_problem(self, recipe, capsys):
        assert main(["health", str(recipe)]) == 0
        text = capsys.readouterr().out
        assert "health: 1 node fit, 1 processes on cpu" in text
        assert "torch 2." in text

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("data.path=/nowhere", "all nodes: data: there is no folder '/nowhere'"),
            ("model.path=/nowhere", "all nodes: model.path"),
            ("run.dir=/proc/run", "all nodes: run.dir: /proc"),
        ],
    )
    def test_problems_of_the_run(self, recipe, override, message):
        with pytest.raises(UserError, match="the run cannot work with these settings") as caught:
            check_health(str(recipe), [override])
        assert message in str(caught.value)

    def test_full_disk(self, recipe, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**9))
        monkeypatch.setenv("SLURMD_NODENAME", "n7")
        with pytest.raises(
            UserError, match=r"n7: TMPDIR: .* has 1\.0 GB free, less than the 5\.0 GB that a run needs there"
        ):
            check_health(str(recipe), [])

    def test_the_disk_holds_the_runs_checkpoints(self, recipe, tmp_path, monkeypatch):
        """They are larger than any fixed figure: three of 100 GB, of which a resumed run has two already."""
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 200 * 10**9))
        monkeypatch.setattr(estimate, "checkpoint_bytes", lambda *_: {"dcp": 1e11})
        words = r"run\.dir: .*run has 200\.0 GB free, less than the 301\.0 GB that a run needs there"
        with pytest.raises(UserError, match=words):
            check_health(str(recipe), [])
        for step in (1, 2):
            folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / "dcp"
            folder.mkdir(parents=True)
            with (folder / "__0_0.distcp").open("wb") as file:
                file.truncate(10**11)  # it takes no room
        check_health(str(recipe), [])

    def test_writes_to_the_runs_history(self, recipe, tmp_path):
        (tmp_path / "run").mkdir()
        with pytest.raises(UserError):
            check_health(str(recipe), ["data.path=/nowhere"])
        (row,) = read_history(tmp_path / "run")
        assert (row["event"], row["how"]) == ("end", "refused")
        assert "/nowhere" in row["reason"]

    def test_wrong_sum(self, monkeypatch):
        """One element of the all-reduce is wrong."""
        monkeypatch.setattr(health.dist, "barrier", lambda: None)
        monkeypatch.setattr(health.dist, "all_reduce", lambda tensor: tensor.mul_(2)[5].add_(1))
        with pytest.raises(UserError, match="an all-reduce of ones over 2 processes gave a wrong sum"):
            time_all_reduce(World(0, 2), torch.device("cpu"), size=4096)


def health_of_a_node(recipe, homes):
    """In a rank, which acts as a node: run `scfm health` with this home; returns its exit code and its output."""
    rank = int(os.environ["RANK"])
    os.environ |= {"SLURMD_NODENAME": f"n{rank}", "LOCAL_RANK": "0", "HOME": homes[rank]}
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        code = main(["health", str(recipe), "data.cache.dir=~/cache"])
    return code, printed.getvalue()


@pytest.mark.processes
def test_the_bad_node_is_named(recipe, tmp_path):
    """Its home, which has the cache of shards, cannot be written."""
    (tmp_path / "run").mkdir()
    (first, said), (second, silent) = run_distributed(health_of_a_node, 2, recipe, [str(tmp_path), "/proc"])
    assert (first, second) == (2, 2)
    assert said.count("n1: data.cache.dir: /proc/cache has 0.0 GB free") == 1
    assert "n0:" not in said
    assert silent == ""  # only rank 0 prints
    assert read_history(tmp_path / "run")[0]["how"] == "failed"  # on other nodes it may work


SLOW = 4.0
"""Seconds without any progress that end the health check of these tests."""


def health_with_a_fault(recipe, how, said):
    """In a rank, which acts as a node: `scfm health`, in which rank 1 does something; returns its exit code."""
    rank = int(os.environ["RANK"])
    os.environ |= {"SLURMD_NODENAME": f"n{rank}", "LOCAL_RANK": "0"}
    all_reduce, corpus = dist.all_reduce, health.Corpus

    def open_data(config):
        for _ in range(5):
            time.sleep(SLOW / 4)
            beat("reading a manifest")
        return corpus(config)

    def raise_defect(config):
        raise IndexError("a defect of ours")

    if rank == 1 and how == "slow data":
        health.Corpus = open_data
    elif rank == 1 and how == "hung data":
        health.Corpus = lambda config: time.sleep(600)
    elif rank == 1 and how == "defect":
        health.Corpus = raise_defect
    elif how == "hung network":
        health._NETWORK_TIMEOUT = SLOW
        dist.all_reduce = all_reduce if rank == 0 else lambda tensor: time.sleep(600)
    timeout = 600 if how == "hung network" else SLOW
    # The watchdog ends the process at once: what it says must be in a file.
    with Path(f"{said}.{rank}").open("w") as stream, contextlib.redirect_stderr(stream):
        return main(["health", str(recipe), f"engine.timeout={timeout}"])


@pytest.mark.timed
@pytest.mark.processes
@pytest.mark.parametrize(
    ("how", "codes", "message"),
    [
        ("slow data", [0, 0], None),
        (
            "hung data",
            [70, 70],
            f"rank 1 has been at the check of data for more than engine.timeout={SLOW:g} s: no progress: ",
        ),
        ("hung network", [70, 70], f"rank 1 has been at the all-reduce for more than {SLOW:g} s: no progress: "),
        ("defect", [70, 1], None),
    ],
)
def test_its_phases_are_those_of_training(how, codes, message, recipe, tmp_path):
    """Local work may be slow as long as it progresses; what hangs ends, and is named by its rank."""
    said = tmp_path / "said"
    outcomes = run_distributed(health_with_a_fault, 2, recipe, how, str(said), expect_failure=True, timeout=60)
    texts = [Path(f"{said}.{rank}").read_text() for rank in range(2)]
    assert all(outcomes), f"a rank did not end: {texts}"
    assert [each.exit_code if each.value is None else each.value for each in outcomes] == codes, texts
    assert all("Traceback" not in text for text in texts)
    if message is not None:
        assert f"scfm: error: {message}" in texts[1]
        assert "rank 1" in texts[0].partition("scfm: error: ")[2]
    elif how == "defect":
        assert "IndexError: a defect of ours" in outcomes[1].traceback
        assert "rank 1: IndexError: a defect of ours" in texts[0]
