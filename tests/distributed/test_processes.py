"""Lost, stuck and stopped processes: a bounded end on every rank that names the one at fault, and one voice for all.

Row 22 of RELIABILITY.md on one machine: ranks killed and hung in a step; signals that reach one rank; errors on one rank
and on all. Also the helper that the distributed tests stand on.
"""

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launch import RankFailed
from runs import (
    ENGINES,
    at_student_passes,
    make_tree,
    run_distributed,
    tensors,
    train_all,
    train_cli,
)

from recipes.cli import main
from scfm_core.distributed.watchdog import PULSE
from scfm_core.errors import RunBusy, UserError
from scfm_core.train.checkpoint import find_checkpoint
from scfm_core.train.run_dir import checkpoint_path

ROOT = Path(__file__).parents[2]
# `engine.timeout` where it must run out: no step of a healthy rank takes as long, on a busy machine neither.
HANG_TIMEOUT = 8.0
# Elsewhere it must not run out: a rank whose peer is gone notices the lost connection, and ends long before.
TIMEOUT = 300.0
# How long a test waits for the end of all ranks before it fails; no more than an upper limit.
LIMIT = 100.0
LOST = 70


def make_run(tiny: Path, run_dir: Path, name: str, timeout: float = TIMEOUT, **changes: Any) -> dict[str, Any]:
    tree = make_tree(tiny, run_dir, engine=ENGINES[name], train__micro_batch_size=4, **changes)
    tree["engine"]["timeout"] = timeout
    return tree


# Under torchrun, as a user starts it.


