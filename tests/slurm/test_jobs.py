"""`sbatch slurm/distill_flux.sh` on a real Slurm: whatever ends a job, the run goes on and ends with the same model.

Rows 20 to 22 and 24 of RELIABILITY.md. Signals, kills and lost nodes are real; the GPUs are pretended, the network is tiny.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from cluster import Cluster, missing_programs
from runs import ENGINES, make_tree
from safetensors.torch import load_file

from scfm_core.train.history import read_history

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "slurm" / "distill_flux.sh")

pytestmark = [
    pytest.mark.skipif(bool(missing_programs()), reason=f"needs Debian's slurm-wlm and munge: no {missing_programs()}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a Slurm that switches users is started by root"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as folder, Cluster(Path(folder)) as started:
        yield started


class Run:
    """A recipe of a tiny run of some 20 seconds on 2 processes, its folder and its jobs."""

    def __init__(self, cluster: Cluster, tiny: Path, folder: Path, engine: str = "fsdp2", **changes: Any) -> None:
        self.cluster, self.folder, self.dir = cluster, folder, folder / "run"
        self.changes = {
            "train__steps": 24,
            "train__global_batch_size": 16,
            "checkpoint__every": 4,
            "engine": ENGINES[engine],
        } | changes
        self.tree = make_tree(tiny, self.dir, **self.changes)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(self.tree))

    def submit(self, *options: str, overrides: tuple[str, ...] = (), **environment: str) -> str:
        """The number of a job of two nodes with a process each, unless told otherwise; without the health check."""
        environment = {
            "SCFM_PROCESSES": "1",
            "SCFM_HEALTH": "0",
            "SCFM_RENDEZVOUS_HOST": "127.0.0.1",
            "SCFM_PYTHON": sys.executable,
        } | environment
        output = f"--output={self.folder}/%x-%j.out"
        number = self.cluster.sbatch(*options, output, SCRIPT, str(self.recipe), *overrides, cwd=ROOT, **environment)
        self.number = number
        return number

    @property
    def output(self) -> str:
        """What the jobs have printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    @property
    def steps(self) -> int:
        """Steps that stand in metrics.jsonl."""
        path = self.dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def events(self, event: str) -> list[dict[str, Any]]:
        """Of the run's history."""
        return [row for row in read_history(self.dir) if row["event"] == event]

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait; the job must not end meanwhile."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.output
            state = self.cluster.job(self.number)["JobState"]
            assert state in ("PENDING", "RUNNING", "SIGNALING", "CONFIGURING", "COMPLETING", "REQUEUED"), (
                f"{state}\n{self.output}"
            )
            time.sleep(0.1)

    def ended(self, seconds: float = 420) -> str:
        """The job's final state."""
        with self.told():
            return self.cluster.wait(self.number, ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), seconds)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """With the jobs' output in what is raised."""
        try:
            yield
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output}") from error

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, AttributeError):  # it, or its parent, has ended
                environment = process.environ()
                is_rank = "RANK" in environment and "RANK" not in process.parent().environ()  # no worker of its loader
                if is_rank and environment.get("SCFM_LOGS", "").startswith(str(self.dir)):
                    found[int(environment["RANK"])] = process
        return found

    def adapter(self) -> dict[str, torch.Tensor]:
        """The exported weights."""
        return load_file(self.dir / "adapter" / "pytorch_lora_weights.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        if tolerance:
            torch.testing.assert_close(tensor, theirs[name], **tolerance)
        else:
            assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def start(cluster, tiny, tmp_path) -> Callable[..., Run]:
    runs = []

    def make(engine: str = "fsdp2", on: Cluster = cluster, **changes: Any) -> Run:
        folder = tmp_path / f"job-{len(runs)}"
        folder.mkdir()
        runs.append(Run(on, tiny, folder, engine, **changes))
        return runs[-1]

    yield make
    for run in runs:
        if hasattr(run, "number") and run.cluster.job(run.number)["JobState"] in ("PENDING", "RUNNING"):
            run.cluster.run("scancel", run.number)


@pytest.fixture(scope="module")
def uninterrupted(cluster, tiny, tmp_path_factory) -> Callable[..., dict[str, torch.Tensor]]:
    """The adapter of the same recipe in one go, under torchrun and without Slurm."""
    known: dict[tuple[str, int, str], dict[str, torch.Tensor]] = {}

    def adapter(engine: str = "fsdp2", processes: int = 2, **changes: Any) -> dict[str, torch.Tensor]:
        key = engine, processes, str(sorted(changes.items()))
        if key not in known:
            run = Run(cluster, tiny, tmp_path_factory.mktemp("torchrun"), engine, **changes)
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                "-m", "recipes.cli", "train", str(run.recipe),
            ]  # fmt: skip
            environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
            result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
            assert result.returncode == 0, result.stderr
            known[key] = run.adapter()
        return known[key]

    return adapter


