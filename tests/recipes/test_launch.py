"""torchrun without its traceback: exit codes, and the time after a signal."""

import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from recipes import launch


@pytest.fixture
def closed(monkeypatch):
    """The seconds that the ranks were given, at each end."""
    given: list[int] = []
    monkeypatch.setattr(api.PContext, "close", lambda self, death_sig=None, timeout=30: given.append(timeout))
    monkeypatch.setattr(api, "_terminate_process_handler", api._terminate_process_handler)  # restored at the end
    launch.wait_after_signals()
    return given


def test_ranks_get_their_time_after_a_signal(closed):
    ranks: Any = SimpleNamespace()
    api.PContext.close(ranks)
    with pytest.raises(api.SignalException):
        api._terminate_process_handler(signal.SIGTERM, None)
    api.PContext.close(ranks, signal.SIGTERM)
    assert closed == [30, 24 * 3600]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((2, -15), 2), ((70, 2), 70), ((-9, -15), 137), ((143, 143), 143)],
    ids=["mistake", "lost rank", "killed", "stopped"],
)
def test_exit_code_of_the_first_failure(closed, monkeypatch, capsys, codes, expected):
    now = int(time.time())
    failures = {}
    for rank, code in enumerate(codes):
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="none")
        failures[rank].timestamp = now + rank

    def run(arguments: object) -> None:
        raise ChildFailedError("scfm", failures)

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr("logging.disable", lambda level: None)
    assert launch.main(["-m", "recipes.cli"]) == expected
    assert ("rank 0 was ended by SIGKILL. Most often the memory" in capsys.readouterr().err) == (codes[0] == -9)
