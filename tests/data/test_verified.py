"""Of a large data set it is recorded which shards were hashed on this machine."""

import errno
import fcntl
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from storage import FileServer
from test_corpus import (
    CACHED,
    VICTIM,
    cached_samples,
    flip,
    flip_a_latent_bit,
    mix,
    open_corpus,
    reseal,
    usable,
    write_cache,
    write_mds,
)

from data_tools.validate import validate
from scfm_core import files
from scfm_core.data import machine, verified
from scfm_core.data import source as source_module
from scfm_core.data.recipe import CacheConfig, SourceConfig


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Seven samples in three shards: 3, 3, 1."""
    return write_cache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_LARGE", 0)
    monkeypatch.setattr(verified, "_SETTLED", 0)
    monkeypatch.setattr(machine, "_warned", set())


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {"cache": CacheConfig(dir=str(tmp_path / "machine"))}


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Bytes that this process and forked ones have hashed."""
    count = multiprocessing.get_context("fork").Value("q", 0)
    sha256_of = files.sha256_of

    def counting(file: Any) -> str:
        with count.get_lock():
            count.value += Path(file.name).stat().st_size
        return sha256_of(file)

    monkeypatch.setattr(files, "sha256_of", counting)
    return count


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


@pytest.mark.processes
def test_shards_are_hashed_once_on_a_machine(cache, options, hashed):
    """By one of four ranks, each with a corpus of its own. At the next start none is hashed."""
    context = multiprocessing.get_context("fork")

    def rank() -> None:
        corpus = open_corpus(cache, **options)
        assert [int(corpus.record(item).key) for item in range(7)] == list(range(7))

    for expected in (bytes_of(cache), 0):
        hashed.value = 0
        ranks = [context.Process(target=rank) for _ in range(4)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [0] * 4
        assert hashed.value == expected


@pytest.mark.parametrize("change", ["a bit", "its time", "its inode", "a bit, and the time set back"])
def test_a_changed_shard_is_hashed_again(cache, options, hashed, change):
    victim = cache / VICTIM
    usable(open_corpus(cache, **options))
    times = victim.stat().st_atime_ns, victim.stat().st_mtime_ns
    if "bit" in change:
        flip_a_latent_bit(victim)
    elif change == "its time":
        os.utime(victim)
    else:
        shutil.copy2(victim, cache / "copy")
        (cache / "copy").replace(victim)
    if "back" in change:
        os.utime(victim, ns=times)
    hashed.value = 0
    good, said = usable(open_corpus(cache, max_bad_fraction=0.5, **options))
    assert hashed.value == victim.stat().st_size
    assert (good, len(said)) == (([0, 1, 2, 6], 1) if "bit" in change else (list(range(7)), 0))


def test_a_shard_that_was_just_written_is_not_trusted(cache, options, hashed, monkeypatch):
    """It may change again within the same tick of the clock."""
    monkeypatch.setattr(verified, "_SETTLED", 10**15)
    for _ in range(2):
        hashed.value = 0
        usable(open_corpus(cache, **options))
        assert hashed.value == bytes_of(cache)


def test_each_folder_and_manifest_has_its_own_marks(cache, options, hashed, tmp_path):
    usable(open_corpus(cache, **options))
    shutil.copytree(cache, tmp_path / "copy")
    usable(open_corpus(tmp_path / "copy", **options))
    assert hashed.value == 2 * bytes_of(cache)
    flip_a_latent_bit(cache / VICTIM)
    reseal(cache, VICTIM)
    hashed.value = 0
    assert len(usable(open_corpus(cache, **options))[0]) == 7
    assert hashed.value == bytes_of(cache)


def test_validate_hashes_all_and_forgets_a_corrupt_shard(cache, options, hashed, monkeypatch):
    """A disk that returns other bytes without an error: the file's times do not show it."""
    monkeypatch.setattr(verified, "_mark", lambda file, entry, is_copy: entry.name.encode().rjust(32))
    usable(open_corpus(cache, **options))
    flip_a_latent_bit(cache / VICTIM)
    hashed.value = 0
    assert len(usable(open_corpus(cache, **options))[0]) == 7  # the flipped bit is not noticed
    assert hashed.value == 0
    corpus = open_corpus(cache, max_bad_fraction=0.5, **options)
    assert [Path(problem.shard).name for problem in validate(corpus)] == [VICTIM]
    assert hashed.value == bytes_of(cache)
    assert usable(open_corpus(cache, max_bad_fraction=0.5, **options))[0] == [0, 1, 2, 6]


def test_a_folder_that_cannot_be_written(cache, tmp_path, hashed, capsys):
    (tmp_path / "machine").write_text("a file")
    for number in (1, 2):
        usable(open_corpus(cache, cache=CacheConfig(dir=str(tmp_path / "machine"))))
        assert hashed.value == number * bytes_of(cache)
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "Every process hashes the shards that it reads" in said


def test_without_locks(cache, options, hashed, monkeypatch):
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        usable(open_corpus(cache, **options))
    assert hashed.value == bytes_of(cache)


def test_copies_in_the_cache(tmp_path, options, hashed):
    """Using a copy sets the time of its last use, but not that of its content."""
    path = write_mds(tmp_path / "data", cached_samples(), CACHED, compression="gz")
    for _ in range(3):
        assert len(usable(open_corpus(path, **options))[0]) == 7
    copies = [copy for copy in (tmp_path / "machine").iterdir() if copy.is_file()]
    packed = sum(shard.stat().st_size for shard in path.glob("*.mds.gz"))
    assert hashed.value == packed + sum(copy.stat().st_size for copy in copies)
    flip(copies[0], copies[0].stat().st_size - 1)
    assert len(usable(open_corpus(path, **options))[0]) == 7


def test_downloads(cache, tmp_path, options, hashed):
    """A download is hashed while it is stored, and not again."""
    with FileServer(cache) as server:
        source = SourceConfig(name="r", uri=f"{server.endpoint}/shard-{{000000..000002}}.tar")
        for _ in range(2):
            assert usable(mix(source, **options))[0] == list(range(7))
    assert hashed.value == bytes_of(cache)


def test_a_small_data_set_has_no_marks(cache, options, tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "_LARGE", 1 << 30)
    usable(open_corpus(cache, **options))
    assert not (tmp_path / "machine").exists()