def test_as_a_user_submits_it(start, uninterrupted, tmp_path):
    """Two nodes with two processes each, the health check before; secrets of the environment and of a file stay there."""
    run = start(train__micro_batch_size=4)
    secrets = tmp_path / "secrets"
    secrets.write_text("WANDB_API_KEY=canary-4f7a-wandb\nAWS_SECRET_ACCESS_KEY=canary-4f7a-aws\n")
    secrets.chmod(0o600)
    run.submit(SCFM_PROCESSES="2", SCFM_HEALTH="1", SCFM_SECRETS=str(secrets), HF_TOKEN="canary-4f7a-hf")
    run.until(lambda: 3 in run.ranks())
    assert run.ranks()[3].environ()["AWS_SECRET_ACCESS_KEY"] == "canary-4f7a-aws"
    shown = run.cluster.run("scontrol", "show", "job", run.number) + run.cluster.run("squeue", "-o", "%all")
    assert run.ended() == "COMPLETED", run.output
    assert run.cluster.job(run.number)["Restarts"] == "0"
    same(run.adapter(), uninterrupted(processes=4, train__micro_batch_size=4))
    assert "health: 2 nodes fit, 4 processes on cpu" in run.output
    assert re.search(r"all-reduce of 64 MiB: [\d.]+ ms", run.output)
    assert run.output.count("step 24/24") == 1
    places = {
        (path.parents[3].name, path.parents[0].name)
        for path in (run.dir / "logs").glob("job-*.0/train/*/*/*/*/stderr.log")
    }
    assert places == {(node, rank) for node in ("n1", "n2") for rank in ("0", "1")}
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if b"canary-4f7a" in path.read_bytes()]
    assert "canary-4f7a" not in shown


def test_time_limit(start, uninterrupted):
    """Warned before it, the job saves, is requeued, and goes on."""
    run = start()
    run.submit("--time=20", "--signal=USR2@300")
    run.until(lambda: run.steps >= 6)
    # Slurm looks every 30 seconds which limits are near, and the run is shorter; it wakes what it signals.
    ranks = list(run.ranks().values())
    assert len(ranks) == 2
    for rank in ranks:
        rank.suspend()
    run.cluster.run("scontrol", "update", f"jobid={run.number}", "TimeLimit=3")
    run.until(lambda: not any(is_stopped(rank) for rank in ranks))
    run.until(lambda: len(run.events("job")) == 1)
    assert run.events("job")[0]["verdict"] == "requeue"
    (stopped,) = run.events("end")
    assert (stopped["how"], stopped["reason"]) == ("stopped", "SIGUSR2")
    run.cluster.run("scontrol", "update", f"jobid={run.number}", "TimeLimit=20")
    assert run.ended() == "COMPLETED", run.output
    assert run.cluster.job(run.number)["Restarts"] == "1"
    assert [start["step"] for start in run.events("start")] == [0, stopped["step"]]
    same(run.adapter(), uninterrupted())


def is_stopped(process: psutil.Process) -> bool:
    return process.is_running() and process.status() == psutil.STATUS_STOPPED


def preempted(run: Run, by_signal: str) -> None:
    run.submit("--partition=spot", "--signal=USR2@300")
    run.until(lambda: run.steps >= 6)
    urgent = run.cluster.sbatch(
        "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "true", cwd=run.folder
    )
    run.cluster.wait(urgent, ("COMPLETED",), 60)
    run.until(lambda: len(run.events("job")) == 1)
    assert run.ended() == "COMPLETED", run.output
    assert run.cluster.job(run.number)["Restarts"] == "1"
    (stopped, finished) = run.events("end")
    assert (stopped["how"], stopped["reason"], finished["how"]) == ("stopped", by_signal, "finished")
    assert run.events("start")[1]["step"] == stopped["step"] < 24


def test_preempted(start, uninterrupted):
    run = start("zero2")
    preempted(run, "SIGUSR2")
    same(run.adapter(), uninterrupted("zero2"))


def test_preempted_without_the_user_signal(start, uninterrupted):
    """Then SIGTERM is all that comes, and the grace time after it."""
    with (
        tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as folder,
        Cluster(Path(folder), user_signal=False) as plain,
    ):
        run = start(on=plain)
        preempted(run, "SIGTERM")
        del run.number  # of a cluster that has gone
    same(run.adapter(), uninterrupted())


@pytest.mark.parametrize(
    ("number", "engine"), [(signal.SIGKILL, "zero2"), (signal.SIGSTOP, "fsdp2")], ids=["killed", "hung"]
)
def test_lost_rank(start, uninterrupted, number, engine):
    """The others end within engine.timeout, and the job goes on from the last checkpoint."""
    run = start(engine, engine__timeout=10.0)
    run.submit()
    run.until(lambda: run.steps >= 6)
    run.ranks()[1].send_signal(number)
    run.until(lambda: len(run.events("job")) == 1)
    assert run.events("job")[0]["verdict"] == "requeue"
    assert run.ended() == "COMPLETED", run.output
    assert [start["step"] for start in run.events("start")] == [0, 4]
    same(run.adapter(), uninterrupted(engine))