class Job:
    """`torchrun --no-python scfm train`, what it prints as it comes, and the processes of its ranks."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.run_dir = Path(tree["run"]["dir"])
        recipe = self.run_dir.with_name("recipe.yaml")
        recipe.write_text(yaml.safe_dump(tree))
        scripts = Path(sys.executable).parent
        command = [
            scripts / "torchrun",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--no-python",
            scripts / "scfm",
            "train",
            recipe,
        ]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        self.process = subprocess.Popen(
            [str(word) for word in command], env={**environment, "OMP_NUM_THREADS": "1"}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def text(self) -> str:
        """All that was printed so far."""
        return "".join(self.lines)

    def wait_for_steps(self, steps: int, seconds: float = 400) -> None:
        metrics, deadline = self.run_dir / "metrics.jsonl", time.monotonic() + seconds
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < steps:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, f"the run makes no progress:\n{self.text()}"
            time.sleep(0.05)

    def wait_for_heartbeat(self, rank: int, words: str, seconds: float = 100) -> None:
        """Until the heartbeat of a rank in torchrun's store has these words."""
        environ = Path(f"/proc/{self.ranks()[rank]}/environ").read_bytes().decode()
        port = int(re.search(r"MASTER_PORT=(\d+)", environ)[1])  # type: ignore[index]
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        key, deadline = f"scfm/at/{rank}", time.monotonic() + seconds
        while not store.check([key]) or words not in store.get(key).decode():
            assert time.monotonic() < deadline, f"no heartbeat with {words!r}:\n{self.text()}"
            time.sleep(0.05)

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, of this launcher's own children."""
        found = {}
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                if f"\nPPid:\t{self.process.pid}\n" in status.read_text():
                    environ = (status.parent / "environ").read_bytes().split(b"\0")
                    values = dict(entry.split(b"=", 1) for entry in environ if b"=" in entry)
                    if b"LOCAL_RANK" in values:
                        found[int(values[b"RANK"])] = int(status.parent.name)
        return found

    def wait_for_error(self, seconds: float) -> str:
        """The first `scfm: error`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if "scfm: error" in line:
                    return line
            time.sleep(0.05)
        raise AssertionError(f"no rank said what happened within {seconds} s:\n{self.text()}")

    def finish(self, seconds: float) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def end(self) -> None:
        """Leave no process behind."""
        for pid in [*self.ranks().values(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start():
    jobs: list[Job] = []

    def make(tree: dict[str, Any]) -> Job:
        jobs.append(Job(tree))
        return jobs[-1]

    yield make
    for job in jobs:
        job.end()


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.timed
@pytest.mark.parametrize(
    ("name", "victim", "number"),
    [("fsdp2", 1, "SIGKILL"), ("zero2", 0, "SIGSTOP")],
)
def test_a_rank_that_is_killed_or_stopped_in_a_step_under_torchrun(name, victim, number, tiny, tmp_path, start):
    timeout = HANG_TIMEOUT if number == "SIGSTOP" else TIMEOUT
    job = start(make_run(tiny, tmp_path / "run", name, timeout, train__steps=100_000, checkpoint__every=100_000))
    job.wait_for_steps(2)
    job.wait_for_heartbeat(victim, "step ")  # one from within the steps
    ranks = job.ranks()
    assert sorted(ranks) == [0, 1]
    survivor = ranks[1 - victim]
    struck = time.monotonic()
    os.kill(ranks[victim], getattr(signal, number))
    message = job.wait_for_error(LIMIT)
    while is_running(survivor):  # its message is not its end: threads and groups must let it go
        assert time.monotonic() - struck < LIMIT, f"the other rank does not end:\n{job.text()}"
        time.sleep(0.05)
    if number == "SIGSTOP":
        with contextlib.suppress(ProcessLookupError):  # torchrun would wait another 30 s for it
            os.kill(ranks[victim], signal.SIGKILL)
    assert job.finish(60) != 0
    assert re.search(rf"rank {victim} is gone, last seen at (step \d+)", message), message
    assert "Start the job again" in job.text() or "start it again" in job.text()


# The same without a launcher.


def train_with_a_fault(tree: dict[str, Any], victim: int, how: str) -> int:
    """In a rank: `scfm train`, in which the victim sleeps, is killed or raises in step 3; stderr goes to a file."""

    def fail(attempt: int) -> None:
        if attempt < 3:
            return
        if how == "sleeps":
            time.sleep(3600)
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise IndexError("a defect of ours")

    at_student_passes(tree, victim, fail)
    path = Path(f"{tree['run']['dir']}.rank{os.environ['RANK']}.stderr")
    with path.open("w") as stream, contextlib.redirect_stderr(stream):  # the watchdog ends the process at once
        return train_cli(tree)


def train_until_the_fault(tree: dict[str, Any], victim: int, how: str) -> tuple[list[Any], list[str]]:
    outcomes = run_distributed(train_with_a_fault, 2, tree, victim, how, timeout=LIMIT, expect_failure=True)
    said = [Path(f"{tree['run']['dir']}.rank{rank}.stderr").read_text() for rank in range(2)]
    assert all(outcomes), f"a rank did not end within {LIMIT} s: {said}"
    return outcomes, said


def code_of(outcome: Any) -> int:
    """`scfm train` returned it, or the watchdog ended the process with it."""
    return outcome.value if outcome.value is not None else outcome.exit_code


@pytest.mark.timed
@pytest.mark.parametrize(("name", "victim"), [("fsdp2", 0), ("zero2", 1)])
def test_a_rank_that_sleeps_in_a_step(name, victim, tiny, tmp_path):
    """It is alive but makes no progress: both ends come from the timeout, its own and that of the rank that waits for it."""
    tree = make_run(tiny, tmp_path / "run", name, HANG_TIMEOUT)
    outcomes, said = train_until_the_fault(tree, victim, "sleeps")
    assert [code_of(outcome) for outcome in outcomes] == [LOST, LOST], said
    assert (
        f"scfm: error: rank {victim} has been at step 3 for more than engine.timeout={HANG_TIMEOUT:g} s" in said[victim]
    )
    if os.environ.get("SCFM_SHOW_MESSAGES"):
        print(f"\nasleep: {said[victim]}\nwaiting: {said[1 - victim]}")
    assert f"rank {victim}" in said[1 - victim].partition("scfm: error: ")[2]
    assert all("Traceback" not in text for text in said)


@pytest.mark.parametrize(("name", "victim"), [("fsdp2", 1), ("zero3", 0)])
def test_a_rank_that_is_killed_in_a_step(name, victim, tiny, tmp_path):
    tree = make_run(tiny, tmp_path / "run", name)
    outcomes, said = train_until_the_fault(tree, victim, "is killed")
    assert outcomes[victim].exit_code == -signal.SIGKILL
    assert code_of(outcomes[1 - victim]) == LOST, said
    assert re.search(rf"scfm: error: rank {1 - victim}: rank {victim}\b.* gone", said[1 - victim])
    assert find_checkpoint(tmp_path / "run").name == "step_00000002"


def test_a_defect_on_one_rank_keeps_its_traceback(tiny, tmp_path):
    """And ends the others, who do not take the blame."""
    outcomes, said = train_until_the_fault(make_run(tiny, tmp_path / "run", "fsdp2"), 1, "raises")
    assert "IndexError: a defect of ours" in outcomes[1].traceback
    assert code_of(outcomes[0]) == LOST, said
    assert "scfm: error: " in said[0] and "rank 1" in said[0].partition("scfm: error: ")[2].partition("rank 0")[2]


def slow_disk() -> None:
    """In a rank: the tensors of a checkpoint take a second."""
    from scfm_core.distributed.written import HashingWriter

    write = HashingWriter.write_data

    def write_slowly(*arguments: Any) -> Any:
        time.sleep(1)
        return write(*arguments)

    HashingWriter.write_data = write_slowly  # type: ignore[method-assign]


def train_without_room_for_a_grid(tree: dict[str, Any]) -> int:
    """In a rank: `scfm train`; rank 0 cannot write the grid of the step whose checkpoint is written in the background."""
    from scfm_core.train import grid

    def save_grid(*_: Any) -> None:
        raise UserError("the picture could not be written: the disk is full")

    slow_disk()
    grid.save_grid = save_grid
    return train_cli(tree)


def test_a_failed_grid_does_not_lose_the_checkpoint_of_its_step(tiny, tmp_path):
    sample = {"every": 2, "prompts": ["a handwritten digit three"], "steps": [1]}
    tree = make_run(tiny, tmp_path / "run", "fsdp2", checkpoint__asynchronous=True, sample=sample)
    outcomes = run_distributed(train_without_room_for_a_grid, 2, tree, timeout=LIMIT, expect_failure=True)
    assert [code_of(outcome) for outcome in outcomes] == [2, LOST], [outcome.output for outcome in outcomes]
    assert "scfm: error: rank 0: the picture could not be written: the disk is full" in outcomes[0].output
    assert find_checkpoint(tmp_path / "run") == checkpoint_path(tmp_path / "run", 2)


def train_with_a_broken_loader(tree: dict[str, Any], error: Exception) -> int:
    """In a rank: `scfm train`; rank 1 cannot read its samples of the third step. The disk is slow."""
    from scfm_core.data.corpus import Corpus

    record = Corpus.record
    slow_disk()

    def read(self: Corpus, item: int, sample_id: int = 0, **options: Any) -> Any:
        if os.environ["RANK"] == "1" and sample_id >= 16:
            raise error
        return record(self, item, sample_id, **options)

    Corpus.record = read  # type: ignore[method-assign]
    return train_cli(tree)


@pytest.mark.parametrize(
    ("error", "is_async"),
    [(OSError(errno.ENXIO, "No such device or address"), True), (KeyError("a defect"), False)],
    ids=repr,
)
def test_any_error_of_a_loader_is_agreed_and_saved_before(error, is_async, tiny, tmp_path):
    """Also by a write in the background."""
    tree = make_run(tiny, tmp_path / "run", "fsdp2", checkpoint__every=100, checkpoint__asynchronous=is_async)
    outcomes = run_distributed(train_with_a_broken_loader, 2, tree, error, timeout=LIMIT, expect_failure=True)
    printed = "".join(outcome.output for outcome in outcomes)
    if isinstance(error, OSError):
        assert [outcome.value for outcome in outcomes] == [2, 2], printed
        assert printed.count("scfm: error: ") == 1
        assert "rank 1: data: the samples of the next step cannot be read: No such device or address" in printed
    else:
        assert "KeyError: 'a defect'" in outcomes[1].traceback, "a bug keeps its traceback"
        assert code_of(outcomes[0]) == LOST and "rank 1: KeyError: 'a defect'" in outcomes[0].output, printed
    assert find_checkpoint(tmp_path / "run") == checkpoint_path(tmp_path / "run", 2)


def watch_a_frozen_store(folder: Path) -> None:
    """In a rank: rank 1 freezes the process with the store, as a hypervisor or SIGSTOP does, and then makes no progress."""
    from scfm_core.distributed import watchdog

    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=30), wait_for_workers=False)
    watchdog._LONGEST_BLAME = 2
    with (
        (folder / f"{rank}.stderr").open("w") as stream,
        contextlib.redirect_stderr(stream),
        watchdog.Watchdog(store, rank, 2, 3.0 if rank == 1 else 300.0),
    ):
        if rank == 1:
            time.sleep(1.5 * PULSE)
            host = int(store.get("host"))
            end = f"while kill -0 {os.getpid()} 2>&-; do sleep 0.1; done; kill -9 {host}"
            subprocess.Popen(["sh", "-c", end], start_new_session=True)
            os.kill(host, signal.SIGSTOP)
        else:
            store.set("host", str(os.getpid()))
        time.sleep(300)


@pytest.mark.timed
def test_the_process_with_the_store_is_frozen(tmp_path):
    """Its connections stay open, so that a request to the store never returns."""
    outcomes = run_distributed(watch_a_frozen_store, 2, tmp_path, timeout=LIMIT, expect_failure=True)
    assert outcomes[1].exit_code == LOST
    said = (tmp_path / "1.stderr").read_text()
    assert "more than engine.timeout=3 s: rank 0, or the launcher that holds the rendezvous store, is gone" in said


# Errors of one rank, and of all.


def agree(case: str) -> tuple[str, bool, int]:
    """In a rank: the error that comes out."""
    from scfm_core.distributed.world import join_world

    with join_world(torch.device("cpu"), 30) as world:
        with pytest.raises(UserError) as caught, world.together():
            if case == "rank 1 fails" and world.rank == 1:
                raise UserError("its disk is gone")
            if case == "all fail":
                raise UserError("no such model")
            if case == "rank 0 meets a lock" and world.rank == 0:
                raise RunBusy("the run is busy")
            if case == "each with its own":
                raise UserError(f"folder {world.rank} is missing")
            if case == "two of three" and world.rank > 0:
                raise UserError("no such model")
        assert world.gather(world.rank) == list(range(world.size)), "they are in step again"
        with world.together():
            pass
        return str(caught.value), caught.value.agreed, caught.value.exit_code


@pytest.mark.parametrize(
    ("case", "world_size", "message"),
    [
        ("rank 0 meets a lock", 2, "rank 0: the run is busy"),
        ("rank 1 fails", 2, "rank 1: its disk is gone"),
        ("all fail", 2, "no such model"),
        ("each with its own", 2, "rank 0: folder 0 is missing\nrank 1: folder 1 is missing"),
        ("two of three", 3, "ranks 1, 2: no such model"),
    ],
)
def test_together(case, world_size, message):
    code = RunBusy.exit_code if "lock" in case else UserError.exit_code
    assert run_distributed(agree, world_size, case) == [(message, True, code)] * world_size


def refused(tree: dict[str, Any], victim: int, changes: dict[str, dict[str, Any]]) -> int:
    """In a rank: `scfm train`; one rank's machine has something else."""
    if int(os.environ["RANK"]) == victim:
        tree = {section: values | changes.get(section, {}) for section, values in tree.items()}
    return train_cli(tree)


