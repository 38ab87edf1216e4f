"""Batches from real shards have the order of order.py, for any ranks, workers, interruptions and bad samples."""

import errno
import gc
import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from scfm_core.data import source
from scfm_core.data.corpus import Corpus
from scfm_core.data.fields import FieldKind
from scfm_core.data.loader import batches
from scfm_core.data.mds import MdsWriter
from scfm_core.data.picks import Picks
from scfm_core.data.prefetch import Prefetcher
from scfm_core.data.recipe import CacheConfig, DataConfig, SourceConfig
from scfm_core.data.schema import MANIFEST, Batch, Manifest, Record, Size, collate
from scfm_core.data.webdataset import TarWriter
from scfm_core.errors import UserError

KINDS: dict[str, Any] = {"text": "tokens", "pooled": "vector"}
DRAFT = Manifest(encoder="e" * 64, fields=KINDS, text_length=1)
SIZE = (8, 8)
MANY = 10_000


def fields(number: int, size: Size = SIZE) -> dict[str, bytes]:
    """A cached sample; each of its parts contains its number."""
    shape = (1, size[0] // 8, size[1] // 8)
    tensors = {
        "latents": torch.full(shape, float(number)),
        "text": torch.full((1, 1), number + 0.25),
        "pooled": torch.full((1,), number + 0.5),
    }
    return {"safetensors": save(tensors), "txt": f"caption {number}".encode()}


def write_tars(
    folder: Path,
    counts: Sequence[int],
    *,
    first: int = 0,
    sizes: Sequence[Size] = (SIZE,),
    bad: Sequence[int] = (),
) -> Path:
    """Write samples `first`, `first + 1`, ... in shards, with sizes in turn; those in `bad` cannot be decoded."""
    folder.mkdir(parents=True)
    numbers, entries = itertools.count(first), []
    for shard, count in enumerate(counts):
        with TarWriter(folder / f"shard-{shard:06d}.tar") as writer:
            for number in itertools.islice(numbers, count):
                size = sizes[number % len(sizes)]
                sample = fields(number, size)
                if number in bad:
                    sample["safetensors"] = b"no tensors"
                writer.write(f"{number:08d}", sample, size)
        entries.append(writer.entry)
    Manifest(**{**DRAFT.__dict__, "shards": tuple(entries)}).write(folder / MANIFEST)
    return folder


def write_mds(folder: Path, count: int, *, first: int = 0, compression: str | None = None, shard_bytes: int) -> Path:
    with MdsWriter(folder, ["safetensors", "txt"], DRAFT, shard_bytes=shard_bytes, compression=compression) as writer:
        for number in range(first, first + count):
            writer.write(f"{number:08d}", fields(number), SIZE)
    return folder


def open_corpus(path: Path, **changes: Any) -> Corpus:
    return Corpus(DataConfig(**{"path": str(path), "resolution": SIZE, "num_workers": 0, **changes}))


def numbers_of(batch: Batch) -> list[int]:
    """The sample numbers of a batch, after checking that the parts of each sample belong together."""
    numbers = [int(key) for key in batch.keys]
    assert batch.captions == [f"caption {number}" for number in numbers]
    expected = torch.tensor(numbers).float()
    assert batch.latents is not None
    assert torch.equal(batch.latents.flatten(1)[:, 0], expected)
    assert torch.equal(batch.fields["text"].padded()[:, 0, 0], expected + 0.25)
    assert torch.equal(batch.fields["pooled"][:, 0], expected + 0.5)
    return numbers


def one_rank(
    corpus: Corpus, size: int, start: int, stop: int, *, micro: int, rank: int = 0, world_size: int = 1, end: int
) -> Iterator[Batch]:
    """Global batches `start` to `stop - 1` of a run of `end`, which is then interrupted."""
    stream = batches(
        corpus,
        seed=0,
        global_batch_size=size,
        micro_batch_size=micro,
        start=start * size,
        stop=end * size,
        rank=rank,
        world_size=world_size,
    )
    yield from itertools.islice(stream, (stop - start) * (size // world_size // micro))
    stream.close()


def read(
    path: Path,
    size: int,
    end: int,
    *,
    cuts: Sequence[int] = (),
    worlds: Sequence[int] = (1,),
    micro: int = 0,
    bad: list[str] | None = None,
    **changes: Any,
) -> list[int]:
    """The samples of `end` global batches, in order.

    Args:
        path: of the shards.
        size: of a global batch.
        end: global batches of the run.
        cuts: global batches before which the run is interrupted and resumed.
        worlds: number of ranks of each part, in turn.
        micro: samples of a micro-batch; 0: a rank's whole share.
        bad: gets the `bad` of all batches.
        changes: of the recipe.
    """
    stream: dict[int, int] = {}
    for (start, stop), world_size in zip(itertools.pairwise([0, *cuts, end]), itertools.cycle(worlds), strict=False):
        share = size // world_size
        corpus = open_corpus(path, **changes)  # as in a new process
        for rank in range(world_size):
            ids: list[int] = []
            options = {"micro": micro or share, "rank": rank, "world_size": world_size}
            for batch in one_rank(corpus, size, start, stop, **options, end=end):
                ids += batch.sample_ids.tolist()
                stream.update(zip(batch.sample_ids.tolist(), numbers_of(batch), strict=True))
                if bad is not None:
                    bad += batch.bad
            begins = [step * size + rank * share for step in range(start, stop)]
            assert ids == [begin + row for begin in begins for row in range(share)]
    assert sorted(stream) == list(range(end * size))
    return [stream[at] for at in range(end * size)]


def expected(path: Path, size: int, end: int, **changes: Any) -> list[int]:
    """The samples by `Order`, without reading any."""
    order = open_corpus(path, **changes).order(size, 0)
    rows: list[list[int]] = []
    for number in itertools.count():
        if len(rows) >= end:
            return [item for row in rows[:end] for item in row]
        rows += order.epoch(number).items.tolist()
    raise AssertionError


def kill_workers() -> None:
    """Kill remaining workers. They ignore SIGTERM, so pytest could not end."""
    if workers := multiprocessing.active_children():
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker is killed
        for worker in workers:
            worker.kill()
            worker.join()
        gc.collect()  # their loader forgets them, so that no later loader reports their death
        signal.signal(signal.SIGCHLD, handler)


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test() -> Iterator[None]:
    yield
    kill_workers()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 samples in 37 shards of 1 to about 700 samples."""
    draw = random.Random(0)
    edges = sorted([*draw.sample(range(2, MANY - 1), 34), 1, MANY - 1])
    counts = [stop - start for start, stop in itertools.pairwise([0, *edges, MANY])]
    assert len(counts) == 37
    assert min(counts) == 1
    assert max(counts) > 500
    return write_tars(tmp_path_factory.mktemp("many") / "shards", counts)


@pytest.fixture(scope="module")
def many_mds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 samples: 41 batches of 48 and 32 samples."""
    folder = write_mds(tmp_path_factory.mktemp("mds") / "shards", 2000, shard_bytes=40_000)
    assert len(list(folder.glob("*.mds"))) > 10
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 samples in 4 shards; batches of 4 cross the ends of epochs."""
    return write_tars(tmp_path_factory.mktemp("few") / "shards", (11, 1, 12, 6))


@pytest.fixture(scope="module")
def whole(many: Path) -> list[int]:
    """`many`, read by one process without interruption."""
    return read_many(many)


def read_many(many: Path, **changes: Any) -> list[int]:
    """41 batches of 240, and one more, which begins with the last 160 samples of the epoch."""
    return read(many, 240, 42, shuffle_block=500, **changes)


class TestTenThousandSamples:
    def test_are_in_the_order_of_order_py(self, many, whole):
        assert sorted(whole[:MANY]) == list(range(MANY))
        assert whole == expected(many, 240, 42, shuffle_block=500)
        assert whole[:100] != list(range(100))

    @pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (3, 0), (2, 2), (4, 2)])
    def test_occur_once_each_in_one_order(self, many, whole, world_size, workers):
        assert read_many(many, worlds=[world_size], num_workers=workers) == whole

    @pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (3, 2), (4, 0)])
    def test_with_three_interruptions(self, many, whole, world_size, workers):
        """The last interruption is between two epochs."""
        cuts = [1, 19, 41]
        assert read_many(many, cuts=cuts, worlds=[world_size], num_workers=workers) == whole

    @pytest.mark.processes
    @pytest.mark.parametrize("worlds", [(2, 4, 1), (1, 3, 2)])
    def test_on_another_number_of_processes_after_each(self, many, whole, worlds):
        assert read_many(many, cuts=[10, 41], worlds=worlds, micro=20, num_workers=1) == whole

    @pytest.mark.processes
    def test_of_mds(self, many_mds):
        stream = read(many_mds, 48, 42, format="mds")
        assert sorted(stream[:2000]) == list(range(2000))
        assert stream == expected(many_mds, 48, 42, format="mds")
        changes = {"cuts": [1, 19, 41], "worlds": [3, 2], "format": "mds", "num_workers": 2}
        assert read(many_mds, 48, 42, **changes) == stream


class TestResuming:
    def test_at_every_global_batch(self, few):
        whole = read(few, 4, 20)
        for start in range(20):
            assert read(few, 4, 20, cuts=[start]) == whole

    @pytest.mark.processes
    @pytest.mark.parametrize("start", [1, 7, 8, 15, 19])
    def test_with_two_workers(self, few, start):
        assert read(few, 4, 20, cuts=[start], num_workers=2) == read(few, 4, 20)

    @pytest.mark.processes
    def test_a_worker_does_not_collect_inherited_garbage(self, few, monkeypatch):
        """For example a process group: its destructor would abort a process that lacks the threads of the group."""
        record, home = Corpus.record, os.getpid()

        class Garbage:
            def __del__(self) -> None:
                if os.getpid() != home:
                    os._exit(1)

        collected: set[int] = set()

        def collecting(*arguments: Any, **options: Any) -> Record:
            if os.getpid() not in collected:  # once in each process: with torch loaded a collection takes long
                collected.add(os.getpid())
                gc.collect()
            return record(*arguments, **options)

        garbage: Any = Garbage()
        garbage.itself = garbage
        monkeypatch.setattr(Corpus, "record", collecting)
        gc.disable()  # so that the garbage exists until the fork
        try:
            del garbage
            assert read(few, 4, 5, num_workers=2) == read(few, 4, 5)
        finally:
            gc.enable()

    def test_at_the_end_no_batch_is_left(self, few):
        assert list(one_rank(open_corpus(few), 4, 20, 20, micro=4, end=20)) == []
        with_workers = open_corpus(few, num_workers=2)
        assert list(one_rank(with_workers, 4, 20, 20, micro=4, end=20)) == []


class TestStream:
    @pytest.mark.parametrize("micro", [1, 2, 3, 4, 6])
    def test_does_not_depend_on_the_micro_batch(self, few, micro):
        assert read(few, 12, 5, micro=micro) == read(few, 12, 5)

    def test_depends_on_the_recipes_seed_if_it_has_one(self, few):
        def stream(of_run: int, of_recipe: int | None = None) -> list[int]:
            options = {"global_batch_size": 6, "micro_batch_size": 6, "start": 0, "stop": 30}
            corpus = open_corpus(few, seed=of_recipe)
            return [number for batch in batches(corpus, seed=of_run, **options) for number in numbers_of(batch)]

        assert stream(0) != stream(1)
        assert stream(0, 5) == stream(1, 5) == stream(5)
        assert stream(1, 0) == stream(0)

    def test_sample_offset_continues_the_sample_ids(self, few):
        options = {"seed": 0, "global_batch_size": 4, "micro_batch_size": 2, "start": 4, "stop": 12}
        plain = list(batches(open_corpus(few), **options))
        shifted = list(batches(open_corpus(few), **options, sample_offset=1000))
        assert [b.sample_ids.tolist() for b in plain] == [[4, 5], [6, 7], [8, 9], [10, 11]]
        assert [(b.sample_ids - 1000).tolist() for b in shifted] == [b.sample_ids.tolist() for b in plain]
        assert [b.keys for b in shifted] == [b.keys for b in plain]

    def test_of_a_rank_reads_only_its_own_samples(self, few, monkeypatch):
        asked = []
        record = Corpus.record

        def counting(corpus: Corpus, item: int, *arguments: Any, **options: Any) -> Record:
            asked.append(item)
            return record(corpus, item, *arguments, **options)

        monkeypatch.setattr(Corpus, "record", counting)
        share = list(one_rank(open_corpus(few), 8, 0, 5, micro=2, rank=2, world_size=4, end=5))
        assert len(asked) == 10
        assert asked == [number for batch in share for number in numbers_of(batch)]

    def test_each_partition_stays_on_its_ranks(self, tmp_path):
        """Two machines with two ranks each: each machine needs half of the shards in an epoch."""
        path = write_tars(tmp_path / "shards", (10,) * 16)
        needed = []
        for ranks in ((0, 1), (2, 3)):
            shards = set()
            for rank in ranks:
                corpus = open_corpus(path, partitions=2, shuffle_block=20)
                for batch in one_rank(corpus, 8, 0, 20, micro=2, rank=rank, world_size=4, end=20):
                    shards |= {number // 10 for number in numbers_of(batch)}
            needed.append(shards)
        assert [len(shards) for shards in needed] == [8, 8]
        assert needed[0].isdisjoint(needed[1])
        assert read(path, 8, 40, worlds=[4, 1], cuts=[13], partitions=2) == read(path, 8, 40, partitions=2)

    @pytest.mark.processes
    def test_of_a_folder_is_the_same_with_workers(self, tmp_path):
        write_images(tmp_path / "images", 10)

        def stream(workers: int) -> list[tuple[int, str, int]]:
            corpus = open_corpus(tmp_path / "images", format="folder", num_workers=workers)
            rows = []
            for batch in one_rank(corpus, 4, 0, 5, micro=2, end=5):
                red = batch.images[:, 0, 0, 0].tolist()
                rows += zip(batch.sample_ids.tolist(), batch.keys, red, strict=True)
            return rows

        assert stream(2) == stream(0)
        (batch, *_) = one_rank(open_corpus(tmp_path / "images", format="folder"), 4, 0, 1, micro=4, end=1)
        assert batch.images.dtype == torch.uint8, (
            "a quarter of the bytes to pass to the training process and to the device"
        )
        assert batch.images.nbytes == 4 * 3 * 8 * 8
        assert [(key, red) for _, key, red in stream(0)] == [(f"{red}.png", red) for _, _, red in stream(0)]
        assert sorted(red for _, _, red in stream(0)) == sorted([*range(10), *range(10)])


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"caption {number}")


class TestSourcesOfEqualNames:
    """Shards of two folders have the same names and, with MDS, the same sizes."""

    @pytest.mark.processes
    @pytest.mark.parametrize("kind", ["tar", "mds", "compressed mds"])
    def test_both_are_read_by_their_weights(self, tmp_path, kind):
        sources = []
        for first, weight in ((0, 3.0), (100, 1.0)):
            folder = tmp_path / str(first) / "shards"
            if kind == "tar":
                write_tars(folder, (20, 20, 20), first=first)
            else:
                folder.parent.mkdir()
                compression = "zstd:1" if "compressed" in kind else None
                write_mds(folder, 60, first=first, shard_bytes=8000, compression=compression)
            form = "webdataset" if kind == "tar" else "mds"
            sources.append(SourceConfig(name=f"from{first}", uri=str(folder), format=form, weight=weight))
        first_names, second_names = ({p.name for p in (tmp_path / n / "shards").iterdir()} for n in ("0", "100"))
        assert first_names == second_names
        assert len(first_names) > 3
        cache = CacheConfig(dir=str(tmp_path / "cache"), timeout=20)
        changes = {"sources": tuple(sources), "epoch_size": 80, "cache": cache}
        for workers in (0, 2):
            corpus = Corpus(DataConfig(**changes, resolution=SIZE, num_workers=workers))
            stream = [n for batch in one_rank(corpus, 8, 0, 30, micro=8, end=30) for n in numbers_of(batch)]
            epochs = [stream[at : at + 80] for at in range(0, 240, 80)]
            assert [sum(number < 100 for number in epoch) for epoch in epochs] == [60, 60, 60]
            assert Counter(stream) == Counter({**dict.fromkeys(range(60), 3), **dict.fromkeys(range(100, 160), 1)})


class TestFewShards:
    """Ranks and workers share samples, not shards: there may be fewer shards than workers."""

    @pytest.mark.parametrize("counts", [(50,), (1,), (1, 2, 61), (3, 3)], ids=str)
    @pytest.mark.parametrize("workers", [0, 2])
    def test_serve_four_ranks(self, tmp_path, counts, workers):
        path = write_tars(tmp_path / "shards", counts)
        size, count = 8, sum(counts)
        end = -(-2 * count // size)
        stream = read(path, size, end, worlds=[4], num_workers=workers)
        assert stream == expected(path, size, end)
        assert Counter(stream[: 2 * count]) == Counter([*range(count)] * 2)

    def test_every_rank_takes_as_many_steps(self, tmp_path):
        corpus = open_corpus(write_tars(tmp_path / "shards", (1, 2, 61)))
        steps = [len(list(one_rank(corpus, 12, 0, 21, micro=1, rank=rank, world_size=4, end=21))) for rank in range(4)]
        assert steps == [63, 63, 63, 63]


SHAPES = ((8, 8), (8, 24), (24, 8))


class TestBuckets:
    @pytest.mark.processes
    def test_batches_are_of_one_shape_on_all_ranks(self, tmp_path):
        path = write_tars(tmp_path / "shards", (30, 7, 23), sizes=SHAPES)
        shapes: dict[int, set[tuple[int, ...]]] = {}
        for rank in range(2):
            corpus = open_corpus(path, buckets=SHAPES, num_workers=rank * 2)
            for batch in one_rank(corpus, 4, 0, 45, micro=1, rank=rank, world_size=2, end=45):
                step = int(batch.sample_ids[0]) // 4
                shapes.setdefault(step, set()).add(tuple(batch.latents.shape[2:]))
        assert {len(of_step) for of_step in shapes.values()} == {1}
        count = Counter(shape for of_step in shapes.values() for shape in of_step)
        assert count == {(1, 1): 15, (1, 3): 15, (3, 1): 15}  # 180 draws from 60 samples, a third of each size
        stream = read(path, 4, 45, worlds=[2], buckets=SHAPES)
        assert Counter(stream) == Counter([*range(60)] * 3)

    def test_images_of_all_sizes_are_cropped_to_the_nearest(self, tmp_path):
        (tmp_path / "images").mkdir()
        for number, size in enumerate([(50, 50), (60, 20), (100, 33), (21, 60), (48, 52), (30, 90)]):
            Image.new("RGB", size, (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
            (tmp_path / "images" / f"{number}.txt").write_text("caption")
        corpus = open_corpus(tmp_path / "images", format="folder", buckets=SHAPES)
        shapes = set()
        for batch in one_rank(corpus, 2, 0, 30, micro=2, end=30):
            red = batch.images[:, 0, 0, 0].tolist()
            shapes |= {(number, tuple(batch.images.shape[2:])) for number in red}
        assert shapes == {(0, (8, 8)), (4, (8, 8)), (1, (8, 24)), (2, (8, 24)), (3, (24, 8)), (5, (24, 8))}


class TestBadSamples:
    """`Order` chooses the substitutes, so that all ranks take the same number of steps."""

    BAD = (3, 11, 12, 25, 40, 41, 42)
    SIZE, END = 6, 20

    @pytest.fixture
    def path(self, tmp_path) -> Path:
        """60 samples, with two sizes in turn; seven cannot be decoded."""
        return write_tars(tmp_path / "shards", (14, 23, 1, 22), sizes=SHAPES[:2], bad=self.BAD)

    def read(self, path: Path, bad: list[str], **changes: Any) -> list[int]:
        changes = {"max_bad_fraction": 0.5, "buckets": SHAPES[:2], "bad": bad, **changes}
        return read(path, self.SIZE, self.END, **changes)

    def test_are_replaced_by_samples_of_their_size(self, path):
        bad: list[str] = []
        stream = self.read(path, bad)
        planned = expected(path, self.SIZE, self.END, buckets=SHAPES[:2])
        assert not set(stream) & set(self.BAD)
        for number, plan in zip(stream, planned, strict=True):
            assert number == plan or plan in self.BAD
            assert number % 2 == plan % 2
        places = [at for at, plan in enumerate(planned) if plan in self.BAD]
        assert len(places) == 2 * len(self.BAD)
        order = open_corpus(path, buckets=SHAPES[:2]).order(self.SIZE, 0)
        for at in places:  # the nearest one that is not bad itself
            number, place = order.locate(at // self.SIZE)
            spares = order.spares(order.epoch(number), place, at % self.SIZE)
            assert stream[at] == next(spare for spare in spares if spare not in self.BAD)

    def test_are_reported_once_each(self, path):
        bad: list[str] = []
        self.read(path, bad, worlds=[3], micro=1)
        planned = expected(path, self.SIZE, self.END, buckets=SHAPES[:2])
        said = [reason.split(": ", 2) for reason in sorted(bad, key=lambda reason: int(reason.split()[1][:-1]))]
        places = [at for at, plan in enumerate(planned) if plan in self.BAD]
        assert [where for where, *_ in said] == [f"sample {at}" for at in places]
        for at, (_, data, reason) in zip(places, said, strict=True):
            shard = next(number for number, end in enumerate((14, 37, 38, 60)) if planned[at] < end)
            assert data == "data"
            assert f"sample '{planned[at]:08d}' of shard {path}/shard-{shard:06d}.tar cannot be decoded" in reason

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize(("worlds", "cuts"), [((1,), ()), ((2,), ()), ((3, 1, 2), (1, 13)), ((6,), (19,))])
    def test_have_the_same_substitutes_everywhere(self, path, worlds, cuts, workers):
        first: list[str] = []
        second: list[str] = []
        whole = self.read(path, first)
        assert self.read(path, second, worlds=worlds, cuts=cuts, micro=1, num_workers=workers) == whole
        assert sorted(second) == sorted(first)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_of_a_whole_shard_are_replaced_from_other_shards(self, tmp_path, workers):
        """The hash shows a flipped bit. The samples of the shard are neighbours in the order."""
        path = write_tars(tmp_path / "good", (20, 20, 20))
        shard = path / "shard-000001.tar"
        content = bytearray(shard.read_bytes())
        content[5000] ^= 1
        shard.write_bytes(content)
        bad: list[str] = []
        stream = read(path, 6, 20, bad=bad, max_bad_fraction=0.9, num_workers=workers)
        assert not set(stream) & set(range(20, 40))
        assert len(bad) == 40
        assert all(f"shard {shard} is corrupt: its sha256 is" in reason for reason in bad)
        assert len(set(stream)) > 30  # not the same substitute for all
        assert stream == read(path, 6, 20, cuts=[7], worlds=[2, 3], max_bad_fraction=0.9)

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("tolerated", [0.0, 0.9])
    def test_stop_the_run_if_not_tolerated_or_without_substitute(self, tmp_path, tolerated, workers):
        path = write_tars(tmp_path / "shards", (4, 4), bad=range(8) if tolerated else (5,))
        with pytest.raises(UserError) as caught:
            read(path, 4, 4, max_bad_fraction=tolerated, num_workers=workers)
        assert type(caught.value) is UserError
        name = r"'0000000\d'" if tolerated else "'00000005'"
        assert caught.match(rf"^data: sample {name} of shard {path}/shard-00000\d.tar cannot be decoded")
        assert "\n" not in str(caught.value)
        assert multiprocessing.active_children() == []


class Unportable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class TestErrors:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_of_an_image_arrive_as_one_clean_line(self, tmp_path, workers):
        write_images(tmp_path / "images", 6)
        (tmp_path / "images" / "3.png").write_bytes(b"no image")
        corpus = open_corpus(tmp_path / "images", format="folder", num_workers=workers)
        message = r"^data: .*3\.png is not a readable image .*Remove it or replace it$"
        with pytest.raises(UserError, match=message) as caught:
            list(one_rank(corpus, 2, 0, 3, micro=2, end=3))
        assert "\n" not in str(caught.value)

    @pytest.mark.processes
    def test_end_the_workers(self, tmp_path):
        """The traceback of the error keeps the loader alive, and the interpreter joins the workers at exit."""
        corpus = open_corpus(write_tars(tmp_path / "shards", (6,), bad=[3]), num_workers=2)
        with pytest.raises(UserError) as caught:
            list(one_rank(corpus, 2, 0, 3, micro=2, end=3))
        left_over = multiprocessing.active_children()
        del caught
        kill_workers()
        assert left_over == []

    @pytest.mark.parametrize("workers", [0, 2])
    def test_come_after_the_batches_before_them(self, tmp_path, workers):
        path = write_tars(tmp_path / "shards", (20,), bad=[13])
        place = expected(path, 2, 10).index(13)
        assert place >= 2
        read_before = []
        with pytest.raises(UserError):
            for batch in one_rank(open_corpus(path, num_workers=workers), 2, 0, 10, micro=2, end=10):
                read_before += batch.sample_ids.tolist()
        assert read_before == list(range(place // 2 * 2))

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize(
        ("error", "kind", "said"),
        [
            (KeyError("no such thing"), KeyError, "'no such thing'"),
            (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left"),
            (Unportable("this", "that"), (RuntimeError, Unportable), "this and that"),
        ],
        ids=["a bug", "a disk", "one that cannot be pickled"],
    )
    def test_of_any_kind_come_in_place_of_their_batch(self, few, monkeypatch, workers, error, kind, said):
        """The trainer then saves a checkpoint on all ranks: only invalid content is the result of a sample."""
        record, place = Corpus.record, expected(few, 2, 10).index(7)

        def failing(corpus: Corpus, item: int, *arguments: Any, **options: Any) -> Record:
            if item == 7:
                raise error
            return record(corpus, item, *arguments, **options)

        monkeypatch.setattr(Corpus, "record", failing)
        read_before = []
        with pytest.raises(kind) as caught:
            for batch in one_rank(
                open_corpus(few, num_workers=workers, max_bad_fraction=0.5), 2, 0, 10, micro=2, end=10
            ):
                read_before += batch.sample_ids.tolist()
        assert said in str(caught.value) and "\n" not in str(caught.value)
        assert read_before == list(range(place // 2 * 2))
        shown = "".join(traceback.format_exception(caught.value))
        assert "in failing" in shown, "the place of the error"
        assert ("In a data worker" in shown) == (workers > 0)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_name_a_shard_that_goes_missing(self, tmp_path, workers):
        path = write_tars(tmp_path / "shards", (6, 6))
        corpus = open_corpus(path, num_workers=workers)
        (path / "shard-000001.tar").unlink()
        with pytest.raises(UserError, match=r"^data: shard .*/shard-000001.tar is listed in the manifest but missing"):
            list(one_rank(corpus, 4, 0, 3, micro=4, end=3))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_name_mixed_shapes(self, tmp_path, workers):
        """A cache whose manifest has one size, and whose shards have two."""
        folder = tmp_path / "shards"
        folder.mkdir()
        with TarWriter(folder / "shard-000000.tar") as writer:
            for number in range(4):
                writer.write(f"{number:08d}", fields(number, SHAPES[number % 2]), SIZE)
        Manifest(**{**DRAFT.__dict__, "shards": (writer.entry,)}).write(folder / MANIFEST)
        message = r"^data: a batch needs latents of one shape.*0000000.*\(1, 1, 1\), \(1, 1, 3\).*Set data.buckets$"
        with pytest.raises(UserError, match=message):
            list(one_rank(open_corpus(folder, num_workers=workers), 4, 0, 1, micro=4, end=1))


class TestProcesses:
    """Two workers, and the prefetcher."""

    @pytest.mark.processes
    def test_survive_the_signals_that_stop_a_run(self, few):
        """Ctrl-C, SIGTERM and Slurm's SIGUSR2 reach the whole process group, but the run must finish its step."""
        stream = one_rank(open_corpus(few, num_workers=2), 4, 0, 200, micro=4, end=200)
        # One batch of each worker: both are running.
        ids = next(stream).sample_ids.tolist() + next(stream).sample_ids.tolist()
        workers = multiprocessing.active_children()
        assert len(workers) >= 2
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            for worker in workers:
                os.kill(worker.pid, number)
        for batch in stream:
            ids += batch.sample_ids.tolist()
        assert ids == list(range(800))

    @pytest.mark.processes
    def test_the_prefetcher_survives_them_too(self, many):
        stream = one_rank(open_corpus(many, num_workers=1, shuffle_block=100), 10, 0, 900, micro=10, end=900)
        next(stream)
        assert len(multiprocessing.active_children()) == 2
        for child in multiprocessing.active_children():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
                os.kill(child.pid, number)
        time.sleep(0.5)
        assert len(multiprocessing.active_children()) == 2
        stream.close()

    @pytest.mark.processes
    def test_end_when_the_run_stops_early(self, many):
        stream = one_rank(open_corpus(many, num_workers=2, shuffle_block=100), 4, 0, 2000, micro=4, end=2000)
        next(stream)
        assert len(multiprocessing.active_children()) == 3
        stream.close()
        assert multiprocessing.active_children() == []

    @pytest.mark.processes
    def test_end_with_the_stream(self, few):
        list(one_rank(open_corpus(few, num_workers=2), 4, 0, 10, micro=4, end=10))
        assert multiprocessing.active_children() == []

    @pytest.mark.processes
    def test_end_when_the_run_is_killed(self, many):
        """After kill -9 of the training process its children end, and no file remains in shared memory."""
        script = RUN.format(path=str(many))
        before = set(Path("/dev/shm").iterdir())  # earlier processes with the same ids may have left names there
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            children = [int(number) for number in process.stdout.readline().split()]
            assert len(children) == 3
            assert all(map(is_running, children))
            process.kill()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and any(map(is_running, children)):
            time.sleep(0.1)
        assert not [child for child in children if is_running(child)]
        mine = {str(number) for number in (process.pid, *children)}
        new = set(Path("/dev/shm").iterdir()) - before
        assert not [path for path in new if mine & set(re.split(r"\D+", path.name))]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


RUN = """
import multiprocessing, time
from scfm_core.data.corpus import Corpus
from scfm_core.data.loader import batches
from scfm_core.data.recipe import DataConfig
config = DataConfig(path={path!r}, resolution=(8, 8), num_workers=2, shuffle_block=100)
stream = batches(Corpus(config), seed=0, global_batch_size=4, micro_batch_size=4, start=0, stop=40000)
next(stream), next(stream)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(600)
"""


def lines_when_idle(log: Path, expected: int = 0) -> list[str]:
    """The lines of a file that other processes write: waits for `expected` different ones, then until no more come."""
    seen, deadline = -1, time.monotonic() + 30
    while True:
        lines = log.read_text().split()
        if (len(set(lines)) >= expected and len(lines) == seen) or time.monotonic() > deadline:
            return lines
        seen = len(lines)
        time.sleep(0.3)


class TestPrefetcher:
    @pytest.fixture
    def prefetched(self, tmp_path, monkeypatch):
        """A function that returns the numbers of the shards that the prefetcher has prefetched, when it is idle."""
        log = tmp_path / "log"
        log.touch()

        def prefetch(corpus: Corpus, shard: int) -> None:
            with log.open("a") as file:
                file.write(f"{shard}\n")

        monkeypatch.setattr(Corpus, "prefetch", prefetch)
        return lambda expected=0: [int(line) for line in lines_when_idle(log, expected)]

    def first_needed(self, corpus: Corpus, size: int) -> dict[int, int]:
        """The first batch that needs each shard."""
        first: dict[int, int] = {}
        for at, row in enumerate(corpus.order(size, 0).epoch(0).items.tolist()):
            for item in row:
                first.setdefault(corpus.shard_of(item), at)
        return first

    @pytest.mark.processes
    @pytest.mark.parametrize("partitions", [1, 2])
    def test_is_at_most_two_blocks_ahead(self, tmp_path, prefetched, partitions):
        """Blocks of 80 samples are 20 batches of 4; of two partitions each gives half a batch, so that a block is 40 batches."""
        path = write_tars(tmp_path / "shards", (10,) * 60)
        corpus = open_corpus(path, num_workers=1, shuffle_block=80, partitions=partitions)
        first = self.first_needed(corpus, 4)
        stream = one_rank(corpus, 4, 0, 150, micro=4, end=150)
        done = 0
        for more in (1, 1, 29, 59):
            done += len(list(itertools.islice(stream, more)))
            wanted = {shard for shard, at in first.items() if at <= done + 40 * partitions}
            assert set(prefetched(len(wanted))) == wanted
        assert len(first) == 60
        stream.close()

    @pytest.mark.processes
    def test_prefetches_a_shard_again_in_the_next_epoch(self, tmp_path, prefetched):
        """Its copy may have been evicted by then."""
        path = write_tars(tmp_path / "shards", (10,) * 60)
        stream = one_rank(open_corpus(path, num_workers=1, shuffle_block=80), 4, 0, 300, micro=4, end=300)
        for _ in range(299):
            next(stream)
        times = Counter(prefetched(60))
        assert set(times) == set(range(60))
        assert sum(times.values()) > 100  # those around the end of the epoch were still in use
        stream.close()

    @pytest.mark.processes
    def test_leaves_a_tenth_of_the_cache_free(self, tmp_path, prefetched, monkeypatch):
        """All shards are in use at the same time: what does not fit is left to the workers."""
        path = write_tars(tmp_path / "shards", (10,) * 60)
        monkeypatch.setattr(Corpus, "shard_bytes", lambda corpus, shard: 1000)
        cache = CacheConfig(limit_gb=10_500 / 1e9)
        stream = one_rank(
            open_corpus(path, num_workers=1, shuffle_block=10_000, cache=cache), 4, 0, 150, micro=4, end=150
        )
        next(stream)
        assert len(set(prefetched(9))) == 9
        stream.close()

    def test_shards_that_are_no_longer_needed_are_neither_marked_nor_downloaded(self, tmp_path, monkeypatch):
        """A download waited for its thread or its marks, and the training went on meanwhile."""
        corpus = open_corpus(write_tars(tmp_path / "shards", (10,) * 4))
        prefetcher, did = Prefetcher(corpus, Picks(corpus.order(4, 0), 0, 10, 4)), []

        def mark(_: Corpus, shard: int) -> None:
            did.append(f"mark {shard}")
            prefetcher.count_micro_batch()

        monkeypatch.setattr(Corpus, "mark_used", mark)
        monkeypatch.setattr(Corpus, "prefetch", lambda _, shard: did.append(f"prefetch {shard}"))
        last_uses = {0: 1, 1: 0, 2: 5, 3: 1}
        prefetcher._prefetch(2, last_uses)
        assert did == ["mark 0", "mark 2", "prefetch 2"]
        did.clear()
        prefetcher._prefetch(3, last_uses)
        assert did == ["mark 2"]

    @pytest.mark.processes
    def test_is_idle_when_there_is_nothing_to_prefetch(self, tmp_path):
        """A data set of one shard, in a long run."""
        corpus = open_corpus(write_tars(tmp_path / "shards", (200,)), num_workers=1)
        stream = one_rank(corpus, 8, 0, 10, micro=8, end=2_000_000)
        next(stream)
        children = multiprocessing.active_children()
        time.sleep(0.5)
        before = [cpu_seconds(child.pid) for child in children]
        time.sleep(1)
        spent = [cpu_seconds(child.pid) - then for child, then in zip(children, before, strict=True)]
        stream.close()
        assert len(spent) == 2
        assert max(spent) < 0.1

    @pytest.mark.processes
    def test_prefetches_only_shards_of_its_rank(self, tmp_path, prefetched):
        path = write_tars(tmp_path / "shards", (10,) * 16)
        corpus = open_corpus(path, num_workers=1, partitions=2, shuffle_block=20)
        stream = one_rank(corpus, 8, 0, 20, micro=4, rank=1, world_size=2, end=20)
        needed = {number // 10 for batch in stream for number in numbers_of(batch)}
        assert len(needed) == 8
        assert set(prefetched()) <= needed

    @pytest.mark.processes
    def test_hashes_instead_of_the_workers(self, tmp_path, monkeypatch):
        """The prefetcher hashes every shard; a worker's own prefetching would reach only a few."""
        log = tmp_path / "log"
        log.touch()
        mismatch = source.mismatch

        def logging(file: BinaryIO, size: int, sha256: str | None) -> str | None:
            if sha256 is not None:
                with log.open("a") as lines:
                    lines.write(f"{Path(file.name).name}\n")
            return mismatch(file, size, sha256)

        monkeypatch.setattr(source, "mismatch", logging)
        path = write_tars(tmp_path / "shards", (10,) * 60)
        stream = one_rank(open_corpus(path, num_workers=1, shuffle=False), 4, 0, 300, micro=4, end=300)
        next(stream)
        hashed = lines_when_idle(log, 60)
        assert set(hashed) == {f"shard-{number:06d}.tar" for number in range(60)}
        assert len(list(stream)) == 299
        assert lines_when_idle(log) == hashed


def row(key: str, kind: FieldKind, value: torch.Tensor, padding: int | None = None) -> Record:
    return Record(key=key, caption="", fields={"field": value}, kinds={"field": kind}, padding=padding)


class TestCollate:
    def test_stacks_the_tensors_of_the_records(self):
        images = [Record(key=str(n), caption="", image=torch.full((3, 2, 2), float(n))) for n in range(3)]
        batch = collate([7, 8, 9], images)
        assert isinstance(batch, Batch)
        assert batch.sample_ids.dtype == torch.int64
        assert batch.images.shape == (3, 3, 2, 2)
        assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2]
        assert (batch.latents, batch.fields) == (None, {})
        assert batch.bad == []

    def test_texts_are_packed_without_padding(self):
        """Rows of two sources: the first stores full texts, the texts of the second get its padding."""
        own, padding = torch.arange(24.0).view(2, 4, 3).bfloat16(), -torch.arange(12.0).view(4, 3)
        cut = [
            row("a", "tokens", own[0, :1], padding=1),
            row("b", "tokens", own[1]),
            row("c", "tokens", own[0, :0], padding=1),
            row("d", "tokens", own[1], padding=1),
        ]
        batch = collate([0, 1, 2, 3], cut)
        text = batch.fields["field"]
        assert batch.lengths is None  # the network sees the padding
        assert text.tokens.shape == (9, 3)
        padded = text.padded([None, padding])
        assert padded.dtype == torch.bfloat16
        assert torch.equal(padded[0], torch.cat([own[0, :1], padding[1:]]))
        assert torch.equal(padded[1], own[1])
        assert torch.equal(padded[2], padding.bfloat16())
        assert torch.equal(padded[3], own[1])

    def test_masked_tokens_are_padded_with_zeros_to_the_longest_row(self):
        """They may have more than two axes, as those of several layers of a text encoder."""
        whole = torch.arange(1.0, 37).view(6, 3, 2)
        batch = collate(
            [0, 1, 2], [row(str(n), "masked", whole[first : first + n]) for n, first in ((2, 0), (1, 2), (3, 3))]
        )
        assert batch.lengths == (2, 1, 3)
        packed = batch.fields["field"]
        assert torch.equal(packed.tokens, whole)
        padded = packed.padded()
        assert padded.shape == (3, 3, 3, 2)
        for number, (length, first) in enumerate(((2, 0), (1, 2), (3, 3))):
            assert torch.equal(padded[number, :length], whole[first : first + length])
            assert not padded[number, length:].any()

    @pytest.mark.parametrize("kind", ["tokens", "masked"])
    def test_tokens_of_different_widths_are_refused(self, kind):
        rows = [row(f"key{n}", kind, torch.zeros(1, n + 1), padding=0) for n in range(2)]
        with pytest.raises(UserError, match=r"field of one shape.*key0, key1.*\(1,\), \(2,\).*scfm data validate"):
            collate([0, 1], rows)

    @pytest.mark.parametrize("kind", ["tokens", "vector"])
    def test_a_field_without_padding_has_one_shape(self, kind):
        rows = [row(f"key{n}", kind, torch.zeros(n + 1, 2)) for n in range(2)]
        with pytest.raises(UserError, match=r"field of one shape.*key0, key1.*\(1, 2\), \(2, 2\)"):
            collate([0, 1], rows)

    @pytest.mark.parametrize("name", ["latents", "image"])
    def test_an_error_names_what_differs(self, name):
        rows = [Record(key=f"key{n}", caption="", **{name: torch.zeros(n + 1)}) for n in range(2)]
        with pytest.raises(UserError, match=rf"{name} of one shape.*key0, key1.*\(1,\), \(2,\)"):
            collate([0, 1], rows)