def test_lost_node(start, uninterrupted):
    """Slurm itself requeues the job, on the nodes that are left."""
    run = start()
    run.submit("--exclude=n1")
    run.until(lambda: run.steps >= 6)
    run.cluster.lose_node("n3")
    assert run.ended() == "COMPLETED", run.output
    run.cluster.bring_back("n3")
    assert run.cluster.job(run.number)["Restarts"] == "1"
    first, second = run.events("start")
    assert first["step"] == 0
    assert second["step"] >= 4
    same(run.adapter(), uninterrupted())


def test_crash_that_repeats(start):
    """Before its first checkpoint, each time: no more than SCFM_RETRIES starts after the first."""
    run = start(checkpoint__every=1000)
    run.submit(SCFM_RETRIES="1")
    for times in (1, 2):
        run.until(lambda times=times: len(run.events("start")) == times and run.steps >= 2)
        for process in run.ranks().values():
            process.kill()
        if times == 1:
            run.until(lambda: len(run.events("job")) == 1)
    assert run.ended() == "FAILED"
    assert run.cluster.job(run.number)["ExitCode"] != "0:0"
    assert [row["verdict"] for row in run.events("job")] == ["requeue", "failed"]
    assert "it failed 2 times in a row without a new checkpoint" in run.output


def test_cancelled_stays_cancelled_and_another_job_goes_on(start, uninterrupted):
    run = start()
    run.submit()
    run.until(lambda: run.steps >= 6)
    run.cluster.run("scancel", run.number)
    assert run.ended() == "CANCELLED"
    end = time.monotonic() + 60
    while not run.events("job"):
        assert time.monotonic() < end, run.output
        time.sleep(0.2)
    assert run.events("job")[0]["verdict"] == "cancelled"
    assert run.cluster.job(run.number)["Restarts"] == "0"
    (stopped,) = run.events("end")
    assert (stopped["how"], stopped["reason"]) == ("stopped", "SIGTERM")
    run.submit()
    assert run.ended() == "COMPLETED", run.output
    assert run.events("start")[1]["step"] == stopped["step"]
    same(run.adapter(), uninterrupted())


def test_zero3_goes_on_on_other_nodes(start, uninterrupted):
    """Two nodes, then four, then one: the same global batches, so the same model but for rounding."""
    run = start("zero3", train__steps=16)
    for nodes, at in ((2, 4), (4, 10)):
        run.submit(f"--nodes={nodes}")
        run.until(lambda at=at: run.steps >= at)
        run.cluster.run("scancel", run.number)
        assert run.ended() == "CANCELLED"
        time.sleep(1)
    run.submit("--nodes=1")
    assert run.ended() == "COMPLETED", run.output
    assert [start["processes"] for start in run.events("start")] == [2, 4, 1]
    same(run.adapter(), uninterrupted("zero3", train__steps=16), rtol=1e-3, atol=1e-5)


def test_what_cannot_work_is_refused_once(start):
    """A wrong key before anything starts; missing data by the health check, which names them once for all nodes."""
    run = start()
    run.submit(overrides=("train.stesp=3",))
    assert run.ended() == "FAILED"
    assert "unknown key train.stesp; did you mean train.steps?" in run.output
    assert run.cluster.job(run.number)["Restarts"] == "0"
    other = start(data__path=str(run.folder / "nowhere"))
    other.submit(SCFM_HEALTH="1")
    assert other.ended() == "FAILED"
    assert other.cluster.job(other.number)["Restarts"] == "0"
    assert "all nodes: data: there is no folder" in other.output
    assert other.events("job")[0]["verdict"] == "failed"


def test_hostile_names_are_but_names(start, tmp_path):
    run = start(train__steps=2)
    name = "$(touch x)`touch x` 'a\" b;touch x"
    # And the job gets nothing of the environment but its settings.
    settings = "SCFM_PROCESSES,SCFM_HEALTH,SCFM_RENDEZVOUS_HOST,SCFM_PYTHON"
    run.submit(f"--job-name={name}", f"--export={settings}", overrides=(f"run.dir={run.folder / name}\n",))
    assert run.ended() == "COMPLETED", run.output
    assert (run.folder / name / "adapter").is_dir()
    assert not [path for path in tmp_path.rglob("*") if path.name == "x"]
    assert not (ROOT / "x").exists()


def test_array_and_chain(start):
    """Task k takes recipe k; the job behind it begins when all have finished."""
    first, second, last = start(train__steps=2), start(train__steps=3), start(train__steps=1)
    number = first.submit("--array=3-4", overrides=(str(second.recipe), "checkpoint.keep=1"))
    last.submit(f"--dependency=afterok:{number}")
    assert last.ended() == "COMPLETED", last.output
    assert [len(run.events("start")) for run in (first, second, last)] == [1, 1, 1]
    assert [run.events("end")[0]["step"] for run in (first, second, last)] == [2, 3, 1]
    assert first.events("end")[0]["time"] <= last.events("start")[0]["time"]
