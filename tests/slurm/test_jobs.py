"""`sbatch slurm/distill_flux.sh` on a real Slurm: whatever ends a job, the run resumes and ends with the same model.

Rows 20 to 22 and 24 of RELIABILITY.md. Signals, kills and lost nodes are real; the GPUs are pretended, the network is tiny.

A job mostly waits: for Slurm, for the imports, for a requeue. So the scenarios run at the same time, each in a thread.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch
import yaml
from cluster import Cluster, missing_programs
from runs import ENGINES, make_tree, run_distributed, train_cli
from safetensors.torch import load_file
from tiny_fixtures import adapter_file

from scfm_core.train.history import read_history

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "slurm" / "distill_flux.sh")
HOLD = Path(__file__).parent / "hold"
STEPS = 10
HELD = 6
"""The step after which a run waits for what a scenario does to it; the last checkpoint is then that of step 4."""
AT_ONCE = max(4, os.cpu_count() or 1)
"""Scenarios that run at the same time."""

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timed,
    pytest.mark.skipif(bool(missing_programs()), reason=f"needs Debian's slurm-wlm and munge: no {missing_programs()}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a Slurm that switches users is started by root"),
]


class Run:
    """A recipe of a tiny run, its folder and its jobs."""

    def __init__(self, cluster: Cluster, tiny: Path, folder: Path, engine: str = "fsdp2", **changes: Any) -> None:
        self.cluster, self.folder, self.dir = cluster, folder, folder / "run"
        self.changes = {
            "train__steps": STEPS,
            "train__global_batch_size": 4,
            "checkpoint__every": 4,
            "lora__targets": r".*attn\.to_[qv]",
            "engine__timeout": 120.0,
            "engine": ENGINES[engine],
        } | changes
        self.tree = make_tree(tiny, self.dir, **self.changes)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(self.tree))
        self._hold = folder / "hold"

    def submit(self, *options: str, overrides: tuple[str, ...] = (), **environment: str) -> str:
        """The number of a job of two nodes with a process each, by default, without the health check."""
        environment = {
            "SCFM_PROCESSES": "1",
            "SCFM_HEALTH": "0",
            "SCFM_RENDEZVOUS_HOST": "127.0.0.1",
            "SCFM_PYTHON": sys.executable,
            "SCFM_HOLD": str(self._hold),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HOLD), os.environ.get("PYTHONPATH")))),
        } | environment
        output = f"--output={self.folder}/%x-%j.out"
        number = self.cluster.sbatch(*options, output, SCRIPT, str(self.recipe), *overrides, cwd=ROOT, **environment)
        self.number = number
        return number

    @contextlib.contextmanager
    def held(self, step: int = HELD) -> Iterator[None]:
        """Rank 0 of the job submitted within waits after this step, until the end of `with`, or until it gets a signal."""
        self._hold.with_suffix(".reached").unlink(missing_ok=True)
        self._hold.write_text(str(step))
        try:
            yield
        finally:
            self._hold.unlink()

    def until_held(self) -> None:
        """Wait for that, anew after each start."""
        reached = self._hold.with_suffix(".reached")
        self.until(reached.exists)
        reached.unlink()

    @property
    def output(self) -> str:
        """What the jobs have printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def events(self, event: str) -> list[dict[str, Any]]:
        """Of the run's history."""
        return [row for row in read_history(self.dir) if row["event"] == event]

    def until(self, condition: Callable[[], bool], seconds: float = 500) -> None:
        """Wait; the job must not end meanwhile."""
        calls = 0

        def is_so() -> bool:
            nonlocal calls
            calls += 1
            if condition():
                return True
            if calls % 20 == 0:
                state = self.cluster.job(self.number)["JobState"]
                going = ("PENDING", "RUNNING", "SIGNALING", "CONFIGURING", "COMPLETING", "REQUEUED")
                assert state in going or condition(), state
            return False

        with self.with_output():
            self.cluster.wait_for(is_so, seconds)

    def ended(self, seconds: float = 700) -> str:
        """The job's final state."""
        with self.with_output():
            return self.cluster.wait(self.number, ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), seconds)

    @contextlib.contextmanager
    def with_output(self) -> Iterator[None]:
        """With the jobs' output in what is raised."""
        try:
            yield
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output}") from error

    def restarts(self) -> str:
        """How often Slurm has requeued the job."""
        return self.cluster.job(self.number)["Restarts"]

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, AttributeError):  # it, or its parent, has ended
                environment = process.environ()
                is_rank = "RANK" in environment and "RANK" not in process.parent().environ()  # no worker of its loader
                if is_rank and environment.get("SCFM_LOGS", "").startswith(f"{self.dir}/"):
                    found[int(environment["RANK"])] = process
        return found

    def adapter(self) -> dict[str, torch.Tensor]:
        """The exported weights."""
        return load_file(adapter_file(self.dir / "adapter"))


