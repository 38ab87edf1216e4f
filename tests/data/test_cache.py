"""The cache of shards: verified, never partial, within its limit, for any number of processes, also if killed."""

import functools
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save
from storage import FaultyProxy, S3Server

from scfm_core.data import cache, open_shards, prefetch, remote
from scfm_core.data import corpus as corpus_module
from scfm_core.data import manifest as manifest_module
from scfm_core.data.cache import ShardCache, cache_folder, warn_of_network
from scfm_core.data.corpus import Corpus
from scfm_core.data.loader import batches
from scfm_core.data.mds import MdsWriter
from scfm_core.data.picks import Picks
from scfm_core.data.prefetch import cache_needed, warn_of_small_cache
from scfm_core.data.recipe import CacheConfig, DataConfig, SourceConfig
from scfm_core.data.schema import MANIFEST, BadData, Manifest, Record
from scfm_core.data.webdataset import TarWriter
from scfm_core.errors import UserError

FORK = multiprocessing.get_context("fork")  # like the workers of the loader
SHARDS, SAMPLES = 6, 4
DRAFT = Manifest(encoder="e" * 64, fields={"text": "tokens", "pooled": "vector"}, text_length=4)
LONG = 60.0


def sample(seed: int) -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "latents": torch.randn(4, 32, 32, generator=generator),
        "text": torch.randn(4, 3, generator=generator),
        "pooled": torch.randn(5, generator=generator),
    }
    return {"safetensors": save(tensors), "txt": f"caption {seed}".encode(), "json": b"{}"}


def write_tars(folder: Path, first: int = 0, shards: int = SHARDS) -> Manifest:
    """Write shards of equal size; sample `n` of all is `sample(first + n)`."""
    folder.mkdir(parents=True)
    entries = []
    for shard in range(shards):
        with TarWriter(folder / f"{shard:05d}.tar") as writer:
            for number in range(shard * SAMPLES, (shard + 1) * SAMPLES):
                writer.write(f"{number:08d}", sample(first + number), (16, 16))
        entries.append(writer.entry)
    manifest = Manifest(**{**vars(DRAFT), "shards": tuple(entries)})
    manifest.write(folder / MANIFEST)
    return manifest


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """`s3://bucket/a` and `s3://bucket/b`: tars with the same names and different content, without checksums of S3."""
    folder = tmp_path_factory.mktemp("shards")
    write_tars(folder / "a")
    write_tars(folder / "b", first=1000)
    with S3Server(checksums=False) as server:
        server.upload(folder, "bucket")
        yield server


