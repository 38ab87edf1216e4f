"""The memory of a traced step: which storages are alive, of which part, and what PyTorch's caching allocator would reserve for them."""

import bisect
import functools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor

ROUND = 512
"""Bytes to which PyTorch's caching allocator rounds every request (c10/cuda/CUDACachingAllocator.cpp: kMinBlockSize)."""
_SMALL, _SMALL_SEGMENT, _MIDDLE, _MIDDLE_SEGMENT, _LARGE_ROUND = 2**20, 2 * 2**20, 10 * 2**20, 20 * 2**20, 2 * 2**20
"""kSmallSize, kSmallBuffer, kMinLargeAlloc, kLargeBuffer and kRoundLarge of the same file."""
_Event = tuple[int, int, int]
"""Number of a block, its bytes (0: it is freed), its stream."""


class _Alive(weakref.ref):  # type: ignore[type-arg]
    """A storage that is alive."""

    __slots__ = ("bytes", "key", "number", "part", "stream")
    key: int
    bytes: int
    part: str
    number: int
    stream: int


class Memory:
    """Bytes of all storages on the meta device that were seen, now and at the peak."""

    def __init__(self) -> None:
        self.part = "other"
        """The part of storages that are seen from now on."""
        self.stream = 0
        """The stream that allocates them."""
        self.total = self.peak = 0
        self.events: list[_Event] = []
        self._parts: Counter[str] = Counter()
        self._at_peak: dict[str, int] = {}
        self._is_rising = False
        self._alive: dict[int, _Alive] = {}
        self._number = 0

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        alive = _Alive(storage, self._gone)
        alive.key, alive.part, alive.stream, alive.bytes, alive.number = key, self.part, self.stream, 0, 0
        self._alive[key] = alive
        self._resize(alive, storage.nbytes())

    def resized(self, storage: Any, size: int) -> None:
        """A storage got another size. New memory belongs to the current part and stream."""
        alive = self._alive.get(storage._cdata)
        if alive is not None:
            self._resize(alive, 0)
            alive.part, alive.stream = self.part, self.stream
            self._resize(alive, size)

    def label(self, tensor: Tensor | None, part: str) -> None:
        """Count a tensor's storage to another part."""
        alive = None if tensor is None else self._alive.get(tensor.untyped_storage()._cdata)
        if alive is not None:
            self._parts[alive.part] -= alive.bytes
            self._parts[part] += alive.bytes
            alive.part = part

    def naming(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which allocates for a part."""

        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            before, self.part = self.part, part
            try:
                return call(*args, **kwargs)
            finally:
                self.part = before

        return run

    def is_alive(self, key: int, number: int) -> bool:
        """Whether the storage of `key_of` still exists."""
        alive = self._alive.get(key)
        return alive is not None and alive.number == number

    def key_of(self, tensor: Tensor) -> tuple[int, int]:
        """Identifies a tensor's storage, also after it is gone."""
        key: int = tensor.untyped_storage()._cdata
        alive = self._alive.get(key)
        return key, 0 if alive is None else alive.number

    def start(self) -> None:
        """Forget what was before: only what is alive now was allocated, in this order."""
        alive = sorted((alive for alive in self._alive.values() if alive.bytes), key=lambda alive: alive.number)
        self.events = [(entry.number, entry.bytes, entry.stream) for entry in alive]
        self.peak, self._at_peak, self._is_rising = self.total, dict(self._parts), True

    def peak_by_part(self) -> dict[str, int]:
        """Bytes of each part at the peak, the largest part first."""
        found = self._parts if self._is_rising else self._at_peak
        return {part: size for part, size in sorted(found.items(), key=lambda item: -item[1]) if size}

    def _resize(self, alive: _Alive, size: int) -> None:
        size = -(-size // ROUND) * ROUND
        if size < alive.bytes and self._is_rising:
            self._at_peak, self._is_rising = dict(self._parts), False
        self._parts[alive.part] += size - alive.bytes
        self.total += size - alive.bytes
        if alive.bytes:
            self.events.append((alive.number, 0, alive.stream))
        if size:
            self._number += 1
            alive.number = self._number
            self.events.append((alive.number, size, alive.stream))
        alive.bytes = size
        if self.total > self.peak:
            self.peak, self._is_rising = self.total, True

    def _gone(self, alive: Any) -> None:
        self._resize(alive, 0)
        self._alive.pop(alive.key, None)


def reserved_bytes(events: list[_Event]) -> int:
    """Bytes that PyTorch's caching allocator reserves at most for these requests, without `expandable_segments`.

    A model of CUDACachingAllocator.cpp: a request takes the smallest free block of its stream and size class that is large enough, and
    splits it if enough is left; else a new segment is reserved: 2 MiB for requests up to 1 MiB, 20 MiB for those up to 10 MiB,
    for others their size rounded up to 2 MiB. Free neighbours in a segment are merged. Segments are never returned.
    """
    pools: defaultdict[tuple[int, bool], list[tuple[int, int]]] = defaultdict(list)  # of free blocks: bytes, address
    blocks: dict[int, tuple[int, int, tuple[int, bool]]] = {}  # of each request: address, bytes, pool
    before: dict[int, int] = {}  # address of the block that ends where another begins, within a segment
    size_of: dict[int, int] = {}
    is_free: set[int] = set()
    address = reserved = 0
    for number, size, stream in events:
        if size:
            is_small = size <= _SMALL
            pool = pools[stream, is_small]
            at = bisect.bisect_left(pool, (size, 0))
            if at < len(pool):
                found, start = pool.pop(at)
                is_free.discard(start)
            else:
                found = _segment(size)
                start, address = address, address + found + 1  # segments never touch
                reserved += found
            left = found - size
            size_of[start] = found
            if left >= ROUND if is_small else left > _SMALL:
                end = start + found
                if end in before:
                    before[end] = start + size
                size_of[start], size_of[start + size] = size, left
                before[start + size] = start
                is_free.add(start + size)
                bisect.insort(pool, (left, start + size))
            blocks[number] = (start, size_of[start], (stream, is_small))
            continue
        start, size, key = blocks.pop(number)
        pool = pools[key]
        following = start + size
        if following in is_free and following in before:
            _take(pool, is_free, size_of, following)
            size += size_of.pop(following)
            del before[following]
        previous = before.get(start)
        if previous is not None and previous in is_free:
            _take(pool, is_free, size_of, previous)
            size_of.pop(start, None)
            del before[start]
            size += size_of[previous]
            start = previous
        size_of[start] = size
        if start + size in before:
            before[start + size] = start
        is_free.add(start)
        bisect.insort(pool, (size, start))
    return reserved


def _segment(size: int) -> int:
    """Bytes that are reserved for a request for which there is no free block."""
    if size <= _SMALL:
        return _SMALL_SEGMENT
    return _MIDDLE_SEGMENT if size < _MIDDLE else -(-size // _LARGE_ROUND) * _LARGE_ROUND


def _take(pool: list[tuple[int, int]], is_free: set[int], size_of: dict[int, int], start: int) -> None:
    pool.pop(bisect.bisect_left(pool, (size_of[start], start)))
    is_free.discard(start)
