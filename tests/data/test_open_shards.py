"""The store of open shards: opened and parsed once an epoch, bounded by descriptors alone, read again after errors."""

import dataclasses
import errno
import os
import resource
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from scfm_core.data import open_shards, reading, webdataset
from scfm_core.data.corpus import Corpus
from scfm_core.data.loader import batches
from scfm_core.data.mds import MdsWriter
from scfm_core.data.members import Members, pack_table, table_of, write_members
from scfm_core.data.reading import retried
from scfm_core.data.recipe import CacheConfig, DataConfig, SourceConfig
from scfm_core.data.schema import MANIFEST, BadData, Manifest
from scfm_core.data.source import Source
from scfm_core.data.tar_table import parse_tar
from scfm_core.data.webdataset import TarShard, TarWriter
from scfm_core.errors import UserError

DRAFT = Manifest(encoder="e" * 64, fields={"text": "tokens", "pooled": "vector"}, text_length=1)
SHARDS, SAMPLES = 300, 2


def fields(number: int) -> dict[str, bytes]:
    tensors = {name: torch.full((1, 1, 1), float(number)) for name in ("latents", "text", "pooled")}
    tensors["text"] = tensors["text"][0]
    return {"safetensors": save(tensors), "txt": f"caption {number}".encode(), "json": b"{}"}


def write(folder: Path, shards: int = SHARDS, samples: int = SAMPLES) -> Path:
    folder.mkdir()
    entries = []
    for shard in range(shards):
        with TarWriter(folder / f"shard-{shard:06d}.tar") as writer:
            for number in range(shard * samples, (shard + 1) * samples):
                writer.write(f"{number:08d}", fields(number), (8, 8))
        entries.append(writer.entry)
    Manifest(**{**vars(DRAFT), "shards": tuple(entries)}).write(folder / MANIFEST)
    return folder


def read_manifest(folder: Path) -> Manifest:
    return Manifest.parse((folder / MANIFEST).read_text(), "it")


def open_corpus(folder: Path, **changes: Any) -> Corpus:
    return Corpus(DataConfig(**{"path": str(folder), "resolution": (8, 8), "num_workers": 0, **changes}))


def captions(corpus: Corpus, samples: int) -> set[str]:
    """The captions of a run over `samples` samples, shuffled all together."""
    stream = batches(corpus, seed=0, global_batch_size=4, micro_batch_size=4, start=0, stop=samples)
    return {caption for batch in stream for caption in batch.captions}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 shards of 2 samples."""
    return write(tmp_path_factory.mktemp("many") / "shards")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of each shard that is opened."""
    numbers, original = [], Source.open

    def counting(source: Source, number: int, **options: Any) -> Any:
        numbers.append(number)
        return original(source, number, **options)

    monkeypatch.setattr(Source, "open", counting)
    return numbers


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each shard that is parsed."""
    names, original = [], webdataset.parse_tar

    def counting(file: Any, name: str) -> Any:
        names.append(name)
        return original(file, name)

    monkeypatch.setattr(webdataset, "parse_tar", counting)
    return names


def expected(shards: int = SHARDS, samples: int = SAMPLES) -> set[str]:
    return {f"caption {number}" for number in range(shards * samples)}


class TestOneOpeningAnEpoch:
    def test_of_a_block_of_many_small_shards(self, many, opened):
        """`generate` and `encode` write 100 samples a shard: a block of 20,000 samples needs 200 shards at a time."""
        assert captions(open_corpus(many), SHARDS * SAMPLES) == expected()
        assert Counter(opened) == Counter(range(SHARDS))

    def test_a_tar_is_parsed_once_even_if_few_may_be_open(self, many, opened, parsed, monkeypatch):
        monkeypatch.setattr(open_shards, "most_open", lambda: 8)
        assert captions(open_corpus(many), SHARDS * SAMPLES) == expected()
        assert len(opened) > SHARDS * SAMPLES // 2
        assert len(parsed) == len(set(parsed)) == SHARDS

    def test_the_memory_of_the_tables_is_bounded(self, many, parsed, monkeypatch):
        corpus = open_corpus(many, shuffle=False)
        corpus.record(0)
        table = corpus._open_shards._tables[0].nbytes
        monkeypatch.setattr(open_shards, "_TABLE_BYTES", int(20.5 * table))
        monkeypatch.setattr(corpus._open_shards, "_most", 8)
        for _ in range(2):
            assert captions(corpus, SHARDS * SAMPLES) == expected()
            assert len(corpus._open_shards._tables) == 20
            assert corpus._open_shards._table_bytes == 20 * table
        assert len(parsed) == 1 + (SHARDS - 1) + SHARDS

    def test_a_table_has_less_than_40_bytes_a_sample(self, tmp_path):
        """What docs/data.md says, at the size of `generate`'s shards."""
        corpus = open_corpus(write(tmp_path / "shards", 1, 100))
        corpus.record(0)
        assert corpus._open_shards._tables[0].nbytes < 40 * 100


