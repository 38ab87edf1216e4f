"""What a GPU asks of a process's beginning and end, held against a stand-in for NCCL and CUDA."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import ENGINES, joined_trainer, make_tree, run_distributed

from recipes import cli, ending
from scfm_core.distributed import world
from scfm_core.distributed.watchdog import Watchdog
from scfm_core.distributed.world import PATIENCE, join_world
from scfm_core.errors import UserError
from scfm_core.train.device import resolve_device


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


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"run.device=cuda:1 names one GPU, but the launcher started 2 processes"):
        resolve_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="a process of local rank 2, but this machine has 2 GPUs"):
        resolve_device("auto")
