"""The order of samples: a pure function of (seed, global index), whatever the workers, batches and restarts."""

import gc
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from scfm_core.data.folder import ImageFolder
from scfm_core.data.loader import DataConfig, batches, dataset_index, open_dataset
from scfm_core.data.schema import Batch, Manifest, Record, collate
from scfm_core.data.webdataset import CachedDataset, ShardWriter
from scfm_core.errors import UserError

LENGTH = 10
DRAFT = Manifest(encoder="e", text_length=1, resolution=(8, 8), samples=0, shards=())


class Numbers:
    """A dataset whose every part tells its index."""

    fingerprint = "numbers"

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def caption(self, index: int) -> str:
        return f"caption {index}"

    def __getitem__(self, index: int) -> Record:
        full = torch.full((2,), float(index))
        return Record(key=str(index), caption=self.caption(index), latents=full, text=full + 0.25, pooled=full + 0.5)


def make_config(**changes: object) -> DataConfig:
    return DataConfig(**{"path": "unused", "num_workers": 0, **changes})


def read(dataset=None, *, start=0, stop=40, micro=4, seed=0, **changes) -> list[tuple[int, int]]:
    """(global index, record) of every sample, after checking that the parts of each belong together."""
    stream = []
    for batch in batches(
        dataset or Numbers(), make_config(**changes), seed=seed, micro_batch_size=micro, start=start, stop=stop
    ):
        assert len(batch) == micro
        numbers = [int(key) for key in batch.keys]
        assert batch.captions == [f"caption {number}" for number in numbers]
        assert torch.equal(batch.latents[:, 0], torch.tensor(numbers).float())
        assert torch.equal(batch.text, batch.latents + 0.25)
        assert torch.equal(batch.pooled, batch.latents + 0.5)
        stream += zip(batch.sample_ids.tolist(), numbers, strict=True)
    return stream


def records(stream: list[tuple[int, int]]) -> list[int]:
    return [record for _, record in stream]


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"caption {number}")


def end_workers() -> None:
    """Kill the workers that are left over: they ignore SIGTERM, so pytest could not end."""
    if workers := multiprocessing.active_children():
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises when a worker is killed
        for worker in workers:
            worker.kill()
            worker.join()
        gc.collect()  # their loader forgets them, so that no later one complains of their death
        signal.signal(signal.SIGCHLD, handler)


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test():
    yield
    end_workers()


class TestOrder:
    def test_is_pinned(self):
        """A change of this order breaks the resuming of every run there is."""
        assert records(read(stop=20)) == [3, 8, 4, 7, 1, 6, 5, 0, 2, 9, 4, 2, 0, 9, 1, 6, 7, 3, 8, 5]

    def test_sample_ids_count_the_endless_stream(self):
        assert [index for index, _ in read(start=12, stop=36)] == list(range(12, 36))

    def test_every_epoch_is_another_permutation(self):
        stream = records(read(stop=60))
        epochs = [tuple(stream[at : at + LENGTH]) for at in range(0, 60, LENGTH)]
        assert all(sorted(epoch) == list(range(LENGTH)) for epoch in epochs)
        assert len(set(epochs)) == 6

    def test_seeds_differ(self):
        assert records(read(seed=0)) != records(read(seed=1))

    def test_neighbouring_seeds_do_not_share_epochs(self):
        """With a generator seeded by seed + epoch, run 1 would be run 0 without its first epoch."""
        assert records(read(seed=0, start=LENGTH, stop=LENGTH + 8)) != records(read(seed=1, stop=8))

    def test_batches_straddle_epochs_and_drop_nothing(self):
        stream = records(read(Numbers(7), stop=28, micro=4))
        assert all(sorted(stream[at : at + 7]) == list(range(7)) for at in range(0, 28, 7))

    def test_batch_larger_than_the_dataset(self):
        assert records(read(Numbers(3), stop=16, micro=8)) == records(read(Numbers(3), stop=16, micro=1))

    @pytest.mark.parametrize("micro", [1, 2, 4, 8])
    def test_micro_batch_size_does_not_matter(self, micro):
        assert read(micro=micro) == read(micro=5)

    def test_without_shuffling_it_is_the_files_order_again_and_again(self):
        assert records(read(stop=24, shuffle=False)) == [*range(LENGTH), *range(LENGTH), 0, 1, 2, 3]

    def test_global_random_state_does_not_matter(self):
        torch.manual_seed(1)
        first = read()
        torch.manual_seed(2)
        assert read() == first

    def test_index_does_not_depend_on_what_was_asked_before(self):
        """The permutations of the last epochs are kept: seed, epoch and length must all be in the key."""
        questions = [(index, length, seed) for index in range(0, 40, 3) for length in (5, 10) for seed in (0, 1)]
        forwards = {question: dataset_index(*question) for question in questions}
        assert {question: dataset_index(*question) for question in reversed(questions)} == forwards


