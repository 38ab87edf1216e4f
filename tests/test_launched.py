"""Variables of a launcher, and those that are left over from another one."""

import pytest

from scfm_core.errors import UserError
from scfm_core.launched import launched_rank, launched_size, local_rank, local_size

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def launch(monkeypatch):
    def set_variables(**variables: str) -> list[int]:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return [read() for read in (launched_rank, launched_size, local_rank, local_size)]

    return set_variables


def test_of_torchrun(launch):
    assert launch() == [0, 1, 0, 1]
    assert launch(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4") == [5, 8, 1, 4]


def test_left_over_without_a_launch_are_ignored(launch):
    assert launch(RANK="1", LOCAL_RANK="3", LOCAL_WORLD_SIZE="4") == [0, 1, 0, 1]
    assert launch(RANK="1", WORLD_SIZE="1") == launch(RANK="", WORLD_SIZE="") == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not a number of at least 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK=-1 is not a number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ],
)
def test_that_cannot_be_are_refused(launch, variables, message):
    with pytest.raises(UserError, match=message):
        launch(**variables)
