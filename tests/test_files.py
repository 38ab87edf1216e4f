"""Hashes, comparison with a manifest, fsync."""

import hashlib
import io
import os
import resource
from pathlib import Path

import pytest

from scfm_core import files
from scfm_core.files import HashedFile, file_sha256, fsync_path, mismatch, permit_open_files, sha256_of

CONTENT = bytes(range(256)) * 5000  # more than the buffer of 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def test_sha256_of_a_path(path: Path, tmp_path: Path) -> None:
    assert file_sha256(path) == DIGEST
    (tmp_path / "empty").touch()
    assert file_sha256(tmp_path / "empty") == hashlib.sha256(b"").hexdigest()


def test_sha256_of_an_open_file_starts_at_its_beginning(path: Path) -> None:
    with path.open("rb") as file:
        file.seek(100)
        assert sha256_of(file) == DIGEST


def test_mismatch(path: Path) -> None:
    size, other = len(CONTENT), "0" * 64
    with path.open("rb") as file:
        assert mismatch(file, size, DIGEST) is None
        assert mismatch(file, size, None) is None
        assert mismatch(file, 7, DIGEST) == f"it has {size} bytes, the manifest says 7"
        message = mismatch(file, size, other)
    assert message == f"its sha256 is {DIGEST[:12]}..., the manifest says {other[:12]}..."


def test_a_wrong_size_is_found_without_hashing(path: Path) -> None:
    with path.open("rb") as file:
        assert mismatch(file, 7, DIGEST) is not None
        assert file.tell() == 0


@pytest.mark.parametrize("name", ["file", "."])
def test_fsync_of_a_file_or_a_folder(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    fsync_path(path.parent / name)
    assert synced == [(path.parent / name).stat().st_ino]


def test_a_hashed_file_is_on_the_disk_when_it_is_closed(tmp_path, monkeypatch):
    """PyTorch's checkpoint calls fsync before the last bytes have left Python's buffer."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with HashedFile(tmp_path / "x") as file:
        file.write(CONTENT)
        os.fsync(file.fileno())
    assert synced[-1] == len(CONTENT)
    assert file.entry == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    with HashedFile(tmp_path / "x") as file, pytest.raises(io.UnsupportedOperation):
        file.seek(0)


def test_a_hashed_file_is_flushed_from_time_to_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SYNC_BYTES", 1000)
    monkeypatch.setattr(files, "_WRITE_BYTES", 300)
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with HashedFile(tmp_path / "x") as file:
        assert file.write(bytes(5000)) == 5000
    assert synced == [1200, 2400, 3600, 4800]
    assert (tmp_path / "x").read_bytes() == bytes(5000)


@pytest.mark.parametrize(
    ("before", "after"),
    [((1024, 4096), (4096, 4096)), ((1024, 10**9), (1 << 17, 10**9)), ((10**6, 10**9), (10**6, 10**9))],
)
def test_a_process_may_open_as_many_files_as_the_system_permits(monkeypatch, before, after):
    """Of 512 ranks each needs more than the usual 1,024."""
    limits = {resource.RLIMIT_NOFILE: before}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    assert permit_open_files(1 << 17) == min(after[0], 1 << 17)
    assert limits == {resource.RLIMIT_NOFILE: after}