@pytest.fixture(scope="module")
def manifest(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of `s3://bucket/a`."""
    return write_tars(tmp_path_factory.mktemp("again") / "a")


@pytest.fixture(scope="module")
def connection(s3: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(connection: FaultyProxy, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    for name, value in {**s3.environment, "AWS_ENDPOINT_URL": connection.endpoint}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("S3_ENDPOINT_URL", raising=False)
    for what in (connection.rules, connection.requests, connection.faults):
        what.clear()
    connection.slow_seconds = 0.7
    return connection


@pytest.fixture(autouse=True)
def no_process_remains() -> Iterator[None]:
    Child.forked = False
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    if Child.forked:
        # The client shares its epoll with its copies in child processes. If they close a socket, it may get no more
        # events for it.
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(autouse=True)
def short_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gives up a stalled connection after five seconds instead of twenty."""
    monkeypatch.setattr(remote, "_STALL_SECONDS", 5.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def gets(proxy: FaultyProxy, part: str = ".tar") -> int:
    return sum(method == "GET" and part in path for method, path in proxy.requests)


PART = "00000.tar.81920.part"
"""Of an unfinished download, with its final size."""


def files(folder: Path) -> dict[str, int]:
    """Names (without keys) and bytes of all files except the lock."""
    found = {}
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if path.is_file() and path.name != ".room":
                found[path.name] = path.stat().st_size
    return found


def shards_in(folder: Path) -> list[str]:
    return sorted(name.partition("-")[2] for name in files(folder))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def recipe(folder: Path, *uris: str, limit: int | None = None, **changes: Any) -> DataConfig:
    kinds = changes.pop("format", "webdataset")
    return DataConfig(
        sources=tuple(SourceConfig(name=f"s{i}", uri=uri, format=kinds) for i, uri in enumerate(uris)),
        resolution=(16, 16),
        num_workers=0,
        cache=CacheConfig(dir=str(folder), limit_gb=None if limit is None else (limit + 0.5) / 1e9, timeout=LONG),
        **changes,
    )


@functools.cache
def expected(seed: int) -> tuple[str, bytes]:
    from safetensors.torch import load

    fields = sample(seed)
    return fields["txt"].decode(), load(fields["safetensors"])["latents"].numpy().tobytes()


def is_right(corpus: Corpus, item: int, seed: int) -> bool:
    record = corpus.record(item)
    assert record.latents is not None
    return (record.caption, record.latents.numpy().tobytes()) == expected(seed)


class Cache(ShardCache):
    """A cache for the shards of `s3://bucket/a`, by number."""

    def __init__(self, folder: Path, manifest: Manifest, limit: int | None = None) -> None:
        super().__init__(folder, limit, LONG)
        self.manifest = manifest

    @staticmethod
    def uri(number: int) -> str:
        return f"s3://bucket/a/{number:05d}.tar"

    def ask(self, number: int) -> tuple[Path, bool]:
        entry = self.manifest.shards[number]
        return self.get(self.uri(number), entry.bytes, entry.sha256)

    def is_right(self, number: int) -> bool:
        return hashlib.sha256(self.ask(number)[0].read_bytes()).hexdigest() == self.manifest.shards[number].sha256


class Child:
    """A forked process that calls a function."""

    forked = False

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        Child.forked = True
        self._answer, send = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._run, args=(send, function, arguments), daemon=True)
        self.process.start()
        send.close()

    @staticmethod
    def _run(send: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            send.send(function(*arguments))
        except Exception as error:
            send.send(error)

    def result(self, timeout: float = LONG) -> Any:
        assert self._answer.poll(timeout), "the process hangs"
        value = self._answer.recv()
        if isinstance(value, Exception):
            raise value
        return value

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.01)


class TestDamagedDownload:
    @pytest.mark.parametrize("mode", ["flip", "lying_short"])
    def test_once_is_downloaded_again(self, proxy: FaultyProxy, folder: Path, manifest: Manifest, mode: str) -> None:
        proxy.fail(mode, 1, path_contains=".tar")
        cache = Cache(folder, manifest)
        path, fresh = cache.ask(0)
        assert (hashlib.sha256(path.read_bytes()).hexdigest(), fresh) == (manifest.shards[0].sha256, True)
        assert (gets(proxy), shards_in(folder)) == (2, ["00000.tar"])

    @pytest.mark.parametrize(
        ("mode", "what"), [("flip", "its sha256 is .*, the manifest says"), ("lying_short", "bytes, the manifest says")]
    )
    def test_twice_is_an_error_and_leaves_no_file(
        self, proxy: FaultyProxy, folder: Path, manifest: Manifest, mode: str, what: str
    ) -> None:
        proxy.fail(mode, -1, path_contains=".tar")
        with pytest.raises(BadData, match=f"s3://bucket/a/00000.tar is corrupt, after two downloads: .*{what}"):
            Cache(folder, manifest).ask(0)
        assert (gets(proxy), list(folder.iterdir())) == (2, [])
        proxy.rules.clear()
        assert Cache(folder, manifest).is_right(0)

    def test_without_a_hash_only_the_size_is_checked(
        self, proxy: FaultyProxy, folder: Path, manifest: Manifest
    ) -> None:
        proxy.fail("lying_short", 1, path_contains=".tar")
        path, _ = ShardCache(folder, None, LONG).get(Cache.uri(0), manifest.shards[0].bytes, None)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest.shards[0].sha256
        assert gets(proxy) == 2

    @pytest.mark.parametrize("mode", ["403", "404", "503"])
    def test_a_failed_download_leaves_no_file(
        self, proxy: FaultyProxy, folder: Path, manifest: Manifest, mode: str
    ) -> None:
        proxy.fail(mode, -1, path_contains=".tar")
        cache = Cache(folder, manifest)
        cache.timeout = 0.3
        with pytest.raises(UserError, match=r"s3://bucket/a/00000.tar") as refused:
            cache.ask(0)
        assert not isinstance(refused.value, BadData)
        assert list(folder.iterdir()) == []

    def test_through_a_corpus(self, proxy: FaultyProxy, folder: Path) -> None:
        proxy.fail("flip", -1, path_contains="00002.tar")
        proxy.fail("flip", 1, path_contains="00003.tar")
        corpus = Corpus(recipe(folder, "s3://bucket/a"))
        for item in range(len(corpus)):
            if item // SAMPLES == 2:
                with pytest.raises(BadData, match=r"s3://bucket/a/00002.tar is corrupt"):
                    corpus.record(item)
            else:
                assert is_right(corpus, item, item)
        assert gets(proxy, "00002.tar") == gets(proxy, "00003.tar") == 2  # known as corrupt: not downloaded again
        assert shards_in(folder) == [f"{number:05d}.tar" for number in (0, 1, 3, 4, 5)]


class TestWarmCache:
    def warm(self, folder: Path) -> dict[str, Path]:
        corpus = Corpus(recipe(folder, "s3://bucket/a"))
        assert all(is_right(corpus, item, item) for item in range(len(corpus)))
        return {path.name.partition("-")[2]: path for path in folder.iterdir()}

    def test_is_not_downloaded_again(self, proxy: FaultyProxy, folder: Path) -> None:
        self.warm(folder)
        self.warm(folder)
        assert gets(proxy) == SHARDS

    @pytest.mark.parametrize("verify", [True, False])
    def test_a_truncated_copy_is_downloaded_again(self, proxy: FaultyProxy, folder: Path, verify: bool) -> None:
        copy = self.warm(folder)["00003.tar"]
        os.truncate(copy, copy.stat().st_size - 512)
        corpus = Corpus(recipe(folder, "s3://bucket/a", verify=verify))
        assert all(is_right(corpus, item, item) for item in range(len(corpus)))
        assert gets(proxy) == SHARDS + 1

    def test_a_flipped_bit_is_downloaded_again_once(self, proxy: FaultyProxy, folder: Path) -> None:
        copy = self.warm(folder)["00003.tar"]
        good = copy.read_bytes()
        flip(copy)
        corpus = Corpus(recipe(folder, "s3://bucket/a"))
        assert all(is_right(corpus, item, item) for item in range(len(corpus)))
        assert (gets(proxy, "00003.tar"), gets(proxy)) == (2, SHARDS + 1)
        assert copy.read_bytes() == good

    def test_a_flipped_bit_that_persists(self, proxy: FaultyProxy, folder: Path) -> None:
        copy = self.warm(folder)["00003.tar"]
        flip(copy)
        proxy.fail("flip", -1, path_contains="00003.tar")
        with pytest.raises(BadData, match=r"s3://bucket/a/00003.tar is corrupt, after two downloads"):
            Corpus(recipe(folder, "s3://bucket/a")).record(3 * SAMPLES)
        assert gets(proxy, "00003.tar") == 3
        assert not copy.exists()

    @pytest.mark.processes
    def test_processes_that_find_a_flipped_bit_at_the_same_time(self, proxy: FaultyProxy, folder: Path) -> None:
        copy = self.warm(folder)["00003.tar"]
        flip(copy)
        corpus = Corpus(recipe(folder, "s3://bucket/a"))
        children = [Child(is_right, corpus, 3 * SAMPLES + place, 3 * SAMPLES + place) for place in range(SAMPLES)]
        assert [child.result() for child in children] == [True] * SAMPLES


class TestKeys:
    def test_equal_names_of_two_addresses(self, proxy: FaultyProxy, folder: Path) -> None:
        corpus = Corpus(recipe(folder, "s3://bucket/a", "s3://bucket/b"))
        half = SHARDS * SAMPLES
        for _ in range(2):
            assert all(is_right(corpus, item, item) for item in range(half))
            assert all(is_right(corpus, half + item, 1000 + item) for item in range(half))
            corpus = Corpus(corpus.config)  # and again with a warm cache
        assert (len(files(folder)), gets(proxy)) == (2 * SHARDS, 2 * SHARDS)

    def test_another_hash_is_another_copy(self, proxy: FaultyProxy, s3: S3Server, folder: Path, tmp_path: Path) -> None:
        """The data set was encoded again, at the same address."""
        for first in (0, 500):
            write_tars(tmp_path / str(first), first=first, shards=1)
            s3.upload(tmp_path / str(first), "bucket", "changing")
            corpus = Corpus(recipe(folder, "s3://bucket/changing"))
            assert all(is_right(corpus, item, first + item) for item in range(SAMPLES))
        assert len(files(folder)) == 2

    def test_names_of_any_characters_and_length(self, folder: Path) -> None:
        cache = ShardCache(folder, None, LONG)
        uris = [f"s3://bucket/{name}.tar" for name in ("a b", "a+b", "ä", "x" * 300, "..", "-", "a\tb", "$(x)")]
        paths = {cache.path(uri, None) for uri in uris}
        assert len(paths) == len(uris)
        assert {path.parent for path in paths} == {folder}
        for path in paths:
            path.with_name(f"{path.name}.1.part").touch()

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"data\.cache\.dir: .*file/cache cannot be made .*Choose another folder"):
            ShardCache(tmp_path / "file" / "cache", None, LONG)