class Bench:
    """What a scenario takes: a cluster, a folder, and the same run in one go to compare with."""

    _known: ClassVar[dict[str, dict[str, torch.Tensor]]] = {}
    _lock = threading.Lock()

    def __init__(self, cluster: Cluster, tiny: Path, folder: Path) -> None:
        self.cluster, self.folder, self._tiny = cluster, folder, tiny
        self.runs: list[Run] = []

    def start(self, engine: str = "fsdp2", cluster: Cluster | None = None, **changes: Any) -> Run:
        """A run in a folder of its own; nothing is submitted yet."""
        folder = self.folder / f"run{len(self.runs)}"
        folder.mkdir()
        self.runs.append(Run(cluster or self.cluster, self._tiny, folder, engine, **changes))
        return self.runs[-1]

    def uninterrupted(self, engine: str = "fsdp2", processes: int = 2, **changes: Any) -> dict[str, torch.Tensor]:
        """The adapter of the same recipe in one go, without Slurm."""
        key = str((engine, processes, sorted(changes.items())))
        with self._lock:
            if key not in self._known:
                run = self.start(engine, **changes)
                assert run_distributed(train_cli, processes, run.tree, timeout=300) == [0] * processes
                self._known[key] = run.adapter()
            return self._known[key]

    def cancel(self) -> None:
        """No job stays behind: a failed scenario's would take cores from the others."""
        for run in self.runs:
            if hasattr(run, "number"):
                with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                    run.cluster.run("scancel", run.number)


Scenario = Callable[[Bench], None]
_SCENARIOS: dict[str, Scenario] = {}


def scenario(body: Scenario) -> Callable[..., None]:
    """A test whose body runs in a thread beside the others'."""
    _SCENARIOS[body.__name__] = body

    def test(running: dict[str, "Future[None]"]) -> None:
        running[body.__name__].result()

    test.__doc__ = body.__doc__
    return test


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as folder, Cluster(Path(folder), nodes=12) as started:
        yield started


@pytest.fixture(scope="module")
def running(request, cluster, tiny, tmp_path_factory) -> Iterator[dict[str, "Future[None]"]]:
    """The scenarios of the tests that were selected, in the order of this file: those that wait longest come first."""
    selected = {item.originalname for item in request.session.items if item.module is request.module}

    def run(body: Scenario, bench: Bench) -> None:
        try:
            body(bench)
        finally:
            bench.cancel()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            yield {
                name: pool.submit(run, body, Bench(cluster, tiny, tmp_path_factory.mktemp(name)))
                for name, body in _SCENARIOS.items()
                if name in selected
            }
        finally:
            cluster.given_up = True
            pool.shutdown(cancel_futures=True)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        if tolerance:
            torch.testing.assert_close(tensor, theirs[name], **tolerance)
        else:
            assert torch.equal(tensor, theirs[name]), name