@pytest.mark.parametrize(
    ("name", "victim", "fault"),
    [
        ("fsdp2", 0, "no data"),
        ("zero3", 1, "no data"),
        ("hsdp", 1, "damaged weights"),
        ("zero3", 0, "damaged weights"),
        ("zero3", 1, "no settings"),
    ],
)
def test_an_error_on_one_rank_while_building_is_every_ranks(name, victim, fault, tiny, tmp_path):
    """The others are in no collective then: all end at once, with one message."""
    tree = make_run(tiny, tmp_path / "run", "fsdp2" if name == "hsdp" else name, train__weights="full")
    processes = 2
    if name == "hsdp":
        processes, tree["engine"]["shard"] = 4, 2
    absent, changes = str(tmp_path / "absent.json"), {}
    if fault == "no data":
        changes["data"], expected = {"path": absent}, absent
    elif fault == "no settings":
        changes["engine"], expected = {"deepspeed_config": absent}, absent
    else:
        shutil.copytree(tiny / "flux", tmp_path / "damaged")
        weights = next((tmp_path / "damaged" / "transformer").glob("*.safetensors"))
        os.truncate(weights, weights.stat().st_size - 1000)
        changes["model"], expected = {"path": str(tmp_path / "damaged")}, "damaged"
    outcomes = run_distributed(refused, processes, tree, victim, changes, timeout=LIMIT, expect_failure=True)
    assert all(outcomes), "a rank did not end"
    assert [outcome.value for outcome in outcomes] == [2] * processes, [o.traceback or o.output for o in outcomes]
    assert [outcome.output.count("scfm: error: ") for outcome in outcomes] == [1] + [0] * (processes - 1)
    assert f"scfm: error: rank {victim}: " in outcomes[0].output and expected in outcomes[0].output
    assert all("Traceback" not in outcome.output for outcome in outcomes)


