"""What a GPU asks of a process's beginning and end, held against a stand-in for NCCL and CUDA."""

import contextlib
import importlib
import os
import platform
import re
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ports import free_ports
from runs import ENGINES, joined_trainer, make_tree, run_distributed

from recipes import cli, ending
from scfm_core import progress
from scfm_core.distributed import watchdog, world
from scfm_core.distributed.watchdog import Watchdog, ranks_in_words
from scfm_core.distributed.world import PATIENCE, join_world
from scfm_core.errors import PeerLost, UserError
from scfm_core.train.device import ALLOCATOR_OPTIONS, resolve_device


@pytest.fixture
def calls(monkeypatch):
    """(what was called, its timeout) in order, in a world of two processes with GPUs."""
    calls = []

    def stand_in(name):
        return lambda *_, timeout=None, **__: calls.append((name, timeout)) or name

    for name in ("init_process_group", "new_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, stand_in(name))
    monkeypatch.setattr(world, "_meet", lambda *_: dist.HashStore())
    monkeypatch.setattr(world, "Watchdog", lambda *_: Watchdog(None, 1, 2, 30))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "MASTER_ADDR": "here", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    return calls


def test_collectives_wait_longer_than_the_watchdog(calls):
    """Whose message names the rank, before NCCL aborts the process."""
    with join_world(torch.device("cuda", 1), 30):
        pass
    assert calls == [
        ("set_device", torch.device("cuda", 1)),
        ("init_process_group", PATIENCE),
        ("destroy_process_group", None),
    ]
    assert timedelta(hours=10) < PATIENCE


def timeouts(tree: dict[str, Any]) -> set[timedelta]:
    """In a rank: of all process groups of a run."""
    with joined_trainer(tree) as trainer:
        trainer.world.second_group()
        trainer.world.gather(None)  # gloo's ranks may be connected one after another
        groups = dist.distributed_c10d._world.pg_map
        return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


@pytest.mark.parametrize(("name", "processes"), [("hsdp", 4), ("zero3", 2)])
def test_every_group_of_a_run_has_the_same_timeout(name, processes, tiny, tmp_path):
    engine = ENGINES["zero3"] if name == "zero3" else {"shard": 2}
    tree = make_tree(tiny, tmp_path / "run", engine=engine)
    assert run_distributed(timeouts, processes, tree) == [{PATIENCE}] * processes


def test_a_failed_rank_does_not_wait_for_nccl(calls):
    """Whose end waits for the others, so that the traceback would never be seen."""
    with pytest.raises(IndexError), join_world(torch.device("cuda", 1), 30):
        raise IndexError
    assert "destroy_process_group" not in [name for name, _ in calls]


class CountingStore:
    """A store that counts what the ranks ask of it."""

    def __init__(self, store: Any = None, requests: Counter[str] | None = None) -> None:
        self._store = store or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.requests: Counter[str] = Counter() if requests is None else requests

    def clone(self) -> "CountingStore":
        return CountingStore(self._store.clone(), self.requests)

    def __getattr__(self, name: str) -> Any:
        self.requests[name] += 1
        return getattr(self._store, name)


def blames_of(ranks: int, gone: set[int], monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], CountingStore]:
    """What the ranks say that are left, all at the same time."""
    monkeypatch.setattr(watchdog, "PULSE", 0.3)
    progress.start()  # other tests of this process have reported theirs
    store = CountingStore()
    dogs = {rank: Watchdog(store, rank, ranks, 60) for rank in range(ranks)}
    for dog in dogs.values():
        dog._pulse()
    store.requests.clear()
    with ThreadPoolExecutor(ranks) as pool:
        return set(pool.map(lambda rank: dogs[rank].blame(), set(dogs) - gone)), store


def test_the_lost_ranks_are_named_with_few_requests(monkeypatch):
    """One rank reads all heartbeats: at 512 ranks that each ask for those of all it would be a million requests."""
    said, store = blames_of(40, {3, 4, 5, 17}, monkeypatch)
    assert len(said) == 1
    assert said.pop().startswith("ranks 3-5, 17 are gone, last seen at start (in ")
    assert sum(store.requests.values()) <= 6 * 40, store.requests


def test_a_rank_that_never_began_is_named(monkeypatch):
    store = CountingStore()
    monkeypatch.setattr(watchdog, "PULSE", 0.05)
    progress.start()
    dogs = [Watchdog(store, rank, 3, 60) for rank in range(3)]
    for dog in dogs[:2]:
        dog._pulse()
    with ThreadPoolExecutor() as pool:
        assert set(pool.map(Watchdog.blame, dogs[:2])) == {"rank 2 is gone, last seen at start (unknown)"}