class TestRecordedMembers:
    """`manifest.members`: opening a tar reads none of its headers."""

    @pytest.fixture
    def recorded(self, tmp_path: Path) -> Path:
        folder = write(tmp_path / "shards", 3, 4)
        write_members(
            folder / MANIFEST, {str(e.sha256): table_of(folder / e.name) for e in read_manifest(folder).shards}
        )
        return folder

    def test_are_those_of_parsing(self, recorded, parsed):
        assert captions(open_corpus(recorded), 12) == expected(3, 4)
        assert parsed == []
        members = Members.beside(recorded / MANIFEST)
        assert members is not None
        for entry in read_manifest(recorded).shards:
            table = members.table(entry)
            with (recorded / entry.name).open("rb") as file:
                right = parse_tar(file, "it")
            assert table is not None and vars(table).keys() == vars(right).keys()
            assert all(np.array_equal(getattr(table, name), getattr(right, name)) for name in vars(right))

    def test_of_a_selection_of_the_shards(self, recorded, parsed):
        assert captions(open_corpus(recorded / "shard-00000{2,0}.tar"), 8) == expected(3, 4) - {
            f"caption {n}" for n in range(4, 8)
        }
        assert parsed == []

    def test_of_a_manifest_elsewhere(self, recorded, tmp_path, parsed):
        for kind in ("json", "members"):
            (recorded / f"manifest.{kind}").rename(tmp_path / f"mine.{kind}")
        source = SourceConfig(name="a", uri=str(recorded), manifest=str(tmp_path / "mine.json"))
        corpus = Corpus(DataConfig(sources=(source,), resolution=(8, 8), num_workers=0))
        assert captions(corpus, 12) == expected(3, 4)
        assert parsed == []

    def test_of_other_content_are_not_used(self, recorded, parsed):
        """A tar that was written again has another sha256."""
        entries = list(read_manifest(recorded).shards)
        with TarWriter(recorded / entries[1].name) as writer:
            for number in range(4, 8):
                writer.write(f"another-name-{number:08d}", fields(number), (8, 8))
        entries[1] = writer.entry
        Manifest(**{**vars(DRAFT), "shards": tuple(entries)}).write(recorded / MANIFEST)
        assert captions(open_corpus(recorded), 12) == expected(3, 4)
        assert parsed == [str(recorded / entries[1].name)]

    def test_that_are_damaged_are_not_used(self, recorded):
        """Any byte: the tars are parsed then, and nothing else happens."""
        path = recorded / "manifest.members"
        good = path.read_bytes()
        for at in range(0, len(good), 7):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            assert open_corpus(recorded).record(at % 12).caption == f"caption {at % 12}"
        for size in range(0, len(good), 97):
            path.write_bytes(good[:size])
            assert open_corpus(recorded).record(5).caption == "caption 5"

    def test_that_lead_out_of_the_tar_are_not_used(self, recorded):
        """With a right CRC: by somebody who wants more memory than there is to be read."""
        entry = read_manifest(recorded).shards[0]
        table = parse_tar((recorded / entry.name).open("rb"), "it")
        for change in (
            {"sizes": table.sizes.astype(np.uint64) + np.uint64(1 << 40)},
            {"blocks": table.blocks.astype(np.uint64) + np.uint64(1 << 40)},
            {"fields": table.fields + 5},
            {"starts": table.starts[::-1].copy()},
            {"keys": table.keys[:-1]},
        ):
            write_members(recorded / MANIFEST, {str(entry.sha256): pack_table(dataclasses.replace(table, **change))})
            assert open_corpus(recorded).record(0).caption == "caption 0"