@scenario
def test_time_limit(bench):
    """Slurm warns the job before its limit: it saves, is requeued, and resumes."""
    run = bench.start()
    with run.held():
        run.submit("--time=20", "--signal=USR2@300")
        run.until_held()
        # Slurm looks every 30 seconds which limits are near. It wakes what it signals.
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
    assert run.restarts() == "1"
    assert [start["step"] for start in run.events("start")] == [0, stopped["step"]]
    assert HELD <= stopped["step"] < STEPS
    same(run.adapter(), bench.uninterrupted())


def is_stopped(process: psutil.Process) -> bool:
    return process.is_running() and process.status() == psutil.STATUS_STOPPED


@scenario
def test_preempted_without_the_user_signal(bench):
    """Then SIGTERM is all that comes, and the grace time after it."""
    with (
        tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as folder,
        Cluster(Path(folder), nodes=2, user_signal=False, first_job=500) as plain,
    ):
        run = bench.start(cluster=plain)
        preempted(run, "SIGTERM")
        del run.number  # of a cluster that has gone
    same(run.adapter(), bench.uninterrupted())


@scenario
def test_preempted(bench):
    run = bench.start("zero2")
    preempted(run, "SIGUSR2")
    same(run.adapter(), bench.uninterrupted("zero2"))


def preempted(run: Run, by_signal: str) -> None:
    with run.held():
        run.submit("--partition=spot", "--signal=USR2@300")
        run.until_held()
        nodes = ",".join(run.cluster.hosts(run.number))
        urgent = run.cluster.sbatch(
            "--partition=urgent", "--nodes=2", f"--nodelist={nodes}", "--exclusive", "--output=/dev/null", "--wrap", "true",
            cwd=run.folder,
        )  # fmt: skip
        run.cluster.wait(urgent, ("COMPLETED",), 120)
        run.until(lambda: len(run.events("job")) == 1)
    assert run.ended() == "COMPLETED", run.output
    assert run.restarts() == "1"
    (stopped, finished) = run.events("end")
    assert (stopped["how"], stopped["reason"], finished["how"]) == ("stopped", by_signal, "finished")
    assert run.events("start")[1]["step"] == stopped["step"] < STEPS


@scenario
def test_hung_rank(bench):
    """The others end within engine.timeout, and the job resumes from the last checkpoint."""
    lost_rank(bench, signal.SIGSTOP, "fsdp2")


@scenario
def test_killed_rank(bench):
    lost_rank(bench, signal.SIGKILL, "zero2")


def lost_rank(bench: Bench, number: int, engine: str) -> None:
    # A start on a loaded machine may bring the ranks 20 seconds apart.
    run = bench.start(engine, engine__timeout=30.0)
    with run.held():
        run.submit()
        run.until_held()
        run.ranks()[1].send_signal(number)
    run.until(lambda: len(run.events("job")) == 1)
    assert run.events("job")[0]["verdict"] == "requeue"
    assert run.ended() == "COMPLETED", run.output
    assert [start["step"] for start in run.events("start")] == [0, 4]
    same(run.adapter(), bench.uninterrupted(engine))


@contextlib.contextmanager
def site(name: str, text: str) -> Iterator[str]:
    """The settings of a cluster, in the folder where slurm/lib.sh looks."""
    path = ROOT / "slurm" / "clusters" / f"{name}.env"
    try:
        path.write_text(text)
        yield name
    finally:
        path.unlink()


