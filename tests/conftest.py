"""Which tests start processes, in which order and groups the tests run, and how the garbage of libraries is treated.

The fixtures are in tiny_fixtures.py, which the controller of pytest-xdist never imports: its workers would wait for that.
"""

import os
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import garbage
import pytest

CORES = len(os.sched_getaffinity(0))
LANES = max(1, CORES // 4)
"""Groups of `timed` tests: those of one group never run at the same time."""
_STARTS = {
    "subprocess.Popen",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "multiprocessing.Process.start",
}
_STARTING_FIXTURES = {"s3", "tiny_disk", "full_disk"}
"""A storage server of its own, a mounted file system."""
_fast_test: str | None = None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Marks, groups and order; `make test-fast` leaves out `processes`.

    Tests of several processes come first, since they are the longest: short ones fill the gaps at the end. Each `timed` test
    waits for what must happen within a time, and takes two cores by itself. All of them are in `LANES` groups, which begin at once.
    Other tests that share a fixture of their module are a group too, so that not every worker makes it.
    """
    for item in items:
        distributed = item.path.parent.name == "distributed" and hasattr(item.module, "run_distributed")
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        several = parameters.get("workers", 0) > 0 or parameters.get("processes", 1) > 1
        if distributed or several or _STARTING_FIXTURES.intersection(item.fixturenames):
            item.add_marker("processes")
    items.sort(key=lambda item: ("timed" not in item.keywords, "processes" not in item.keywords))
    modules = list(dict.fromkeys(item.path for item in items if "timed" in item.keywords))
    for item in items:
        if "timed" in item.keywords:
            item.add_marker(pytest.mark.xdist_group(f"timed{modules.index(item.path) % LANES}"))
        elif item.get_closest_marker("xdist_group") is None and (shared := _shared_fixtures(item)):
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            values = [str(parameters[name]) for name in shared if name in parameters]
            item.add_marker(pytest.mark.xdist_group(" ".join([item.path.stem, *values])))


def _shared_fixtures(item: pytest.Function) -> list[str]:
    """Fixtures that are made once for a module."""
    found = item._fixtureinfo.name2fixturedefs
    return sorted(name for name, made in found.items() if made[-1].scope == "module")


def pytest_configure(config: pytest.Config) -> None:
    """Groups begin in the order of their first tests; pytest-xdist would begin with the group of most tests."""
    config.option.loadscopereorder = False
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):  # not the controller
        config.pluginmanager.import_plugin("tiny_fixtures")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names of tests go through pipes, several times a test: files of megabytes that tests are given are not in them."""
    return f"{len(val)} of {type(val).__name__}" if isinstance(val, str | bytes) and len(val) > 500 else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: a worker a core, and those in the lanes of `timed`, which wait most of their time."""
    return CORES + LANES


def _refuse_processes(event: str, arguments: Any) -> None:
    if _fast_test is not None and event in _STARTS and not _is_importing():
        pytest.fail(
            f"{_fast_test} starts a process ({event} {str(arguments)[:200]}): mark it with @pytest.mark.processes"
        )


def _is_importing() -> bool:
    """Some libraries look at the machine with `file`, `df` or `ld` when they are imported."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
    return False


def _audited_start(process: BaseProcess) -> None:
    sys.audit("multiprocessing.Process.start", process)  # a forkserver's child is forked elsewhere
    _start(process)


sys.addaudithook(_refuse_processes)
_start, BaseProcess.start = BaseProcess.start, _audited_start  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    with garbage.left_alone():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that is not marked `processes` starts none, and so do its fixtures; `pytest.fail` is no Exception that code catches."""
    global _fast_test
    _fast_test = None if "processes" in item.keywords else item.nodeid
    try:
        return (yield)
    finally:
        _fast_test = None
        garbage.freeze_new_modules()
