"""The order of samples, without files and processes. The references are slow and simple."""

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from scfm_core.data import order as order_module
from scfm_core.data.machine import MachineFiles
from scfm_core.data.order import _PART, Epoch, Order, SourceOrder, _random_words, _words_at, choose


@dataclass(frozen=True)
class Case:
    """The arguments of one `Order`."""

    number: int
    sources: tuple[SourceOrder, ...]
    buckets: np.ndarray
    batch_size: int
    partitions: int
    shuffle: bool
    block: int

    def options(self) -> dict[str, Any]:
        return {
            "sources": self.sources,
            "buckets": self.buckets,
            "global_batch_size": self.batch_size,
            "seed": self.number,
            "shuffle": self.shuffle,
            "block": self.block,
            "partitions": self.partitions,
        }

    def order(self, **changes: Any) -> Order:
        return Order(**{**self.options(), **changes})

    def draws(self, epoch: int) -> list[int]:
        """The draws of an epoch: with batches of one sample and one size they are the batches."""
        plain = self.order(buckets=np.zeros_like(self.buckets), global_batch_size=1, partitions=1)
        return [int(row[0]) for row in plain.epoch(epoch).items]


def random_case(number: int) -> Case:
    draw = random.Random(number)
    sources, start = [], 0
    for name in ("first", "second", "third")[: draw.choice([1, 2, 3])]:
        shards = tuple(draw.choice([1, 2, 5, 9, 14]) for _ in range(draw.randint(1, 7)))
        samples = sum(shards)
        # An epoch is less than a pass, exactly one pass, or several passes.
        draws = draw.choice([samples, draw.randint(1, samples), samples * 2 + draw.randint(0, samples)])
        sources.append(SourceOrder(name, start, shards, draws))
        start += samples
    partitions = draw.choice([1, 1, 2, 4])
    kinds = draw.choice([1, 1, 2, 4])
    buckets = np.array([draw.randrange(kinds) for _ in range(start)], np.int16)
    epoch = sum(source.draws for source in sources)
    per_part = draw.choice([1, 2, 3, max(1, epoch // 20), max(1, epoch // partitions + 2)])
    return Case(
        number,
        tuple(sources),
        buckets,
        partitions * per_part,
        partitions,
        shuffle=draw.random() < 0.8,
        block=draw.choice([1, 4, 10, 1000]),
    )


CASES = [random_case(number) for number in range(120)]
EPOCHS = 5


def for_all(cases: list[Case]) -> Callable[[Callable[[Any, Case], None]], Callable[[Any], None]]:
    """One test for all cases: a thousand separate tests would not say more."""

    def decorate(test: Callable[[Any, Case], None]) -> Callable[[Any], None]:
        def run(self: Any) -> None:
            for case in cases:
                try:
                    test(self, case)
                except AssertionError as error:
                    raise AssertionError(f"{case}\n{error}") from error

        run.__doc__ = test.__doc__
        return run

    return decorate


anywhere = for_all(CASES)
unpartitioned = for_all([case for case in CASES if case.partitions == 1])
partitioned = for_all([case for case in CASES if case.partitions > 1])


def test_the_cases_cover_all_settings():
    assert {len(case.sources) for case in CASES} == {1, 2, 3}
    assert {case.partitions for case in CASES} == {1, 2, 4}
    assert {int(case.buckets.max()) + 1 for case in CASES} >= {1, 2, 4}
    sizes = [case.batch_size / case.order().epoch_size for case in CASES]
    assert sum(size > 1 for size in sizes) > 5
    assert sum(size < 0.1 for size in sizes) > 20
    assert sum(len(case.sources) > 1 and case.partitions > 1 and case.buckets.max() > 0 for case in CASES) > 5


def rows(epoch: Epoch) -> list[list[int]]:
    return epoch.items.tolist()


def as_text(epoch: Epoch) -> str:
    return ", ".join(" ".join(map(str, row)) for row in rows(epoch))


def source_of(case: Case, item: int) -> int:
    return next(n for n, source in enumerate(case.sources) if 0 <= item - source.start < source.samples)


def streams(case: Case, epochs: int = EPOCHS) -> list[list[int]]:
    """The draws from each source, over several epochs."""
    drawn: list[list[int]] = [[] for _ in case.sources]
    for epoch in range(epochs):
        for item in case.draws(epoch):
            drawn[source_of(case, item)].append(item)
    return drawn


class TestDraws:
    @anywhere
    def test_of_an_epoch_are_as_many_as_the_sources_give(self, case):
        for epoch in range(EPOCHS):
            count = Counter(source_of(case, item) for item in case.draws(epoch))
            assert [count[number] for number in range(len(case.sources))] == [s.draws for s in case.sources]

    @anywhere
    def test_go_through_a_source_in_passes(self, case):
        for source, stream in zip(case.sources, streams(case), strict=True):
            everything = list(range(source.start, source.start + source.samples))
            whole = len(stream) // source.samples
            passes = [stream[at * source.samples : (at + 1) * source.samples] for at in range(whole)]
            for one in passes:
                assert sorted(one) == everything
            rest = stream[whole * source.samples :]
            assert len(set(rest)) == len(rest)
            if case.shuffle and source.samples > 20 and case.block > 1:
                assert len({tuple(one) for one in passes}) == len(passes)

    @anywhere
    def test_without_shuffling_are_in_the_order_of_the_manifest(self, case):
        plain = replace(case, shuffle=False)
        for source, stream in zip(plain.sources, streams(plain, 2), strict=True):
            assert stream == [source.start + at % source.samples for at in range(len(stream))]

    @anywhere
    def test_stay_in_their_block_of_shards(self, case):
        """A pass is a sequence of whole shards, cut into blocks. Samples are shuffled only within a block."""
        shuffled = replace(case, shuffle=True)
        for source, stream in zip(shuffled.sources, streams(shuffled), strict=True):
            shard_of = np.repeat(np.arange(len(source.shards)), source.shards)
            first = np.cumsum(source.shards) - source.shards
            for begin in range(0, len(stream) - source.samples + 1, source.samples):
                taken = [0] * len(source.shards)
                unfinished: set[int] = set()
                for at in range(begin, begin + source.samples, case.block):
                    block = sorted(stream[at : min(at + case.block, begin + source.samples)])
                    shards = [int(shard_of[item - source.start]) for item in block]
                    for shard in set(shards):
                        mine = [
                            item - source.start for item, owner in zip(block, shards, strict=True) if owner == shard
                        ]
                        # A shard is used from its start, and may continue in the next block.
                        start = int(first[shard]) + taken[shard]
                        assert mine == list(range(start, start + len(mine)))
                        taken[shard] += len(mine)
                    assert unfinished <= set(shards)
                    unfinished = {s for s in set(shards) if taken[s] < source.shards[s]}
                    assert len(unfinished) <= 1

    def test_are_shuffled_within_a_block(self):
        """With blocks of one sample only the shards are shuffled; with large blocks every sample is."""
        source = SourceOrder("only", 0, (50,) * 8, 400)
        runs = []
        for block in (1, 100, 1000):
            items = Order([source], np.zeros(400, np.int16), 400, 0, block=block).epoch(0).items[0]
            runs.append(int((np.diff(items) == 1).sum()))
        assert runs[0] >= 8 * 49
        assert max(runs[1:]) < 20

    def test_are_shuffled_without_a_bias(self):
        """Every sample occurs at every place: over 400 passes its mean place is the middle."""
        source = SourceOrder("only", 0, (3, 7, 10), 20)
        order = Order([source], np.zeros(20, np.int16), 20, 0)
        places = np.stack([np.argsort(order.epoch(epoch).items[0]) for epoch in range(400)])
        error = 20 / 12**0.5 / 400**0.5
        assert np.abs(places.mean(0) - 9.5).max() < 4.5 * error

    @pytest.mark.parametrize("draws", [(900, 90, 10), (500, 500), (997, 3), (1, 1, 1)])
    def test_of_a_mixture_are_spread_evenly(self, draws):
        """Any part of the epoch has each source's share, up to one draw per source."""
        names = ("a", "b", "c")[: len(draws)]
        sources = [
            SourceOrder(name, 1000 * number, (1000,), count)
            for number, (name, count) in enumerate(zip(names, draws, strict=True))
        ]
        order = Order(sources, np.zeros(1000 * len(draws), np.int16), 1, 3)
        for epoch in range(3):
            owners = order.epoch(epoch).items[:, 0] // 1000
            for tenth in range(11):
                end = round(len(owners) * tenth / 10)
                counts = np.bincount(owners[:end], minlength=len(draws))
                assert np.abs(counts - np.array(draws) * end / len(owners)).max() <= len(draws)

    def test_of_a_mixture_do_not_alternate_regularly(self):
        sources = [SourceOrder(name, 1000 * number, (1000,), 500) for number, name in enumerate("ab")]
        order = Order(sources, np.zeros(2000, np.int16), 1, 0)
        first, second = (order.epoch(epoch).items[:, 0] // 1000 for epoch in range(2))
        assert not np.array_equal(first, second)
        assert 50 < np.count_nonzero(np.diff(first) == 0) < 450


class TestBatches:
    @unpartitioned
    def test_equal_those_of_one_queue_for_each_size(self, case):
        """The definition: each draw goes into the queue of its size; a full queue is a batch."""
        order = case.order()
        queues: dict[int, list[int]] = {}
        for number in range(EPOCHS):
            expected, kinds = [], []
            for item in case.draws(number):
                kind = int(case.buckets[item])
                queue = queues.setdefault(kind, [])
                queue.append(item)
                if len(queue) == case.batch_size:
                    expected.append(queues.pop(kind))
                    kinds.append(kind)
            epoch = order.epoch(number)
            assert rows(epoch) == expected
            assert epoch.buckets.tolist() == kinds

    @anywhere
    def test_drop_and_repeat_no_sample(self, case):
        """For each size and epoch: samples that waited + draws = samples in batches + samples that wait now."""
        order = case.order()
        left: list[list[int]] = [[] for _ in range(int(case.buckets.max()) + 1)]
        for number in range(EPOCHS):
            draws = case.draws(number)
            epoch = order.epoch(number)
            for kind, queue in enumerate(left):
                queue += [item for item in draws if case.buckets[item] == kind]
                filled = len(queue) // case.batch_size * case.batch_size
                batches = [item for row in epoch.items[epoch.buckets == kind].tolist() for item in row]
                assert Counter(batches) == Counter(queue[:filled])
                del queue[:filled]
                assert len(queue) < case.batch_size

    @anywhere
    def test_are_of_one_size(self, case):
        order = case.order()
        for number in range(EPOCHS):
            epoch = order.epoch(number)
            assert epoch.items.shape == (len(epoch.buckets), case.batch_size)
            assert (case.buckets[epoch.items] == epoch.buckets[:, None]).all()

    @anywhere
    def test_counts_before_an_epoch(self, case):
        order, before = case.order(), 0
        counts: Counter[int] = Counter()
        for number in range(EPOCHS):
            epoch = order.epoch(number)
            assert epoch.first == before == sum(count // case.batch_size for count in counts.values())
            before += len(epoch.items)
            counts.update(int(case.buckets[item]) for item in case.draws(number))

    @anywhere
    def test_locate_finds_each_batch(self, case):
        order = case.order()
        places = [(number, at) for number in range(EPOCHS) for at in range(len(order.epoch(number).items))]
        fresh = case.order()
        assert [fresh.locate(batch) for batch in range(len(places))] == places
        assert [order.epoch(number).first + at for number, at in places] == list(range(len(places)))

    def test_locate_is_fast_for_late_batches(self):
        order = Order([SourceOrder("only", 0, (7, 6), 13)], np.array([0, 1] * 6 + [0], np.int16), 4, 0)
        far = 10**9
        number, place = order.locate(far)
        assert order.epoch(number).first + place == far
        assert 0 <= place < len(order.epoch(number).items)

    @anywhere
    def test_do_not_depend_on_earlier_calls(self, case):
        order = case.order()
        walked = [rows(order.epoch(number)) for number in range(EPOCHS)]
        assert [rows(case.order().epoch(number)) for number in range(EPOCHS)] == walked
        backwards = case.order()
        assert [rows(backwards.epoch(number)) for number in reversed(range(EPOCHS))] == walked[::-1]


class TestPartitions:
    @partitioned
    def test_each_reads_a_part_of_its_own(self, case):
        """For each size, the queue of an epoch is cut into parts; a batch takes equal shares of all parts."""
        order = case.order()
        left: list[list[int]] = [[] for _ in range(int(case.buckets.max()) + 1)]
        share = case.batch_size // case.partitions
        for number in range(EPOCHS):
            draws, epoch = case.draws(number), order.epoch(number)
            for kind, queue in enumerate(left):
                queue += [item for item in draws if case.buckets[item] == kind]
                batches = epoch.items[epoch.buckets == kind]
                stretch = len(batches) * share
                for part in range(case.partitions):
                    mine = batches[:, part * share : (part + 1) * share].ravel().tolist()
                    assert mine == queue[part * stretch : (part + 1) * stretch]
                del queue[: len(batches) * case.batch_size]

    def test_share_few_shards(self):
        """With blocks of two shards, a quarter of the batch uses a quarter of 40 shards and those at its ends."""
        order = Order(
            [SourceOrder("only", 0, (25,) * 40, 1000)], np.zeros(1000, np.int16), 40, 0, block=50, partitions=4
        )
        parts = [set((order.epoch(0).items[:, at : at + 10] // 25).ravel().tolist()) for at in range(0, 40, 10)]
        assert [len(part) for part in parts] == [10, 10, 10, 10]
        assert len(set.union(*parts)) == 40

    @partitioned
    def test_do_not_change_how_often_a_sample_occurs(self, case):
        one = case.order(partitions=1)
        for number in range(EPOCHS):
            several = case.order()
            assert several.epoch(number).first == one.epoch(number).first
            assert np.array_equal(np.sort(several.epoch(number).items, None), np.sort(one.epoch(number).items, None))

    def test_sizes_alternate_as_without_partitions(self):
        """Batches of two sizes alternate through the epoch: not first all of one size and then all of the other."""
        buckets = np.arange(4000, dtype=np.int16) % 2
        for partitions in (1, 2, 4):
            order = Order([SourceOrder("only", 0, (100,) * 40, 4000)], buckets, 8, 0, partitions=partitions)
            kinds = order.epoch(0).buckets
            assert abs(int(kinds[: len(kinds) // 2].sum()) - len(kinds) // 4) < 20


def equal(one: Epoch, other: Epoch) -> bool:
    same = np.array_equal(one.items, other.items) and np.array_equal(one.buckets, other.buckets)
    return same and one.first == other.first


class TestParts:
    """The order is made in parts of some samples each, so that it needs little memory."""

    @pytest.mark.parametrize(("part", "cases"), [(1, CASES[:12]), (7, CASES[12:50])], ids=["1", "7"])
    def test_do_not_change_it(self, part, cases, monkeypatch):
        """Parts that are cut within shards, passes, epochs and the draws of several sources."""
        whole = [[case.order().epoch(number) for number in (0, 3)] for case in cases]
        monkeypatch.setattr(order_module, "_PART", part)
        for case, epochs in zip(cases, whole, strict=True):
            order = case.order()
            assert all(equal(order.epoch(n), epoch) for n, epoch in zip((0, 3), epochs, strict=True)), case

    def test_random_words_of_ranges(self):
        """The words of some ranges, in any order, without drawing the words between them."""
        words = _random_words(1000, 5, "x")
        starts = np.array([0, 996, 10, 11, 13, 500, 503, 3, 7])
        counts = np.array([1, 4, 1, 0, 50, 3, 400, 4, 1])
        parts = [words[start:][:count] for start, count in zip(starts, counts, strict=True)]
        assert np.array_equal(_words_at(starts, counts, 5, "x"), np.concatenate(parts))

    def test_of_a_short_epoch_are_few(self, monkeypatch):
        """Epochs of 100 of 100,000 samples: each is made of the parts that it needs, and counted from the one before."""
        monkeypatch.setattr(order_module, "_PART", 200)
        parts: list[int] = []
        make_part = Order._make_part
        monkeypatch.setattr(Order, "_make_part", lambda self, *key: parts.append(key[2]) or make_part(self, *key))
        buckets = (np.arange(100_000) % 3).astype(np.int16)
        order = Order([SourceOrder("only", 0, (100,) * 1000, 100)], buckets, 10, 0, block=200)
        order.epoch(400)
        assert set(parts) <= set(range(202))
        parts.clear()
        for number in range(401, 411):
            order.epoch(number)
        assert len(parts) <= 10

    @pytest.mark.parametrize("sources", [1, 2])
    def test_need_little_memory(self, sources):
        """4 bytes a sample and epoch, and some megabytes more while it is made. (It was 26, and 53 at the peak.)"""
        samples = 600_000
        own = samples // sources
        parts = [SourceOrder(f"s{n}", n * own, (1000,) * (own // 1000), own - n) for n in range(sources)]
        buckets = (np.arange(samples) % 7).astype(np.int16)
        tracemalloc.start()
        try:
            order = Order(parts, buckets, 100, 0, block=20_000)
            epoch = order.epoch(0)
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert epoch.items.dtype == np.int32
        assert held < 4.5 * samples + 8 * sources * _PART  # with the last parts
        assert peak < 13 * samples + 64 * _PART


class TestFiles:
    """The batches of a large epoch are in a file, which all processes of the machine map."""

    @pytest.fixture(autouse=True)
    def _large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(order_module, "LARGE", 1)

    def test_hold_the_same_batches(self, tmp_path):
        for case in CASES[:20]:
            order, shared = case.order(), case.order(files=MachineFiles(tmp_path, 60.0))
            assert all(equal(order.epoch(number), shared.epoch(number)) for number in (0, 1, 3))
            assert shared.locate(17) == order.locate(17)

    def test_are_made_once(self, tmp_path, monkeypatch):
        files = MachineFiles(tmp_path, 60.0)
        case = next(case for case in CASES if len(case.order().epoch(0).items) > 3)
        expected = [case.order(files=files).epoch(number) for number in range(2)]
        monkeypatch.setattr(Order, "_make_epoch", None)
        order = case.order(files=files)
        assert all(equal(order.epoch(number), epoch) for number, epoch in enumerate(expected))
        assert order.epoch(0).file is not None
        place = len(expected[0].items) // 2
        assert order.spares(order.epoch(0), place, 0) == case.order(files=files).spares(expected[0], place, 0)

    def test_depend_on_every_setting(self, tmp_path):
        """Each change of one setting makes another file."""
        files = MachineFiles(tmp_path, 60.0)
        sources, buckets = [SourceOrder("a", 0, (9, 7), 16), SourceOrder("b", 16, (8,), 8)], np.zeros(24, np.int16)
        base = {"sources": sources, "buckets": buckets, "global_batch_size": 4, "seed": 0, "block": 5}
        other_buckets = np.array([0, 1] * 12, np.int16)
        changes: list[dict[str, Any]] = [
            {},
            {"sources": [replace(sources[0], name="c"), sources[1]]},
            {"sources": [replace(sources[0], shards=(7, 9)), sources[1]]},
            {"sources": [replace(sources[0], draws=15), sources[1]]},
            {"buckets": other_buckets},
            {"global_batch_size": 2},
            {"seed": 1},
            {"block": 6},
            {"partitions": 2},
            {"shuffle": False},
        ]
        orders = [Order(**{**base, **change}, files=files) for change in changes]
        assert len({order._key for order in orders}) == len(changes)
        for order, change in zip(orders, changes, strict=True):
            assert equal(order.epoch(0), Order(**{**base, **change}).epoch(0))

    def test_of_small_epochs_do_not_exist(self, tmp_path, monkeypatch):
        monkeypatch.setattr(order_module, "LARGE", 10**6)
        assert CASES[0].order(files=MachineFiles(tmp_path, 60.0)).epoch(0).file is None
        assert list(tmp_path.iterdir()) == []

    def test_do_not_accumulate(self, tmp_path):
        order = CASES[0].order(files=MachineFiles(tmp_path, 60.0))
        for number in range(8):
            order.epoch(number)
        assert len(list((tmp_path / "order").iterdir())) <= 5


class TestSpares:
    @anywhere
    def test_have_the_samples_size_and_are_never_the_sample(self, case):
        order, again = case.order(), case.order()
        for number in range(2):
            epoch = order.epoch(number)
            for place in range(0, len(epoch.items), 3):
                for row in range(0, case.batch_size, 2):
                    item = int(epoch.items[place, row])
                    spares = order.spares(epoch, place, row)
                    assert item not in spares
                    assert len(set(spares)) == len(spares)
                    assert all(case.buckets[spare] == case.buckets[item] for spare in spares)
                    assert spares == again.spares(again.epoch(number), place, row)

    def test_are_at_growing_distances(self):
        """In a corrupt shard all neighbours are bad: substitutes come from more and more distant batches, then from the same one."""
        order = Order([SourceOrder("only", 0, (100,) * 10, 1000)], np.zeros(1000, np.int16), 10, 0, shuffle=False)
        epoch = order.epoch(0)
        assert order.spares(epoch, 50, 3) == (493, 483, 463, 423, 343, 183, 863, 504, 505, 506)
        assert len({spare // 100 for spare in order.spares(epoch, 50, 3)}) >= 5

    def test_stay_in_the_samples_partition(self):
        """Substitutes of other batches: the machine of the sample has their shards."""
        order = Order([SourceOrder("only", 0, (100,) * 10, 1000)], np.zeros(1000, np.int16), 8, 0, partitions=4)
        epoch = order.epoch(0)
        own = set(epoch.items[:, 2:4].ravel().tolist())
        assert set(order.spares(epoch, 60, 2)[:-3]) <= own

    def test_of_a_single_sample_do_not_exist(self):
        order = Order([SourceOrder("only", 0, (1,), 1)], np.zeros(1, np.int16), 4, 0)
        assert order.spares(order.epoch(3), 0, 0) == ()


class TestRandomness:
    SOURCES = (SourceOrder("a", 0, (9, 4, 7), 20), SourceOrder("b", 20, (5, 5), 15))

    def items(self, sources: tuple[SourceOrder, ...] = SOURCES, seed: int = 0, epoch: int = 0) -> list[list[int]]:
        return rows(Order(sources, np.zeros(30, np.int16), 7, seed).epoch(epoch))

    def test_is_pinned(self):
        """If these numbers change, no existing run can resume."""
        buckets = np.array([0, 0, 1] * 10, np.int16)
        order = Order(self.SOURCES, buckets, 4, seed=0, block=10)
        assert [as_text(order.epoch(number)) for number in (0, 1, 7)] == [
            "3 0 25 13, 23 26 5 29, 4 21 7 24, 6 1 22 16, 28 19 9 27, 8 2 20 14, 22 18 21 25, 10 15 24 27",
            "11 17 29 11, 12 9 28 0, 23 2 20 26, 10 1 3 21, 12 4 7 19, 5 23 29 20, 15 13 22 27, 28 16 18 25, 26 17 8 14",
            "20 2 8 29, 0 22 3 4, 23 2 5 26, 7 24 25 6, 0 25 1 28, 8 23 14 17, 9 22 21 16, 10 27 19 24, 11 20 29 26, "
            "12 13 15 18",
        ]
        assert [order.epoch(number).first for number in (0, 1, 7)] == [0, 8, 60]
        parts = Order(self.SOURCES, buckets, 4, seed=5, partitions=2)
        assert as_text(parts.epoch(1)) == (
            "29 2 20 14, 0 24 24 19, 8 20 26 2, 5 8 23 11, 12 4 7 15, 26 23 17 29, 6 21 27 10, 13 16 25 3, 28 9 21 18"
        )

    def test_two_seeds_give_different_orders(self):
        orders = [self.items(seed=seed, epoch=epoch) for seed in range(4) for epoch in range(4)]
        assert all(one != other for at, one in enumerate(orders) for other in orders[:at])

    @pytest.mark.parametrize(("shards", "block"), [((1,) * 40, 1), ((40,), 40)], ids=["of shards", "of samples"])
    def test_depends_on_seed_name_and_pass(self, shards, block):
        """Each shuffle separately: 40 shards of one sample, or one shard of 40 samples."""

        def one_pass(seed: int, name: str, number: int) -> tuple[int, ...]:
            order = Order([SourceOrder(name, 0, shards, 40)], np.zeros(40, np.int16), 40, seed, block=block)
            return tuple(order.epoch(number).items[0].tolist())

        keys = [(seed, name, number) for seed in range(3) for name in ("a", "b") for number in range(4)]
        passes = {one_pass(*key) for key in keys}
        assert len(passes) == len(keys)
        assert tuple(range(40)) not in passes
        assert one_pass(1, "a", 2) == one_pass(1, "a", 2)

    def test_depends_on_the_sources_name(self):
        renamed = (replace(self.SOURCES[0], name="c"), self.SOURCES[1])
        assert self.items(renamed) != self.items()
        # The stream of the other source does not change.
        for sources in (self.SOURCES, renamed):
            stream = [item for row in self.items(sources) for item in row if item >= 20]
            assert stream == [item for row in self.items() for item in row if item >= 20]

    def test_two_sources_get_different_orders(self):
        """Equal shards under two names: their orders differ."""
        twins = (SourceOrder("a", 0, (15,), 15), SourceOrder("b", 15, (15,), 15))
        order = Order(twins, np.zeros(30, np.int16), 30, 0)
        items = order.epoch(0).items[0]
        assert [i for i in items if i < 15] != [i - 15 for i in items if i >= 15]

    def test_does_not_depend_on_the_global_state(self):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        first = self.items()
        random.seed(2), np.random.seed(2), torch.manual_seed(2)  # noqa: NPY002
        state = np.random.get_state()[1].tolist()  # noqa: NPY002
        assert self.items() == first
        assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


class TestChoose:
    def test_follows_the_weights(self):
        weights = [1.0, 0.0, 3.0, 0.5]
        count = Counter(choose(weights, 7, "captions", number) for number in range(9000))
        assert set(count) == {0, 2, 3}
        for place in (0, 2, 3):
            share = weights[place] / 4.5
            assert abs(count[place] - 9000 * share) < 4 * (9000 * share * (1 - share)) ** 0.5

    def test_is_a_function_of_the_whole_key(self):
        def row(*key: object) -> list[int]:
            return [choose([1, 1, 1], *key, number) for number in range(64)]

        assert row(0, "a") == row(0, "a")
        assert len({tuple(row(*key)) for key in [(0, "a"), (1, "a"), (0, "b"), ("a", 0)]}) == 4

    def test_one_weight_is_always_chosen(self):
        assert choose([2.5], 0) == 0

    def test_is_pinned(self):
        assert [choose([1, 2, 3, 4], 11, number) for number in range(12)] == [0, 2, 1, 2, 3, 3, 3, 1, 0, 1, 1, 3]