@scenario
def test_as_a_user_submits_it(bench):
    """Two nodes with two processes each, the health check before; secrets of the environment and of a file stay there.

    sbatch is called in an interactive job, whose variables say what CPUs are that job's, with eight tasks a node in mind. The
    health check opens the data for longer than engine.timeout, and reports progress.
    """
    run = bench.start(train__micro_batch_size=4, engine__timeout=30.0)
    slow = run.folder / "hold.slow"
    slow.write_text("34")
    interactive = {
        "SRUN_CPUS_PER_TASK": "1",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x2",
        "SLURM_CPU_BIND_TYPE": "mask_cpu:",
    }
    secrets = bench.folder / "secrets"
    secrets.write_text("WANDB_API_KEY=canary-4f7a-wandb\nAWS_SECRET_ACCESS_KEY=canary-4f7a-aws\n")
    secrets.chmod(0o600)
    flags = "srun_flags=(--export='ALL,SITE=two words' --ntasks-per-node=3)"  # the second is ours to say
    with run.held(), site(f"test-{os.getpid()}", flags) as name:
        run.submit(
            "--ntasks-per-node=8", "--cpus-per-task=8", SCFM_PROCESSES="2", SCFM_HEALTH="1", SCFM_SECRETS=str(secrets),
            HF_TOKEN="canary-4f7a-hf", SCFM_CLUSTER=name, **interactive,
        )  # fmt: skip
        run.until_held()
        assert not slow.exists()
        environment = run.ranks()[3].environ()
        assert environment["AWS_SECRET_ACCESS_KEY"] == "canary-4f7a-aws"
        assert (environment["SLURM_CPUS_ON_NODE"], environment["SITE"]) == ("64", "two words")
        assert "mask" not in environment.get("SLURM_CPU_BIND", "")
        shown = run.cluster.run("scontrol", "show", "job", run.number) + run.cluster.run("squeue", "-o", "%all")
        nodes = run.cluster.hosts(run.number)
    assert run.ended() == "COMPLETED", run.output
    assert run.restarts() == "0"
    same(run.adapter(), bench.uninterrupted(processes=4, train__micro_batch_size=4))
    assert "health: 2 nodes fit, 4 processes on cpu" in run.output
    assert re.search(r"all-reduce of 64 MiB: [\d.]+ ms", run.output)
    assert run.output.count(f"step {STEPS}/{STEPS}") == 1
    places = {
        (path.parents[3].name, path.parents[0].name)
        for path in (run.dir / "logs").glob("job-*.0/train/*/*/*/*/stderr.log")
    }
    assert len(nodes) == 2
    assert places == {(node, rank) for node in nodes for rank in ("0", "1")}
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if b"canary-4f7a" in path.read_bytes()]
    assert "canary-4f7a" not in shown


@scenario
def test_lost_node(bench):
    """Slurm itself requeues the job, on the nodes that are left."""
    run = bench.start()
    with run.held():
        run.submit()
        run.until_held()
        _, lost = run.cluster.hosts(run.number)
        run.cluster.lose_node(lost)
        run.cluster.wait_for(lambda: run.restarts() == "1", 60, interval=1.0)
    assert run.ended() == "COMPLETED", run.output
    assert run.restarts() == "1"
    assert lost not in run.cluster.hosts(run.number)
    first, second = run.events("start")
    assert first["step"] == 0
    assert second["step"] >= 4
    same(run.adapter(), bench.uninterrupted())


@scenario
def test_cancelled_stays_cancelled_and_another_job_goes_on(bench):
    run = bench.start()
    with run.held():
        run.submit()
        run.until_held()
        run.cluster.run("scancel", run.number)
        assert run.ended() == "CANCELLED"
        with run.with_output():
            run.cluster.wait_for(lambda: bool(run.events("job")), 120)
    assert run.events("job")[0]["verdict"] == "cancelled"
    assert run.restarts() == "0"
    (stopped,) = run.events("end")
    assert (stopped["how"], stopped["reason"]) == ("stopped", "SIGTERM")
    run.submit()
    assert run.ended() == "COMPLETED", run.output
    assert run.events("start")[1]["step"] == stopped["step"] < STEPS
    same(run.adapter(), bench.uninterrupted())


@scenario
def test_zero3_goes_on_on_other_nodes(bench):
    """One node, then two, then one: the same global batches, so the same model but for rounding."""
    run = bench.start("zero3")
    for nodes, step in ((1, 2), (2, HELD)):
        with run.held(step):
            run.submit(f"--nodes={nodes}")
            run.until_held()
            run.cluster.run("scancel", run.number)
            assert run.ended() == "CANCELLED"
            with run.with_output():
                run.cluster.wait_for(lambda nodes=nodes: len(run.events("job")) == nodes, 120)
    run.submit("--nodes=1")
    assert run.ended() == "COMPLETED", run.output
    assert [start["processes"] for start in run.events("start")] == [1, 2, 1]
    same(run.adapter(), bench.uninterrupted("zero3"), rtol=1e-3, atol=1e-5)