def cli(arguments: list[str]) -> int:
    """In a rank: the command line, with the same words on every rank."""
    from recipes.cli import main

    return main(arguments)


@pytest.mark.parametrize("what", ["model", "batch", "recipe", "typo"])
def test_an_error_on_all_ranks_is_said_once(what, tiny, tmp_path):
    tree = make_run(tiny, tmp_path / "run", "fsdp2", train__steps=1)
    if what == "recipe":  # of the run that is resumed
        run_distributed(train_all, 2, tree)
        tree["run"]["seed"] = 7
    elif what == "model":
        tree["model"]["path"] = str(tmp_path / "nowhere")
    elif what == "batch":
        tree["train"]["global_batch_size"] = 7
    else:
        tree["train"]["stepz"] = 3
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    outcomes = run_distributed(cli, 2, ["train", str(tmp_path / "recipe.yaml")], expect_failure=True)
    assert [outcome.value for outcome in outcomes] == [2, 2], [o.traceback or o.output for o in outcomes]
    assert [outcome.output.count("scfm: error: ") for outcome in outcomes] == [1, 0], [o.output for o in outcomes]
    assert not re.search(r"scfm: error: ranks? \d", outcomes[0].output)


# Signals that reach one rank.


def signalled(tree: dict[str, Any], victim: int, number: int) -> tuple[int, int]:
    """In a rank: `scfm train`; one rank gets the signal in step 2. Exit code, and the step that this rank got to."""
    reached = []

    def ask(attempt: int) -> None:
        reached.append(attempt)
        if attempt == 2 and int(os.environ["RANK"]) == victim:
            os.kill(os.getpid(), number)

    at_student_passes(tree, None, ask)
    return train_cli(tree), max(reached)


