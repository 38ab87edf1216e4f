"""A file system without flock: Lustre without the option `flock`, NFS without a lock daemon, some FUSE file systems."""

import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scfm_core import files
from scfm_core.data import cache as cache_module
from scfm_core.data.cache import ShardCache
from scfm_core.files import lock_file
from scfm_core.train.run_dir import is_locked, locked

NUMBERS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL]


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    number = getattr(request, "param", errno.ENOSYS)

    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files, "_warned", set())


@pytest.mark.parametrize("without_locks", NUMBERS, indirect=True)
@pytest.mark.usefixtures("without_locks")
def test_is_said_once(tmp_path, capsys):
    for name in "ab":
        with (tmp_path / name).open("w") as file:
            assert lock_file(file) is None
            assert lock_file(file, wait=True) is None
            assert lock_file(file, shared=True) is None
    said = capsys.readouterr().err
    assert said.count(f"warning: the file system of {tmp_path} has no file locks") == 1


@pytest.mark.parametrize("without_locks", [errno.EIO, errno.ENOSPC, errno.EBADF], indirect=True)
@pytest.mark.usefixtures("without_locks")
def test_another_error_is_raised(tmp_path):
    with (tmp_path / "a").open("w") as file, pytest.raises(OSError):
        lock_file(file)


@pytest.mark.usefixtures("without_locks")
def test_a_run_starts(tmp_path):
    """Nobody knows whether another process trains in the folder, so it counts neither as locked nor as free."""
    assert is_locked(tmp_path) is False  # no run has been here
    with locked(tmp_path):
        assert is_locked(tmp_path) is None


@pytest.mark.usefixtures("without_locks")
def test_the_cache_downloads(tmp_path, monkeypatch):
    """Each process into a file of its own."""

    def fetch(uri: str, target: Path, deadline: float) -> None:
        target.write_bytes(b"content")

    monkeypatch.setattr(cache_module, "fetch", fetch)
    cache = ShardCache(tmp_path, 1000, 10.0)
    cache.sweep()
    with ThreadPoolExecutor(1) as pool:
        copies = list(pool.map(lambda name: cache.get(f"https://host/{name}", 7, None)[0], ["a.tar", "b.tar", "a.tar"]))
    assert [copy.read_bytes() for copy in copies] == [b"content"] * 3
    assert sorted(path.name.partition("-")[2] for path in tmp_path.glob("*-*")) == ["a.tar", "b.tar"]