@scenario
def test_crash_that_repeats(bench):
    """Before its first checkpoint, each time: no more than SCFM_RETRIES starts after the first.

    The same command, submitted once more meanwhile, ends at once and takes none of them.
    """
    run = bench.start(checkpoint__every=1000)
    with run.held(2):
        first = run.submit("--nodes=1", SCFM_RETRIES="1")
        for start in range(2):
            run.until_held()
            if start == 0:
                twice = run.submit("--nodes=1")
                assert run.ended() == "FAILED"
                assert (run.restarts(), run.cluster.job(twice)["ExitCode"]) == ("0", "75:0")
                assert f"is running in {run.dir}: job {first}, process " in run.output
                run.number = first
            for process in run.ranks().values():
                process.kill()
        assert run.ended() == "FAILED"
    assert [start["step"] for start in run.events("start")] == [0, 0]
    assert run.cluster.job(run.number)["ExitCode"] != "0:0"
    assert [row["verdict"] for row in run.events("job")] == ["requeue", "failed"]
    assert "it failed 2 times in a row without a new checkpoint" in run.output


@scenario
def test_what_cannot_work_is_refused_once(bench):
    """A wrong key before anything starts; missing data by the health check, which names them once for all nodes."""
    run, other = bench.start(), bench.start(data__path=str(bench.folder / "nowhere"))
    run.submit(overrides=("train.stesp=3",))
    other.submit(SCFM_HEALTH="1")
    assert run.ended() == "FAILED"
    assert "unknown key train.stesp; did you mean train.steps?" in run.output
    assert run.restarts() == "0"
    assert other.ended() == "FAILED"
    assert other.restarts() == "0"
    assert "all nodes: data: there is no folder" in other.output
    assert other.events("job")[0]["verdict"] == "failed"


@scenario
def test_hostile_names_are_but_names(bench):
    run = bench.start(train__steps=2)
    name = "$(touch x)`touch x` 'a\" b;touch x"
    # And the job gets nothing of the environment but its settings.
    settings = "SCFM_PROCESSES,SCFM_HEALTH,SCFM_RENDEZVOUS_HOST,SCFM_PYTHON"
    run.submit("--nodes=1", f"--job-name={name}", f"--export={settings}", overrides=(f"run.dir={run.folder / name}\n",))
    assert run.ended() == "COMPLETED", run.output
    assert (run.folder / name / "adapter").is_dir()
    assert not [path for path in bench.folder.rglob("*") if path.name == "x"]
    assert not (ROOT / "x").exists()


@scenario
def test_array_and_chain(bench):
    """Task k takes recipe k; the job behind it begins when all have finished.

    The last task has the number of the array. When it is requeued, the others go on undisturbed."""
    first, second, last = (bench.start(train__steps=steps) for steps in (2, 3, 1))
    with first.held(1):
        number = first.submit("--nodes=1", "--array=3-4", overrides=(str(second.recipe), "checkpoint.keep=1"))
        last.submit("--nodes=1", f"--dependency=afterok:{number}")
        first.until(lambda: all((run.dir / "metrics.jsonl").is_file() for run in (first, second)))
        assert first.cluster.job(f"{number}_4")["JobId"] == number
        first.cluster.run("scancel", "--signal=USR2", f"{number}_4")
        first.until(lambda: len(second.events("job")) == 1)
    assert second.events("job")[0]["verdict"] == "requeue"
    assert last.ended() == "COMPLETED", last.output
    assert [len(run.events("start")) for run in (first, second, last)] == [1, 2, 1]
    assert [run.events("end")[-1]["step"] for run in (first, second, last)] == [2, 3, 1]
    assert first.events("end")[0]["time"] <= last.events("start")[0]["time"]