@pytest.mark.parametrize(
    ("name", "victim", "number"),
    [
        ("fsdp2", 0, signal.SIGTERM),
        ("zero2", 1, signal.SIGUSR2),
        ("fsdp2 async", 1, signal.SIGTERM),
    ],
)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(name, victim, number, tiny, tmp_path):
    """With one checkpoint, and the same command ends where a run that nobody asked ends."""
    asynchronous = name.endswith("async")
    whole, run = (
        make_run(
            tiny,
            tmp_path / folder,
            name.removesuffix(" async"),
            train__steps=3,
            checkpoint__every=1000,
            checkpoint__asynchronous=asynchronous,
        )
        for folder in ("whole", "run")
    )
    run_distributed(train_all, 2, whole)
    outcomes = run_distributed(signalled, 2, run, victim, number, expect_failure=True)
    assert [outcome.value for outcome in outcomes] == [(128 + number, 2)] * 2, [
        o.traceback or o.output for o in outcomes
    ]
    assert f"stopped by {number.name} after step 2; the same command resumes" in outcomes[0].output
    assert "stopped by" not in outcomes[1].output
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.glob("*step_*")] == ["step_00000002"]
    rows = run_distributed(train_all, 2, run)
    assert [[row["step"] for row in each] for each in rows] == [[3]] * 2
    left, right = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# The launchers.


