"""What tests/conftest.py promises of the tests that `make test-fast` runs."""

import multiprocessing
import os
import subprocess
import time

import pytest
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import OfflineModeIsEnabled


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run(["true"]),
        lambda: os.system("true"),
        os.fork,
        lambda: multiprocessing.get_context("fork").Process(target=time.time).start(),
        lambda: multiprocessing.get_context("forkserver").Process(target=time.time).start(),
    ],
    ids=["subprocess", "system", "fork", "multiprocessing fork", "multiprocessing forkserver"],
)
def test_a_fast_test_starts_no_process(start):
    with pytest.raises(pytest.fail.Exception, match=r"starts a process .* mark it with @pytest\.mark\.processes"):
        start()


@pytest.mark.timed
def test_timed_tests_are_grouped(request):
    """Under `--dist loadgroup` the name of the group is part of the node's id; else there are no groups."""
    assert ("@timed" in request.node.nodeid) == getattr(request.config.option, "loadgroup", False)


@pytest.fixture(scope="module", params=["a"])
def once(request):
    return request.param


def test_tests_that_share_a_fixture_of_their_module_are_grouped(request, once):
    assert request.node.nodeid.endswith("@test_lanes a") == getattr(request.config.option, "loadgroup", False)


@pytest.mark.parametrize("value", ["x" * 501, b"x" * 501, "short"])
def test_names_of_tests_are_short(request, value):
    name = f"{len(value)} of {type(value).__name__}" if len(value) > 500 else value
    assert f"test_names_of_tests_are_short[{name}]" in request.node.nodeid
    assert all(len(item.nodeid) < 2000 for item in request.session.items)


def test_no_test_asks_the_hub():
    assert HF_HUB_OFFLINE
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info("black-forest-labs/FLUX.1-dev")