class TestDescriptors:
    @pytest.fixture(autouse=True)
    def limits(self) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        yield
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    def test_the_soft_limit_is_raised(self):
        hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], open_shards._DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        assert open_shards.most_open() == hard // 2
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard

    def test_that_are_used_up_close_shards(self, many):
        """Others may have more files open than the half that is left to them."""
        corpus = open_corpus(many)
        used = len(list(Path("/proc/self/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        assert captions(corpus, SHARDS * SAMPLES) == expected()


class Faults:
    """Reads of shards fail: `numbers` has the errors to come, `seen` counts reads and pauses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.numbers: list[int] = []
        self.pauses: list[float] = []
        self.clock = 0.0
        monkeypatch.setattr(reading, "os", SimpleNamespace(pread=self.pread))
        monkeypatch.setattr(reading, "time", SimpleNamespace(monotonic=lambda: self.clock, sleep=self.sleep))

    def pread(self, descriptor: int, count: int, offset: int) -> bytes:
        if self.numbers and stat.S_ISREG(os.fstat(descriptor).st_mode):
            number = self.numbers.pop(0)
            raise OSError(number, os.strerror(number))
        return os.pread(descriptor, count, offset)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.clock += seconds


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


@pytest.fixture(params=["tar", "mds"])
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "tar":
        return write(tmp_path / "shards", 1, 4)
    with MdsWriter(tmp_path / "mds", ["safetensors", "txt", "json"], DRAFT) as writer:
        for number in range(4):
            writer.write(f"{number:08d}", fields(number), (8, 8))
    return tmp_path / "mds"


class TestErrorsThatMayPass:
    @pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ESHUTDOWN, errno.ENOTCONN])
    def test_of_a_read_open_the_file_again(self, shards, faults, opened, capsys, number):
        corpus = open_corpus(shards)
        assert corpus.record(0).caption == "caption 0"
        faults.numbers = [number] * 3
        assert corpus.record(1).caption == "caption 1"
        assert faults.numbers == [] and len(faults.pauses) == 3
        assert opened[1:], "a stale handle stays stale"
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("warning: data: shard ") and os.strerror(number) in line and "300 s" in line

    def test_of_an_opening_and_of_hashing(self, shards, faults, monkeypatch):
        """The first bytes of a shard are read when it is opened."""
        faults.numbers = [errno.EIO]
        assert open_corpus(shards).record(0).caption == "caption 0"
        calls, original = [], Source.open

        def failing(source: Source, number: int, **options: Any) -> Any:
            calls.append(options["check"])
            if len(calls) < 3:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return original(source, number, **options)

        monkeypatch.setattr(Source, "open", failing)
        corpus = open_corpus(shards)
        corpus.prefetch(0)
        assert calls == [True] * 3  # it is still hashed
        assert corpus.record(1).caption == "caption 1"

    def test_that_stay_end_with_their_cause_within_the_timeout(self, shards, faults):
        corpus = open_corpus(shards, max_bad_fraction=0.9, cache=CacheConfig(timeout=100))
        faults.numbers = [errno.EIO] * 1000
        with pytest.raises(
            UserError, match=r"^data: shard .* could not be read within 100 s; .*Input/output error"
        ) as caught:
            corpus.record(0)
        assert not isinstance(caught.value, BadData)  # the sample is not to blame
        assert isinstance(caught.value.__cause__, OSError)
        assert 80 < faults.clock <= 100
        faults.numbers = []
        assert corpus.record(0).caption == "caption 0"

    def test_pauses_grow_and_differ(self, faults):
        def fail() -> None:
            raise OSError(errno.EIO, "it")

        with pytest.raises(UserError):
            retried(fail, lambda: "it", 60)
        full = [min(0.25 * 2**attempt, 10.0) for attempt in range(len(faults.pauses))]
        assert all(most / 2 <= asked <= most for asked, most in zip(faults.pauses, full, strict=True))
        assert len(full) > 6

    @pytest.mark.parametrize("error", [KeyError("x"), OSError(errno.ENOSPC, "full"), BadData("data: bad")])
    def test_others_are_raised_at_once(self, faults, error):
        def fail() -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            retried(fail, lambda: "it", 60)
        assert caught.value is error and not faults.pauses

    def test_of_a_folder_of_images(self, tmp_path, faults, monkeypatch):
        Image.new("RGB", (8, 8), (7, 0, 0)).save(tmp_path / "a.png")
        (tmp_path / "a.txt").write_text("caption")
        corpus, original, left = open_corpus(tmp_path, format="folder"), Image.open, [errno.ESTALE, errno.EIO]

        def failing(*arguments: Any, **options: Any) -> Any:
            if left:
                raise OSError(left.pop(), "it")
            return original(*arguments, **options)

        monkeypatch.setattr(Image, "open", failing)
        assert corpus.record(0).caption == "caption"
        assert len(faults.pauses) == 2


class TestAFileThatChangesBeneath:
    def test_a_truncated_one_is_bad_data(self, shards):
        """A memory map would end the process with SIGBUS."""
        corpus = open_corpus(shards)
        corpus.record(0)
        (path,) = [path for path in shards.iterdir() if path.suffix in (".tar", ".mds")]
        os.truncate(path, 600)
        with pytest.raises(BadData, match=r"truncated|corrupt"):
            corpus.record(3)

    def test_a_text_is_not_cut_short(self, tmp_path):
        path = write(tmp_path / "shards", 1, 1) / "shard-000000.tar"
        shard = TarShard(path.open("rb"), "it")
        place = shard.table.place(0, "txt")
        assert place is not None
        os.truncate(path, place[0] + 4)
        with pytest.raises(BadData, match=r"shard it is truncated: 00000000.txt ends after the end"):
            shard.read(0, "txt")

    def test_a_deleted_one_is_read_to_its_end(self, shards):
        corpus = open_corpus(shards)
        corpus.record(0)
        for path in shards.iterdir():
            path.unlink()
        assert [corpus.record(number).caption for number in range(4)] == [f"caption {n}" for n in range(4)]

    def test_one_that_may_not_be_read_is_no_bad_data(self, shards, monkeypatch):
        """The whole shard is unavailable: its samples are not to be replaced one by one."""

        def refuse(*arguments: Any) -> Callable[..., Any]:
            raise PermissionError(errno.EACCES, "Permission denied")

        corpus = open_corpus(shards, max_bad_fraction=0.5)
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(UserError, match=r"cannot be opened \(Permission denied\)\. Make it readable") as caught:
            corpus.record(0)
        assert not isinstance(caught.value, BadData)


def test_a_short_read_is_continued(tmp_path, monkeypatch):
    """A file system may return fewer bytes than were asked for; only the end of the file returns none."""
    (tmp_path / "a").write_bytes(bytes(range(100)))
    monkeypatch.setattr(reading, "os", SimpleNamespace(pread=lambda fd, count, at: os.pread(fd, min(count, 7), at)))
    with (tmp_path / "a").open("rb") as file:
        assert reading.read_at(file.fileno(), 10, 80) == bytes(range(10, 90))
        assert reading.read_at(file.fileno(), 90, 80) == bytes(range(90, 100))