class TestFolder:
    """The default of `data.cache.dir`."""

    HOME = Path("/home/me/.cache/scfm/shards")

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in (*cache._JOBS, *cache._DISKS_OF_JOBS):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", "/home/me")
        for kind in ("xfs", "nfs4", "tmpfs"):
            (tmp_path / kind).mkdir()
        monkeypatch.setattr(cache, "type_of", lambda path: {"me": "nfs4"}.get(path.parts[2], path.name))

    def test_a_setting_wins(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "xfs"))
        assert cache_folder("~/copies") == Path("/home/me/copies")

    @pytest.mark.parametrize("name", cache._DISKS_OF_JOBS)
    @pytest.mark.parametrize("job", [*cache._JOBS, None])
    def test_a_local_disk_of_the_job(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, job: str | None
    ) -> None:
        """Without a job the variables may be anything, as TMPDIR of a shell."""
        monkeypatch.setenv(name, str(tmp_path / "xfs"))
        if job:
            monkeypatch.setenv(job, "1")
        assert cache_folder(None) == (tmp_path / "xfs" / f"scfm-{os.getuid()}" / "shards" if job else self.HOME)

    @pytest.mark.parametrize("kind", ["nfs4", "tmpfs", "gone"])
    def test_is_no_network_no_memory_and_exists(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
    ) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / kind))
        assert cache_folder(None) == self.HOME
        monkeypatch.setenv("TMPDIR", str(tmp_path / "xfs"))
        assert cache_folder(None).is_relative_to(tmp_path / "xfs")

    def test_on_a_network_is_said(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        warn_of_network(tmp_path / "xfs")
        assert capsys.readouterr().out == ""
        warn_of_network(self.HOME)
        said = capsys.readouterr().out
        assert "/home/me/.cache/scfm/shards" in said and "(nfs4). Set data.cache.dir" in said


@pytest.mark.processes
class TestProcesses:
    def test_one_downloads_for_all(self, proxy: FaultyProxy, folder: Path, manifest: Manifest) -> None:
        proxy.fail("slow", 1, path_contains=".tar")
        cache = Cache(folder, manifest)
        children = [Child(lambda: (cache.ask(0)[1], cache.is_right(0))) for _ in range(5)]
        assert sorted(child.result() for child in children) == [*[(False, True)] * 4, (True, True)]
        assert gets(proxy) == 1
        assert shards_in(folder) == ["00000.tar"]

    def test_different_shards_do_not_wait_for_each_other(
        self, proxy: FaultyProxy, folder: Path, manifest: Manifest
    ) -> None:
        proxy.slow_seconds = 30
        proxy.fail("slow", 1, path_contains="00000.tar")
        cache = Cache(folder, manifest)
        slow = Child(cache.is_right, 0)
        wait_until(lambda: proxy.faults)
        assert Child(cache.is_right, 1).result()
        assert shards_in(folder) == [PART, "00001.tar"]
        slow.kill()

    def test_a_partial_download_is_not_a_copy(self, proxy: FaultyProxy, folder: Path, manifest: Manifest) -> None:
        """No process reads an unfinished file."""
        proxy.fail("slow", 1, path_contains=".tar")
        cache = Cache(folder, manifest)
        writer = Child(cache.is_right, 0)
        copy = cache.path(cache.uri(0), manifest.shards[0].sha256)
        wait_until(lambda: any(files(folder).values()))
        (part,) = folder.iterdir()
        assert part != copy
        written = part.stat().st_ino
        sizes = set()
        while writer.process.is_alive():
            with suppress(FileNotFoundError):
                sizes.add(copy.stat().st_size)
        assert writer.result()
        assert sizes <= {manifest.shards[0].bytes}
        assert copy.stat().st_ino == written  # renamed atomically


@pytest.mark.processes
class TestKilled:
    @pytest.fixture(autouse=True)
    def few_bytes_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote, "_STALL_SECONDS", LONG)

    def in_the_middle(self, proxy: FaultyProxy, cache: Cache, mode: str = "stall") -> Child:
        proxy.slow_seconds = 30
        proxy.fail(mode, 1, path_contains=".tar")
        child = Child(cache.is_right, 0)
        wait_until(lambda: proxy.faults and any(size > 0 for size in files(cache.folder).values()))
        assert shards_in(cache.folder) == [PART]
        return child

    @pytest.mark.parametrize("mode", ["stall", "slow"])
    def test_the_next_process_takes_over_at_once(
        self, proxy: FaultyProxy, folder: Path, manifest: Manifest, mode: str
    ) -> None:
        cache = Cache(folder, manifest)
        self.in_the_middle(proxy, cache, mode).kill()
        assert shards_in(folder) == [PART]
        start = time.monotonic()
        assert cache.is_right(0)
        assert time.monotonic() - start < 15  # not after the 30 s of the connection, or the 60 s of the timeout
        assert shards_in(folder) == ["00000.tar"]

    def test_a_waiting_process_takes_over(self, proxy: FaultyProxy, folder: Path, manifest: Manifest) -> None:
        cache = Cache(folder, manifest)
        first = self.in_the_middle(proxy, cache)
        waiting = [Child(cache.is_right, 0) for _ in range(3)]
        time.sleep(0.3)
        assert gets(proxy) == 1
        first.kill()
        assert [child.result(15) for child in waiting] == [True] * 3
        assert (gets(proxy), shards_in(folder)) == (2, ["00000.tar"])

    def test_the_next_start_deletes_partial_downloads(
        self, proxy: FaultyProxy, folder: Path, manifest: Manifest
    ) -> None:
        cache = Cache(folder, manifest)
        self.in_the_middle(proxy, cache).kill()
        copy = cache.ask(1)[0]
        Corpus(recipe(folder, "s3://bucket/a"))
        assert [path for path in folder.iterdir() if path.is_file()] == [copy]

    def test_a_running_download_is_not_deleted(self, proxy: FaultyProxy, folder: Path, manifest: Manifest) -> None:
        proxy.fail("slow", 1, path_contains=".tar")
        cache = Cache(folder, manifest)
        living = Child(cache.is_right, 0)
        wait_until(lambda: shards_in(folder) == [PART] and proxy.faults)
        while living.process.is_alive() and "00000.tar" not in shards_in(folder):
            cache.sweep()
        assert living.result()
        assert (gets(proxy), shards_in(folder)) == (1, ["00000.tar"])

    def test_at_many_moments(self, proxy: FaultyProxy, folder: Path) -> None:
        """At any moment of a download, not only while the network is silent."""
        proxy.slow_seconds = 0.2
        proxy.fail("slow", -1, path_contains=".tar")
        generator = random.Random(5)
        for _ in range(6):
            readers = [Child(read_all, recipe(folder, "s3://bucket/a", limit=10**9), seed) for seed in range(2)]
            time.sleep(generator.uniform(0.05, 0.5))
            for reader in readers:
                reader.kill()
        proxy.rules.clear()
        assert read_all(recipe(folder, "s3://bucket/a", limit=10**9), 0) == SHARDS * SAMPLES
        assert shards_in(folder) == [f"{number:05d}.tar" for number in range(SHARDS)]