class TestResuming:
    def test_at_every_micro_batch(self):
        whole = read()
        for start in range(0, 40, 4):
            assert read(start=start) == whole[start:]

    @pytest.mark.parametrize("start", [0, 4, 20, 36])
    def test_with_two_workers(self, start):
        assert read(start=start, num_workers=2) == read()[start:]

    def test_three_times_one_of_them_at_an_epochs_end(self):
        parts = read(stop=4) + read(start=4, stop=LENGTH, micro=2) + read(start=LENGTH, stop=40, micro=5)
        assert parts == read()

    def test_at_the_end_there_is_nothing_left(self):
        assert read(start=40) == []


class TestRanks:
    """A step's samples are the same, in the same order, however many processes share them."""

    def shares(self, world_size: int, *, micro: int, start: int = 0, stop: int = 48, **changes) -> list[list[Batch]]:
        options = {"seed": 0, "micro_batch_size": micro, "start": start, "stop": stop, "world_size": world_size}
        return [list(batches(Numbers(), make_config(**changes), rank=rank, **options)) for rank in range(world_size)]

    @pytest.mark.parametrize("world_size", [1, 2, 4])
    @pytest.mark.parametrize(("micro", "start"), [(1, 0), (2, 0), (4, 0), (2, 16)])
    def test_take_consecutive_micro_batches_in_turn(self, world_size, micro, start):
        shares = self.shares(world_size, micro=micro, start=start)
        together = [batch for round_ in zip(*shares, strict=True) for batch in round_]
        ids = [batch.sample_ids.tolist() for batch in together]
        assert ids == [list(range(at, at + micro)) for at in range(start, 48, micro)]
        assert [int(key) for batch in together for key in batch.keys] == records(read(start=start, stop=48))

    @pytest.mark.parametrize("world_size", [2, 4])
    def test_global_batches_are_those_of_one_process(self, world_size):
        """Eight samples a step: `8 / (world_size x micro)` micro-batches on each rank."""
        whole = [batch.sample_ids.tolist() for batch in self.shares(1, micro=8)[0]]
        for micro in (1, 2):
            accumulation = 8 // (world_size * micro)
            shares = self.shares(world_size, micro=micro)
            for step, expected in enumerate(whole):
                part = slice(step * accumulation, (step + 1) * accumulation)
                taken = [share[part] for share in shares]
                in_order = [batch for round_ in zip(*taken, strict=True) for batch in round_]
                assert [index for batch in in_order for index in batch.sample_ids.tolist()] == expected

    def test_no_sample_is_read_twice_or_by_nobody(self):
        ids = [index for share in self.shares(4, micro=3) for batch in share for index in batch.sample_ids.tolist()]
        assert sorted(ids) == list(range(48))

    def test_read_nothing_of_each_others(self):
        """A rank pays for its own samples alone."""
        asked: list[int] = []

        class Counting(Numbers):
            def __getitem__(self, index: int) -> Record:
                asked.append(index)
                return super().__getitem__(index)

        options = {"seed": 0, "micro_batch_size": 2, "start": 0, "stop": 40, "world_size": 4}
        share = list(batches(Counting(), make_config(), rank=2, **options))
        assert len(asked) == 10
        assert asked == [int(key) for batch in share for key in batch.keys]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_of_another_number_go_on_where_the_last_stopped(self, workers):
        """One cursor serves all: two processes up to sample 16, four from there."""
        first = self.shares(2, micro=2, stop=16, num_workers=workers)
        second = self.shares(4, micro=2, start=16, num_workers=workers)
        keys = []
        for shares in (first, second):
            keys += [int(key) for round_ in zip(*shares, strict=True) for batch in round_ for key in batch.keys]
        assert keys == records(read(stop=48))