@pytest.mark.parametrize(
    ("ranks", "words"),
    [([3], "rank 3"), ([4, 3], "ranks 3, 4"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([7, 8, 9], "ranks 7-9")],
)
def test_ranks_in_words(ranks, words):
    assert ranks_in_words(ranks) == words


def waits_for_a_slow_rank(how: str) -> Any:
    """In a rank: rank 1 works for several timeouts, and reports progress or not; the others wait for it in a collective."""
    with join_world(torch.device("cpu"), 1.5) as joined:
        if joined.rank == 1:
            with progress.counting_io("a library's files") if how == "slow loading" else contextlib.nullcontext():
                for _ in range(16):
                    time.sleep(0.25)
                    slow_work(how)
        return joined.gather(joined.rank)


def slow_work(how: str) -> None:
    if how == "slow":
        progress.beat("opening shard 3")
    elif how == "slow loading":
        with Path("/dev/zero").open("rb") as file:
            file.read(2 << 20)
    elif how == "slow imports":
        with contextlib.suppress(ImportError):
            importlib.import_module("a_module_that_does_not_exist")
    elif how == "slow worker" and os.fork() == 0:
        progress.beat("a worker's shard")
        os._exit(0)


@pytest.mark.timed
@pytest.mark.parametrize("how", ["slow", "slow loading", "slow imports", "slow worker", "hung"])
def test_slow_is_not_lost(how):
    outcomes = run_distributed(waits_for_a_slow_rank, 3, how, expect_failure=True, timeout=60)
    if how == "hung":
        # The first to end may hold the store; then the others notice the broken connection.
        assert all(o.exit_code == PeerLost.exit_code or "PeerLost" in o.traceback for o in outcomes), outcomes
    else:
        assert [outcome.value for outcome in outcomes] == [[0, 1, 2]] * 3, [o.traceback for o in outcomes]


def joins_if_it_comes(timeout: float) -> tuple[str, bool] | None:
    os.environ["SLURMD_NODENAME"] = f"n{os.environ['RANK']}"
    if os.environ["RANK"] == "2":
        return None
    with pytest.raises(UserError) as caught, join_world(torch.device("cpu"), timeout):
        pass
    return str(caught.value), caught.value.agreed


def test_a_rank_that_does_not_come_is_named():
    *said, absent = run_distributed(joins_if_it_comes, 3, 1.0)
    assert absent is None and said[0] == said[1] and said[0][1], "rank 0 prints it"
    assert re.fullmatch(
        r"rank 2 of 3 did not come to 127\.0\.0\.1:\d+ within 1 s; the ranks on n0, n1 did\. Look at the logs of the others",
        said[0][0],
    )


@pytest.mark.parametrize("agent", [True, False], ids=["torchrun's store", "rank 0's store"])
def test_an_address_that_cannot_be_reached_is_named(agent, monkeypatch):
    [port] = free_ports(1)
    variables = {"RANK": 1, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables |= {"SLURMD_NODENAME": "n1"} | ({"TORCHELASTIC_USE_AGENT_STORE": True} if agent else {})
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(UserError, match=rf"node n1 cannot reach 127\.0\.0\.1:{port}.*SCFM_RENDEZVOUS_HOST"),
        join_world(torch.device("cpu"), 1.0),
    ):
        pass


def test_a_port_in_use_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        with (
            pytest.raises(
                UserError, match=rf"^port {port} of node .* is in use by another program.*SCFM_RENDEZVOUS_PORT"
            ),
            join_world(torch.device("cpu"), 1.0),
        ):
            pass


@pytest.mark.parametrize(
    ("size", "fails", "leaves"), [(1, 2, False), (2, 2, True), (2, 0, False), (2, 143, False), (1, 70, True)]
)
def test_who_leaves_without_the_interpreters_end(size, fails, leaves, monkeypatch):
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.setattr(cli, "main", lambda: fails)
    monkeypatch.setattr(ending.os, "_exit", leave)
    with pytest.raises(Left if leaves else SystemExit) as ended:
        cli.command()
    assert ended.value.args == (fails,)


def test_a_defect_on_one_of_several_ranks_is_printed_before_it_leaves(monkeypatch, capsys):
    def defect():
        raise IndexError("a defect of ours")

    codes = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "main", defect)
    monkeypatch.setattr(ending.os, "_exit", codes.append)
    with pytest.raises(SystemExit):  # where the process would be gone
        cli.command()
    assert codes == [1] and "IndexError: a defect of ours" in capsys.readouterr().err


def test_a_full_gpu_says_what_takes_less_memory(capsys):
    def fill():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore.")

    assert ending.ended(fill, is_long=False) == 1
    message = capsys.readouterr().err
    assert message.startswith(
        "scfm: error: CUDA out of memory. Tried to allocate 20.00 MiB. Lower the batch size (train.micro_batch_size"
    )
    assert "Traceback" not in message and "More." not in message


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_has_an_index(name, index, monkeypatch):
    """`torch.cuda.set_device` refuses one without."""
    chosen = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert resolve_device(name) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]


def segments_of_the_allocator(setting: dict[str, str], kernel: str) -> tuple[bool, bool]:
    """In a process: what PyTorch's allocator has read, after the device of a GPU was chosen; and whether a CPU changes nothing."""
    from unittest import mock

    for option in ALLOCATOR_OPTIONS:
        os.environ.pop(option, None)
    os.environ.update(setting)
    platform.release = lambda: kernel
    before = dict(os.environ)
    resolve_device("cpu")
    is_unchanged = before == dict(os.environ)
    with mock.patch.multiple(
        torch.cuda, is_available=lambda: True, device_count=lambda: 1, set_device=lambda device: None
    ):
        resolve_device("auto")
    settings = torch._C._cuda_memorySnapshot(None)["allocator_settings"]  # type: ignore[attr-defined]
    return settings["expandable_segments"], is_unchanged


@pytest.mark.parametrize(
    ("setting", "kernel", "expected"),
    [
        ({}, "6.8.0-45-generic", True),
        ({}, "5.15.167.4-microsoft-standard-WSL2", False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, "6.8.0-45-generic", False),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "6.8.0-45-generic", False),
    ],
)
def test_segments_of_gpu_memory_expand_unless_the_user_chose(setting, kernel, expected):
    assert run_distributed(segments_of_the_allocator, 1, setting, kernel) == [(expected, True)]


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", (chosen := []).append)
    assert resolve_device("auto") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)], "sampling joins no process group, which would set it"
    with pytest.raises(UserError, match=r"run.device=cuda:1 names one GPU, but the launcher started 2 processes"):
        resolve_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="a process of local rank 2, but this machine has 2 GPUs"):
        resolve_device("auto")