def read_all(config: DataConfig, seed: int, rounds: int = 1) -> int:
    """Read every sample of `s3://bucket/a` in random order; returns how many were right."""
    corpus = Corpus(config)
    items = list(range(len(corpus))) * rounds
    random.Random(seed).shuffle(items)
    return sum(is_right(corpus, item, item) for item in items)


def read_all_as_a_job(config: DataConfig, seed: int) -> int:
    os.setpgrp()
    children = [Child(read_all, config, seed + number) for number in range(2)]
    return sum(child.result() for child in children)


class TestLimit:
    def test_evicts_the_least_recently_used(self, proxy: FaultyProxy, folder: Path, manifest: Manifest) -> None:
        size = manifest.shards[0].bytes
        cache = Cache(folder, manifest, limit=3 * size)
        for number in (0, 1, 2, 0, 3):
            assert cache.is_right(number)
        assert shards_in(folder) == ["00000.tar", "00002.tar", "00003.tar"]
        for number in (2, 4, 5):
            assert cache.is_right(number)
            assert sum(files(folder).values()) <= 3 * size
        assert shards_in(folder) == ["00002.tar", "00004.tar", "00005.tar"]
        assert gets(proxy) == 6

    def test_evicts_no_more_than_needed(self, proxy: FaultyProxy, folder: Path, manifest: Manifest) -> None:
        cache = Cache(folder, manifest, limit=6 * manifest.shards[0].bytes)
        for number in range(SHARDS):
            cache.ask(number)
        assert len(files(folder)) == SHARDS

    def test_a_shard_larger_than_the_limit(self, proxy: FaultyProxy, folder: Path, manifest: Manifest) -> None:
        cache = Cache(folder, manifest, limit=manifest.shards[0].bytes - 1)
        with pytest.raises(UserError, match=r"data\.cache\.limit_gb: s3://bucket/a/00000\.tar alone .*Raise the limit"):
            cache.ask(0)
        assert gets(proxy) == 0

    def test_a_shard_larger_than_the_limit_leaves_no_file(
        self, proxy: FaultyProxy, folder: Path, manifest: Manifest
    ) -> None:
        with pytest.raises(UserError, match=r"data\.cache\.limit_gb"):
            Cache(folder, manifest, limit=1).ask(0)
        assert files(folder) == {}

    def test_an_open_copy_stays_readable_after_it_is_deleted(self, proxy: FaultyProxy, folder: Path) -> None:
        corpus = Corpus(recipe(folder, "s3://bucket/a"))
        assert all(is_right(corpus, item, item) for item in range(0, len(corpus), SAMPLES))
        for copy in folder.glob("*-*"):  # as another job with a small limit does
            copy.unlink()
        assert all(is_right(corpus, item, item) for item in range(len(corpus)))
        assert gets(proxy) == SHARDS

    def test_open_copies_have_no_more_bytes_than_the_limit(
        self, proxy: FaultyProxy, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A deleted copy keeps its space on the disk while a process has it open."""
        monkeypatch.setattr(open_shards, "_LEAST_COPIES", 1)
        corpus = Corpus(recipe(folder, "s3://bucket/a", limit=400_000))
        size = corpus.shard_bytes(0)
        for item in [*range(0, len(corpus), SAMPLES), 0]:
            assert is_right(corpus, item, item)
            copies = [
                path.stat().st_size  # of the open file, also if it is deleted
                for path in Path("/proc/self/fd").iterdir()
                if path.is_symlink() and str(folder) in str(path.readlink())
            ]
            assert sum(copies) <= 400_000 < sum(copies) + size or item < 4 * SAMPLES

    def test_a_copy_that_is_evicted_before_it_is_opened(
        self, proxy: FaultyProxy, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another process evicted it to free space: it is downloaded again, and does not count as corrupt."""
        get, taken = ShardCache.get, []

        def get_and_delete(*arguments: Any) -> tuple[Path, bool]:
            found = get(*arguments)
            if len(taken) < 3:
                taken.append(found)
                found[0].unlink()
            return found

        monkeypatch.setattr(ShardCache, "get", get_and_delete)
        assert is_right(Corpus(recipe(folder, "s3://bucket/a")), 0, 0)
        assert gets(proxy) == 4

    @pytest.mark.processes
    def test_processes_with_less_space_than_their_shards(
        self, proxy: FaultyProxy, folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(open_shards, "most_open", lambda: 1)
        limit = int(2.5 * manifest.shards[0].bytes)
        children = [Child(read_all, recipe(folder, "s3://bucket/a", limit=limit), seed, 2) for seed in range(4)]
        assert [child.result() for child in children] == [2 * SHARDS * SAMPLES] * 4
        assert gets(proxy) > 4 * SHARDS  # copies were evicted and downloaded again
        assert all(not name.endswith(".part") for name in files(folder))
        Cache(folder, manifest, limit).ask(0)
        assert sum(files(folder).values()) <= limit

    @pytest.mark.processes
    def test_concurrent_downloads_may_exceed_it_for_a_while(
        self, proxy: FaultyProxy, folder: Path, manifest: Manifest
    ) -> None:
        size = manifest.shards[0].bytes
        proxy.fail("slow", -1, path_contains=".tar")
        cache = Cache(folder, manifest, limit=int(2.5 * size))
        children = [Child(cache.is_right, number) for number in range(4)]
        most = 0
        while any(child.process.is_alive() for child in children):
            most = max(most, sum(files(folder).values()))
            time.sleep(0.005)
        assert all(child.result() for child in children)
        # Unfinished downloads cannot be evicted; finished copies can.
        assert cache.limit < most <= len(children) * size
        folder.joinpath(next(iter(files(folder)))).unlink()  # any of the four, to be downloaded again
        assert all(cache.is_right(number) for number in range(4))
        assert sum(files(folder).values()) <= cache.limit

    @pytest.mark.processes
    def test_two_jobs_with_different_limits(
        self, proxy: FaultyProxy, folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(open_shards, "most_open", lambda: 1)
        size = manifest.shards[0].bytes
        jobs = []
        for number, shards in enumerate((1.2, 4.2)):
            job = Child(
                read_all_as_a_non_daemonic_job, recipe(folder, "s3://bucket/a", limit=int(shards * size)), 10 * number
            )
            jobs.append(job)
        assert [job.result() for job in jobs] == [2 * SHARDS * SAMPLES] * 2
        copies = files(folder)
        assert copies
        assert set(copies.values()) == {size}  # complete ones

    def test_local_shards_are_not_copied(
        self, proxy: FaultyProxy, folder: Path, manifest: Manifest, tmp_path: Path
    ) -> None:
        write_tars(tmp_path / "local", first=2000)
        before = {path: path.read_bytes() for path in (tmp_path / "local").iterdir()}
        limit = int(1.5 * manifest.shards[0].bytes)
        corpus = Corpus(recipe(folder, "s3://bucket/a", str(tmp_path / "local"), limit=limit))
        half = SHARDS * SAMPLES
        assert all(is_right(corpus, item, item if item < half else 2000 + item - half) for item in range(2 * half))
        assert {path: path.read_bytes() for path in (tmp_path / "local").iterdir()} == before
        assert all(name.partition("-")[2] for name in files(folder))

    def test_other_files_are_not_deleted(self, proxy: FaultyProxy, manifest: Manifest, tmp_path: Path) -> None:
        write_tars(tmp_path / "local", first=2000)
        (tmp_path / "local" / "notes.txt").write_text("dear diary")
        before = {path: path.read_bytes() for path in (tmp_path / "local").iterdir()}
        Cache(tmp_path / "local", manifest, limit=2 * manifest.shards[0].bytes).ask(0)
        assert {path: path.read_bytes() for path in before if path.exists()} == before

    def test_a_folder_in_the_cache(self, proxy: FaultyProxy, folder: Path, manifest: Manifest) -> None:
        (folder / "sub").mkdir(parents=True)
        cache = Cache(folder, manifest, limit=manifest.shards[0].bytes)
        assert cache.is_right(0)
        assert cache.is_right(1)
        assert (folder / "sub").is_dir()


def read_all_as_a_non_daemonic_job(config: DataConfig, seed: int) -> int:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    return read_all_as_a_job(config, seed)


class TestOfALoader:
    """How often a run downloads its shards, which are 64 of 10 samples, and what it says of the size of its cache."""

    @pytest.fixture(scope="class")
    def small(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("small") / "shards"
        folder.mkdir()
        entries = []
        for shard in range(64):
            with TarWriter(folder / f"{shard:05d}.tar") as writer:
                for number in range(10 * shard, 10 * shard + 10):
                    writer.write(f"{number:08d}", {"jpg": b"", "txt": b""}, (16, 16))
            entries.append(writer.entry)
        Manifest(shards=tuple(entries)).write(folder / MANIFEST)
        return folder

    @pytest.fixture
    def downloads(self, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
        """A remote store without a server: its address is `s3://small`. Returns a function: the downloads so far."""
        log = tmp_path / "downloads"
        log.touch()

        def fetch(uri: str, target: Path, deadline: float) -> None:
            shutil.copyfile(small / uri.rpartition("/")[2], target)
            with log.open("a") as file:  # of any process
                file.write(f"{uri}\n")

        monkeypatch.setattr(cache, "fetch", fetch)
        monkeypatch.setattr(
            manifest_module, "fetch", lambda uri, to, _: shutil.copyfile(small / uri.rpartition("/")[2], to)
        )
        monkeypatch.setattr(corpus_module, "image_record", lambda *arguments: Record(key="", caption=""))
        original = Corpus.record

        def record(corpus: Corpus, item: int, *arguments: Any, **options: Any) -> Record:
            corpus.raw(item)[0].read(corpus.raw(item)[1], "txt")  # type: ignore[union-attr]
            return original(corpus, item, *arguments, **options)

        monkeypatch.setattr(Corpus, "record", record)
        return lambda: log.read_text().split()

    def run(
        self, folder: Path, limit: float, partitions: int, downloads: Callable[[], list[str]], *, ahead: int = 0
    ) -> int:
        """One epoch with two workers; returns the number of downloads.

        A network takes seconds for a batch, these tests nothing: they wait until the shards of the next `ahead` micro-batches have
        been downloaded. The workers alone are 8 ahead.
        """
        config = recipe(folder, "s3://small", shuffle_block=80, partitions=partitions)
        corpus = Corpus(replace(config, num_workers=2, cache=replace(config.cache, limit_gb=limit)))
        (uses,) = Picks(corpus.order(8, 0), 0, 80, 2).shard_uses(corpus)
        before = len(downloads())
        options = {"seed": 0, "global_batch_size": 8, "micro_batch_size": 2, "start": 0, "stop": 640}
        for number, batch in enumerate(batches(corpus, **options), 1):
            assert len(batch) == 2
            due = {f"s3://small/{use.shard:05d}.tar" for use in uses if use.first < number + ahead}
            end = time.monotonic() + LONG
            while not due.issubset(downloads()[before:]):
                assert time.monotonic() < end, "the shards were not downloaded ahead"
                time.sleep(0.005)
        return len(downloads()) - before

    @pytest.mark.processes
    @pytest.mark.parametrize("partitions", [1, 4])
    def test_each_shard_once_with_the_size_that_it_asks_for(
        self,
        downloads: Callable[[], list[str]],
        folder: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        partitions: int,
    ) -> None:
        monkeypatch.setattr(open_shards, "_LEAST_COPIES", 1)
        assert self.run(folder, 3e-5, partitions, downloads) > 64, "the warning is true"
        (said,) = capsys.readouterr().out.splitlines()
        assert said.startswith("warning: data.cache.limit_gb=3e-05 is less than the shards")
        (needed,) = re.findall(r"Set it to (\S+) or more", said)
        shutil.rmtree(folder)
        assert self.run(folder, float(needed), partitions, downloads, ahead=12) == 64
        assert capsys.readouterr().out == ""
        assert 0 < len(files(folder)) < 64, "the limit is below the data set"

    def test_says_nothing_without_a_limit_or_of_shards_on_a_disk(
        self, downloads: Callable[[], list[str]], folder: Path, small: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for uri, limit in (("s3://small", None), (str(small), 1e-6)):
            config = recipe(folder, uri)
            corpus = Corpus(replace(config, cache=replace(config.cache, limit_gb=limit)))
            warn_of_small_cache(corpus, Picks(corpus.order(8, 0), 0, 80, 2), 4)
        assert capsys.readouterr().out == ""

    def test_ranks_of_a_machine_share_their_shards(
        self, downloads: Callable[[], list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Eight ranks on two machines: with one partition all need the same shards, with eight each needs its own."""
        needed = {}
        for ranks, partitions in ((4, 1), (4, 2), (4, 8), (1, 8)):
            monkeypatch.setattr(prefetch, "local_size", lambda ranks=ranks: ranks)
            corpus = Corpus(recipe(folder, "s3://small", shuffle_block=80, partitions=partitions))
            needed[ranks, partitions] = cache_needed(corpus, Picks(corpus.order(8, 0), 0, 80, 1, 0, 8), 1)
        assert needed[4, 1] == pytest.approx(needed[4, 2], rel=0.3)
        assert needed[1, 8] < needed[4, 1] < needed[4, 8]
        assert needed[4, 8] == pytest.approx(4 * needed[1, 8], rel=0.3)


class TestDisk:
    def test_a_full_disk_is_named(self, proxy: FaultyProxy, s3: S3Server, tiny_disk: Path) -> None:
        s3.upload_bytes(bytes(2_000_000), "bucket", "large/x.tar")
        cache = ShardCache(tiny_disk / "cache", None, timeout=30)
        with pytest.raises(
            UserError, match=rf"^data\.cache\.dir: the disk of {tiny_disk}/cache is full\. Free some space"
        ):
            cache.get("s3://bucket/large/x.tar", 2_000_000, None)
        assert gets(proxy) == 1

    def test_a_full_disk_keeps_its_files(
        self, proxy: FaultyProxy, s3: S3Server, tiny_disk: Path, manifest: Manifest
    ) -> None:
        s3.upload_bytes(bytes(2_000_000), "bucket", "large/x.tar")
        cache = Cache(tiny_disk / "cache", manifest)
        assert cache.is_right(0)
        with pytest.raises(UserError, match=r"No space left|full"):
            cache.get("s3://bucket/large/x.tar", 2_000_000, None)
        assert shards_in(cache.folder) == ["00000.tar"]
        assert cache.is_right(0)
        assert cache.is_right(1)  # the disk has space for it again

    def test_full_of_other_files(self, proxy: FaultyProxy, tiny_disk: Path, manifest: Manifest) -> None:
        with (tiny_disk / "rest").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        cache = Cache(tiny_disk / "cache", manifest)
        with pytest.raises(UserError, match=r"data\.cache\.dir: the disk of .* is full"):
            cache.ask(0)
        assert files(cache.folder) == {}

    @pytest.mark.parametrize("warm", [True, False])
    def test_a_read_only_folder(self, proxy: FaultyProxy, tiny_disk: Path, manifest: Manifest, warm: bool) -> None:
        cache = Cache(tiny_disk / "cache", manifest)
        if warm:
            cache.ask(0)
        subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
        if warm:
            assert cache.is_right(0)
        else:
            with pytest.raises(UserError, match=r"data\.cache\.dir"):
                cache.ask(0)

    def test_a_folder_that_was_deleted_meanwhile(self, proxy: FaultyProxy, folder: Path, manifest: Manifest) -> None:
        cache = Cache(folder, manifest)
        cache.ask(0)
        shutil.rmtree(folder)
        assert cache.is_right(0)


ZEROS = bytes(400_000)


def write_mds(folder: Path, compression: str | None = "zstd:3", shard_bytes: int = 40_000) -> None:
    with MdsWriter(folder, ["safetensors", "txt"], DRAFT, shard_bytes=shard_bytes, compression=compression) as writer:
        for number in range(8):
            fields = sample(number)
            writer.write(f"{number:08d}", {name: fields[name] for name in ("safetensors", "txt")}, (16, 16))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        change(shard)
    (folder / "index.json").write_text(json.dumps(index))


class TestCompressedMds:
    @pytest.fixture
    def mds(self, tmp_path: Path, s3: S3Server) -> Path:
        write_mds(tmp_path / "mds")
        s3.upload(tmp_path / "mds", "bucket", tmp_path.name)
        return tmp_path / "mds"

    @pytest.fixture(params=["local", "remote"])
    def uri(self, request: pytest.FixtureRequest, mds: Path, tmp_path: Path) -> str:
        return str(mds) if request.param == "local" else f"s3://bucket/{tmp_path.name}"

    def test_is_decompressed(self, proxy: FaultyProxy, folder: Path, mds: Path, uri: str) -> None:
        before = {path: path.read_bytes() for path in mds.iterdir()}
        for _ in range(2):
            corpus = Corpus(recipe(folder, uri, format="mds"))
            assert [is_right(corpus, item, item) for item in range(len(corpus))] == [True] * 8
        assert len(files(folder)) == len(corpus.sources[0].manifest.shards) > 1
        assert gets(proxy, ".zstd") == (len(files(folder)) if uri.startswith("s3") else 0)
        assert {path: path.read_bytes() for path in mds.iterdir()} == before

    @pytest.mark.processes
    def test_concurrent_processes(self, proxy: FaultyProxy, folder: Path, uri: str, mds: Path) -> None:
        config = recipe(folder, uri, format="mds")
        children = [Child(lambda: Corpus(config).record(0).caption) for _ in range(4)]
        assert [child.result() for child in children] == ["caption 0"] * 4

    @pytest.mark.parametrize("times", [1, -1])
    def test_a_flipped_bit_in_the_download(
        self, proxy: FaultyProxy, folder: Path, mds: Path, tmp_path: Path, times: int
    ) -> None:
        proxy.fail("flip", times, path_contains=".zstd")
        corpus = Corpus(recipe(folder, f"s3://bucket/{tmp_path.name}", format="mds"))
        if times == 1:
            assert is_right(corpus, 0, 0)
            assert gets(proxy, ".zstd") == 2
        else:
            with pytest.raises(BadData, match=r"shard\.00000\.mds\.zstd is corrupt"):
                corpus.record(0)
            assert files(folder) == {}

    def test_a_flipped_bit_in_a_warm_cache(self, proxy: FaultyProxy, folder: Path, uri: str, mds: Path) -> None:
        corpus = Corpus(recipe(folder, uri, format="mds"))
        assert is_right(corpus, 0, 0)
        (copy,) = folder.iterdir()
        good = copy.read_bytes()
        flip(copy)
        corpus = Corpus(recipe(folder, uri, format="mds"))
        assert is_right(corpus, 0, 0)
        assert copy.read_bytes() == good
        assert gets(proxy, ".zstd") == (2 if uri.startswith("s3") else 0)

    def test_content_that_cannot_be_decompressed(self, folder: Path, mds: Path) -> None:
        shard = mds / "shard.00000.mds.zstd"
        shard.write_bytes(shard.read_bytes()[:100] + bytes(shard.stat().st_size - 100))

        def reseal(entry: dict[str, Any]) -> None:
            if entry["zip_data"]["basename"] == shard.name:
                entry["zip_data"]["hashes"]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()

        edit_index(mds, reseal)
        with pytest.raises(BadData, match=r"shard shard\.00000\.mds\.zstd cannot be decompressed"):
            Corpus(recipe(folder, str(mds), format="mds")).record(0)

    def test_an_intact_object_with_other_content(self, folder: Path, mds: Path) -> None:
        """The index has no hash of the compressed shard, only of the decompressed one, which must then be checked."""
        import zstd

        shard = mds / "shard.00000.mds.zstd"
        content = bytearray(zstd.decompress(shard.read_bytes()))
        content[-40] ^= 1
        shard.write_bytes(zstd.compress(bytes(content)))

        def no_hash(entry: dict[str, Any]) -> None:
            entry["zip_data"] = {
                "basename": entry["zip_data"]["basename"],
                "bytes": (mds / entry["zip_data"]["basename"]).stat().st_size,
                "hashes": {},
            }

        edit_index(mds, no_hash)
        with pytest.raises(BadData, match=r"shard\.00000\.mds"):
            Corpus(recipe(folder, str(mds), format="mds")).record(0)

    def test_the_limit_counts_decompressed_bytes(self, folder: Path, tmp_path: Path) -> None:
        with MdsWriter(
            tmp_path / "zeros", ["image", "txt"], Manifest(), shard_bytes=500_000, compression="zstd"
        ) as writer:
            for number in range(4):
                writer.write(f"{number}", {"image": ZEROS, "txt": b"nothing"}, None)
        config = recipe(folder, str(tmp_path / "zeros"), limit=900_000, format="mds")
        corpus = Corpus(config)
        for item in range(len(corpus)):
            assert corpus.caption(item) == "nothing"
            assert sum(files(folder).values()) <= 900_000


@pytest.mark.processes
def test_a_forked_process_does_not_use_its_parents_client(proxy: FaultyProxy, folder: Path, manifest: Manifest) -> None:
    """The client's thread does not survive a fork: a process that used the client would wait forever."""
    cache = Cache(folder, manifest)
    assert cache.is_right(0)
    assert fsspec.asyn.iothread[0] is not None
    assert Child(cache.is_right, 1).result()