class TestWorkers:
    def test_do_not_change_the_stream_of_a_cache(self, tmp_path):
        with ShardWriter(tmp_path, DRAFT, 3) as writer:
            for index in range(LENGTH):
                writer.write(Numbers()[index], {})
        dataset = CachedDataset(tmp_path)
        dataset.caption(0)  # opens a file that the workers then inherit
        assert read(dataset, num_workers=2) == read(dataset) == read()

    def test_do_not_change_the_stream_of_a_folder(self, tmp_path):
        write_images(tmp_path / "images", LENGTH)

        def stream(workers: int) -> list[tuple[int, str, int]]:
            config = make_config(path=str(tmp_path / "images"), format="folder", resolution=(8, 8), num_workers=workers)
            rows = []
            for batch in batches(open_dataset(config), config, seed=0, micro_batch_size=4, start=0, stop=20):
                red = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
                rows += zip(batch.sample_ids.tolist(), batch.keys, red, strict=True)
            return rows

        assert stream(2) == stream(0) == [(index, f"{record}.png", record) for index, record in read(stop=20)]

    def test_survive_the_signals_that_stop_a_run(self):
        """Ctrl-C and SIGTERM reach the whole process group; the run still has a step to finish."""
        stream = batches(Numbers(), make_config(num_workers=2), seed=0, micro_batch_size=4, start=0, stop=400)
        ids = next(stream).sample_ids.tolist() + next(stream).sample_ids.tolist()  # one of each: both are up
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        for batch in stream:
            ids += batch.sample_ids.tolist()
        assert ids == list(range(400))

    def test_end_when_the_run_stops_early(self):
        stream = batches(Numbers(), make_config(num_workers=2), seed=0, micro_batch_size=4, start=0, stop=4000)
        next(stream)
        assert len(multiprocessing.active_children()) == 2
        stream.close()
        assert multiprocessing.active_children() == []


class TestErrors:
    @pytest.fixture
    def stream(self, tmp_path):
        """Batches of a folder of images of which one is corrupt; `stream(workers)`."""
        write_images(tmp_path / "images", 6)
        (tmp_path / "images" / "3.png").write_bytes(b"no image")

        def make(workers: int):
            config = make_config(path=str(tmp_path / "images"), format="folder", resolution=(8, 8), num_workers=workers)
            return batches(open_dataset(config), config, seed=0, micro_batch_size=2, start=0, stop=6)

        return make

    @pytest.mark.parametrize("workers", [0, 2])
    def test_of_a_record_arrives_as_one_clean_line(self, stream, workers):
        with pytest.raises(
            UserError, match=r"^data: .*3\.png is not a readable image .*Remove it or replace it$"
        ) as caught:
            list(stream(workers))
        assert "\n" not in str(caught.value)

    def test_of_a_record_ends_the_workers(self, stream):
        """While somebody holds the error, its traceback holds the loader; the interpreter's exit joins the workers."""
        with pytest.raises(UserError) as caught:
            list(stream(2))
        left_over = multiprocessing.active_children()
        del caught
        end_workers()
        assert left_over == []

    def test_what_came_before_it_is_delivered(self, stream):
        place = [dataset_index(at, 6, 0) for at in range(6)].index(3)
        read_before = []
        with pytest.raises(UserError):
            for batch in stream(0):
                read_before += batch.sample_ids.tolist()
        assert read_before == list(range(place // 2 * 2))

    def test_mixed_shapes_are_refused(self):
        class Growing(Numbers):
            def __getitem__(self, index: int) -> Record:
                return Record(key=f"key{index}", caption="", latents=torch.zeros(1, 2, 2 + index // 9))

        with pytest.raises(UserError, match=r"latents of one shape.*key3.*\(1, 2, 2\), \(1, 2, 3\).*one resolution"):
            list(batches(Growing(), make_config(), seed=0, micro_batch_size=10, start=0, stop=10))


class TestCollate:
    def test_stacks_what_is_there(self):
        images = [Record(key=str(n), caption="", image=torch.full((3, 2, 2), float(n))) for n in range(3)]
        batch = collate([7, 8, 9], images)
        assert isinstance(batch, Batch)
        assert batch.sample_ids.dtype == torch.int64
        assert batch.images.shape == (3, 3, 2, 2)
        assert batch.latents is batch.text is batch.pooled is None

    @pytest.mark.parametrize("name", ["latents", "text", "pooled", "image"])
    def test_names_what_differs(self, name):
        rows = [Record(key=f"key{n}", caption="", **{name: torch.zeros(n + 1)}) for n in range(2)]
        with pytest.raises(UserError, match=rf"{name} of one shape.*key0, key1.*\(1,\), \(2,\)"):
            collate([0, 1], rows)


class TestOpenDataset:
    def test_by_format(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        write_images(tmp_path / "images", 1)
        with ShardWriter(tmp_path / "cache", DRAFT) as writer:
            writer.write(Numbers()[0], {})
        folder = open_dataset(DataConfig(path="~/images", format="folder", resolution=(4, 6)))
        assert isinstance(folder, ImageFolder)
        assert folder[0].image.shape == (3, 4, 6)
        assert isinstance(open_dataset(DataConfig(path="~/cache")), CachedDataset)

    def test_verify_is_passed_on(self, tmp_path):
        with ShardWriter(tmp_path, DRAFT) as writer:
            writer.write(Numbers()[0], {})
        shard = tmp_path / "shard-000000.tar"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        assert len(open_dataset(DataConfig(path=str(tmp_path), verify=False))) == 1
        with pytest.raises(UserError, match="corrupt"):
            open_dataset(DataConfig(path=str(tmp_path)))