def test_the_deepspeed_launchers_option_is_accepted(tiny, tmp_path, capsys):
    """`deepspeed` puts --local_rank before our own words; without GPUs it starts nothing itself."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_run(tiny, tmp_path / "run", "zero2")))
    assert main(["--local_rank=1", "train", str(recipe), "--dry-run", "--gpus", "2"]) == 0
    assert "ZeRO-2" in capsys.readouterr().out


def test_an_incomplete_environment_is_named(tiny, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_run(tiny, tmp_path / "run", "fsdp2")))
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", str(recipe)]) == 2
    assert "WORLD_SIZE is 2, but without LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in capsys.readouterr().err


# The helper.


def helper_case(case: str) -> int:
    rank = int(os.environ["RANK"])
    print(f"this is rank {rank}")
    if rank == 1 and case == "raises":
        raise KeyError("missing")
    if rank == 1 and case == "hangs":
        time.sleep(3600)
    if rank == 1 and case == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and case == "leaves":
        os._exit(7)
    return rank * 10


class TestHelper:
    def test_values_come_back_by_rank(self):
        assert run_distributed(helper_case, 3, "well") == [0, 10, 20]
        assert [o.output for o in run_distributed(helper_case, 2, "well", expect_failure=True)] == [
            "this is rank 0\n",
            "this is rank 1\n",
        ]

    def test_a_raising_ranks_traceback_appears(self):
        with pytest.raises(RankFailed, match=r"(?s)rank 1:.*in helper_case.*KeyError: 'missing'.*this is rank 1"):
            run_distributed(helper_case, 2, "raises")

    def test_a_hanging_rank_ends_at_the_timeout(self):
        with pytest.raises(RankFailed, match=r"ranks \[1\] did not end within 3 s"):
            run_distributed(helper_case, 2, "hangs", timeout=3)
        outcomes = run_distributed(helper_case, 2, "hangs", timeout=3, expect_failure=True)
        assert outcomes[0].value == 0 and outcomes[1] is None

    @pytest.mark.parametrize(("case", "code"), [("is killed", -9), ("leaves", 7)])
    def test_a_killed_rank_is_reported_with_its_code(self, case, code):
        with pytest.raises(RankFailed, match=f"rank 1:\nended with code {code}, without a result"):
            run_distributed(helper_case, 2, case)
        outcomes = run_distributed(helper_case, 2, case, expect_failure=True)
        assert [outcome.exit_code for outcome in outcomes] == [0, code]
