"""Files that one process of a machine makes for all. Threads stand for processes: a lock belongs to the open file."""

import errno
import fcntl
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from scfm_core import files as locks
from scfm_core.data import machine
from scfm_core.data.machine import Arrays, MachineFiles, alone
from scfm_core.errors import UserError

LONG = 60.0


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch):
    monkeypatch.setattr(machine, "_warned", set())
    monkeypatch.setattr(locks, "_warned", set())


def no_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSYS) -> None:
    """A file system without flock, as Lustre by default."""

    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


class Maker:
    """Makes arrays, and counts how often."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls, self.seconds = 0, seconds

    def __call__(self, step: Any) -> Arrays:
        self.calls += 1
        time.sleep(self.seconds)
        step()
        return Arrays({"wide": np.arange(6).reshape(2, 3), "narrow": np.array([1, 2], np.int16)}, {"first": "7"})


def is_right(arrays: Arrays) -> bool:
    same = arrays["wide"].tolist() == [[0, 1, 2], [3, 4, 5]] and arrays["narrow"].tolist() == [1, 2]
    return same and arrays.texts == {"first": "7"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestGet:
    def test_makes_arrays_once(self, tmp_path):
        make, files = Maker(), MachineFiles(tmp_path / "cache", LONG)
        for _ in range(2):
            arrays = files.get("kind", "key", make)
            assert is_right(arrays)
            assert not arrays["wide"].flags.writeable
        assert is_right(MachineFiles(tmp_path / "cache", LONG).get("kind", "key", make))
        assert make.calls == 1
        files.get("kind", "other key", make)
        files.get("other kind", "key", make)
        assert make.calls == 3
        assert names(tmp_path / "cache" / "kind") == ["key.safetensors", "other key.safetensors"]

    def test_writes_safetensors(self, tmp_path):
        """Arrays of all types, also empty ones, begin where their type needs it."""
        kinds = (np.uint8, np.int16, np.int32, np.int64, np.float32, np.float64)
        arrays = {f"{kind.__name__}{count}": np.arange(count).astype(kind) for kind in kinds for count in (0, 1, 5)}
        found = MachineFiles(tmp_path, LONG).get("kind", "key", lambda _: Arrays(arrays))
        loaded = load_file(tmp_path / "kind" / "key.safetensors")
        assert set(arrays) == set(found.values) == set(loaded)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            assert found[name].flags.aligned
            assert np.array_equal(found[name], array)
            assert np.array_equal(loaded[name], array)

    @pytest.mark.parametrize(
        "damage", [b"", b"\0" * 100, b"\x08" + bytes(7) + b'{"a": 1}'], ids=["empty", "zeros", "other header"]
    )
    def test_makes_a_damaged_file_again(self, tmp_path, damage):
        make, files = Maker(), MachineFiles(tmp_path, LONG)
        files.get("kind", "key", make)
        (tmp_path / "kind" / "key.safetensors").write_bytes(damage)
        assert is_right(files.get("kind", "key", make))
        assert make.calls == 2
        assert is_right(files.get("kind", "key", make))
        assert make.calls == 2

    def test_makes_a_truncated_file_again(self, tmp_path):
        """Reading beyond the end of a mapped file would end the process."""
        make, files = Maker(), MachineFiles(tmp_path, LONG)
        files.get("kind", "key", make)
        path = tmp_path / "kind" / "key.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert is_right(files.get("kind", "key", make))
        assert make.calls == 2

    def test_in_a_folder_that_cannot_be_made(self, tmp_path, capsys):
        (tmp_path / "file").touch()
        make, files = Maker(), MachineFiles(tmp_path / "file" / "cache", LONG)
        for _ in range(2):
            assert is_right(files.get("kind", "key", make))
        said = capsys.readouterr().err
        assert said.count("warning: data.cache.dir: ") == 1
        assert "Each process keeps the kind in its own memory" in said

    def test_on_a_full_disk(self, tmp_path, monkeypatch, capsys):
        def fails(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(machine, "_write", fails)
        make = Maker()
        assert is_right(MachineFiles(tmp_path, LONG).get("kind", "key", make))
        assert make.calls == 1
        assert "cannot be written (the disk is full)" in capsys.readouterr().err
        assert names(tmp_path / "kind") == []

    def test_passes_an_error_on(self, tmp_path):
        def fails(_: Any) -> Arrays:
            raise UserError("data: damaged")

        with pytest.raises(UserError, match="data: damaged"):
            MachineFiles(tmp_path, LONG).get("kind", "key", fails)
        assert names(tmp_path / "kind") == []

    def test_deletes_the_least_recently_used_files(self, tmp_path):
        files, make = MachineFiles(tmp_path, LONG), Maker()
        for number in range(6):
            files.get("kind", str(number), make, kept=3)
            path = tmp_path / "kind" / f"{number}.safetensors"
            os.utime(path, ns=(number, number))
            if number == 3:
                files.get("kind", "1", make, kept=3)
        assert names(tmp_path / "kind") == [f"{number}.safetensors" for number in (1, 4, 5)]
        assert make.calls == 6

    def test_does_not_delete_a_file_in_use(self, tmp_path):
        """On NFS, another machine that maps it would lose its pages."""
        files, make = MachineFiles(tmp_path, LONG), Maker()
        used = files.get("kind", "0", make, kept=1)
        for number in range(1, 4):
            files.get("kind", str(number), make, kept=1)
        assert names(tmp_path / "kind") == ["0.safetensors", "3.safetensors"]
        assert is_right(used)


class TestSeveral:
    @pytest.mark.parametrize("has_locks", [True, False])
    def test_get_the_same(self, tmp_path, monkeypatch, has_locks):
        """One makes the file, and the others wait. Without locks each of them may make it; the result is the same."""
        if not has_locks:
            no_locks(monkeypatch)
        make, files = Maker(0.1), MachineFiles(tmp_path, LONG)
        with ThreadPoolExecutor(5) as pool:
            assert all(map(is_right, pool.map(lambda _: files.get("kind", "key", make), range(5))))
        assert make.calls == (1 if has_locks else 5)
        assert names(tmp_path / "kind") == ["key.safetensors"]

    def test_one_that_ends_is_replaced_at_once(self, tmp_path):
        """A lock ends with its process; the file of the lock remains."""
        begun, makes = threading.Event(), Maker()
        (tmp_path / "kind").mkdir()
        ended = (tmp_path / "kind" / "key.lock").open("ab")
        fcntl.flock(ended, fcntl.LOCK_EX)

        def get() -> Arrays:
            begun.set()
            return MachineFiles(tmp_path, LONG).get("kind", "key", makes)

        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(get)
            begun.wait()
            assert makes.calls == 0
            ended.close()
            assert is_right(result.result(10))
        assert names(tmp_path / "kind") == ["key.safetensors"]

    def test_one_that_hangs_is_not_waited_for(self, tmp_path, monkeypatch):
        """Without progress of the other process there is no beat either, so that the watchdog sees the hang."""
        beats: list[str] = []
        with (tmp_path / "lock").open("ab") as hung:
            fcntl.flock(hung, fcntl.LOCK_EX)
            monkeypatch.setattr(machine, "beat", beats.append)
            with alone(tmp_path / "lock", 0.2, "the order"):
                pass
        assert beats == ["waiting for another process: the order"]  # of the time that it saw first
        assert (tmp_path / "lock").exists()  # of the other one

    def test_one_that_works_is_waited_for(self, tmp_path, monkeypatch):
        """Longer than the patience, as long as there is progress, which the waiting process reports."""
        beats, stop, inside = [], threading.Event(), []

        def work() -> None:
            with alone(tmp_path / "lock", LONG, "the order") as step:
                inside.append("worker")
                while not stop.wait(0.01):
                    step()
            inside.append("worker ends")

        with ThreadPoolExecutor(1) as pool:
            pool.submit(work)
            while not inside:
                time.sleep(0.001)
            monkeypatch.setattr(
                machine, "beat", lambda where: beats.append(where) or (beats.count(WAITING) >= 12 and stop.set())
            )
            with alone(tmp_path / "lock", 0.15, "the order"):
                inside.append("waiting one")
        assert inside in (["worker", "worker ends", "waiting one"], ["worker", "waiting one", "worker ends"])
        assert beats.count(WAITING) >= 12
        assert not (tmp_path / "lock").exists()


class TestFetch:
    """A remote manifest is downloaded once by the processes that start together."""

    ADDRESS = "https://host/manifest.json"

    def test_of_several_that_begin_together(self, tmp_path):
        began, downloads = threading.Barrier(4), []

        def download(path: Path, left: float) -> None:
            assert 0 < left <= LONG
            downloads.append(path)
            time.sleep(0.2)
            path.write_bytes(b"content")

        def fetch() -> Any:
            began.wait()
            return MachineFiles(tmp_path, LONG).fetch(self.ADDRESS, download, LONG, 1)

        with ThreadPoolExecutor(4) as pool:
            paths = [call.result() for call in [pool.submit(fetch) for _ in range(4)]]
        assert len(downloads) == 1
        assert len(set(paths)) == 1
        assert paths[0].read_bytes() == b"content"
        assert names(tmp_path / "fetched") == [paths[0].name]

    def test_of_a_later_start_downloads_again(self, tmp_path):
        """The object may have another content by then."""
        for content in (b"first", b"second"):

            def download(path: Path, _: float, content: bytes = content) -> None:
                path.write_bytes(content)

            path = MachineFiles(tmp_path, LONG).fetch(self.ADDRESS, download, LONG, 1)
            assert isinstance(path, Path)
            assert path.read_bytes() == content

    def test_of_a_small_object_leaves_no_file(self, tmp_path):
        files = MachineFiles(tmp_path, LONG)
        assert files.fetch(self.ADDRESS, lambda path, _: path.write_bytes(b"abc") and None, LONG, 4) == b"abc"
        assert names(tmp_path / "fetched") == []

    def test_of_a_missing_object_is_an_error(self, tmp_path):
        def missing(*_: Any) -> None:
            raise UserError("data: there is no such object")

        with pytest.raises(UserError, match="there is no such object"):
            MachineFiles(tmp_path, LONG).fetch(self.ADDRESS, missing, LONG, 1)
        assert names(tmp_path / "fetched") == []

    def test_without_a_folder(self, tmp_path):
        (tmp_path / "file").touch()
        assert MachineFiles(tmp_path / "file", LONG).fetch(self.ADDRESS, lambda *_: None, LONG, 1) is None


WAITING = "waiting for another process: the order"


class TestWithoutLocks:
    @pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
    def test_files_are_made_and_deleted(self, tmp_path, monkeypatch, capsys, number):
        no_locks(monkeypatch, number)
        files, make = MachineFiles(tmp_path, LONG), Maker()
        for name in ("a", "a", "b"):
            assert is_right(files.get("kind", name, make, kept=1))
        assert make.calls == 2
        assert names(tmp_path / "kind") == ["b.safetensors"]
        assert capsys.readouterr().err.count("has no file locks") == 1
