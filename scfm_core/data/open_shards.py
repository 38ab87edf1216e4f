"""The store of open shards of one process, and which shards have been verified by any process."""

import contextlib
import errno
import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from scfm_core.data.folder import ImageFolder
from scfm_core.data.reading import retried
from scfm_core.data.schema import BadData
from scfm_core.data.source import Shard, Source
from scfm_core.data.tar_table import TarTable
from scfm_core.data.webdataset import TarShard
from scfm_core.files import permit_open_files

T = TypeVar("T")

_VERIFIED = -1
"""State of a shard. Other states: 0 (not verified), or the id of the process that is downloading or hashing it."""
_DESCRIPTORS = 1 << 16
"""Files that a process asks for."""
_LEAST_COPIES = 64
"""Open shards of a process whatever the size of the cache: closing them would download them again and again."""
_TABLE_BYTES = 32 << 20
"""Memory of a process for the tables of tars, those of a million samples or more. A table is used for the length of a shuffle block."""


class OpenShards:
    """Opens shards by number. Only the limit of open files bounds their number; the least recently used ones are closed.

    A tar is parsed when it is first opened. Its table remains in memory, so that opening the tar again costs no more than
    `open`. The table of verified shards is in shared memory: processes forked from this one share it, so that each shard
    is hashed by one of them only.

    Args:
        shards: the source of each shard, and the shard's number in that source. A folder of images cannot be opened.
        timeout: seconds to wait for another process that is downloading or hashing a shard, and for errors that may pass.
        cache_limit: bytes of open copies in the cache, if they are more than 64. An open copy that was evicted keeps its
            space on the disk. None: no limit.
    """

    def __init__(
        self, shards: Sequence[tuple[Source | ImageFolder, int]], timeout: float, cache_limit: int | None = None
    ) -> None:
        self._shards, self.timeout, self._cache_limit = shards, timeout, cache_limit
        self._states = np.frombuffer(mmap.mmap(-1, 4 * max(1, len(shards))), np.int32)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._tables: OrderedDict[int, TarTable] = OrderedDict()
        self._table_bytes = self._copied_bytes = 0
        self._corrupt: dict[int, str] = {}
        self._most = most_open()

    def shard(self, number: int, *, verify: bool) -> "StoredShard":
        """A shard that is opened when it is read, and opened again after an error that may pass; arguments as `get`."""
        return StoredShard(self, number, verify)

    def address(self, number: int) -> str:
        """Path or URI of a shard."""
        source, place = self._shards[number]
        assert isinstance(source, Source)
        return source.address(place)

    def get(self, number: int, *, verify: bool) -> Shard:
        """An open shard.

        Args:
            number: of the shard.
            verify: hash it, if no process has done so yet.

        Raises:
            BadData: if it is corrupt or missing; the same again at each call, without reading it again.
            UserError: if it is unavailable.
            OSError: if it cannot be read now.
        """
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if number in self._corrupt:
            raise BadData(self._corrupt[number])
        try:
            shard = self._with_descriptors(lambda: self._open_and_verify(number, verify))
        except BadData as error:
            self._corrupt[number] = str(error)
            raise
        self._open[number] = shard
        self._copied_bytes += self._bytes_of_copy(number)
        while len(self._open) > self._most or self._exceeds_cache():
            self.close(next(iter(self._open)))
        return shard

    def prefetch(self, number: int, *, verify: bool) -> None:
        """Download and hash a shard before it is needed; safe in threads. Arguments and errors as `shard`."""
        retried(
            lambda: self._open_and_verify(number, verify, keeps_table=False).close(),
            lambda: f"shard {self.address(number)}",
            self.timeout,
        )

    def close(self, number: int) -> None:
        """Close a shard, if it is open."""
        shard = self._open.pop(number, None)
        if shard is not None:
            self._copied_bytes -= self._bytes_of_copy(number)
            with contextlib.suppress(OSError):  # NFS may report an error of the past here
                shard.close()

    def _with_descriptors(self, opening: Callable[[], Shard]) -> Shard:
        """`opening()`; if the process or the machine has no descriptors left, half of the open shards are closed first."""
        while True:
            try:
                return opening()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                    raise
                kept = len(self._open) // 2
                self._most = max(1, kept)
                for number in list(self._open)[: len(self._open) - kept]:
                    self.close(number)

    def _exceeds_cache(self) -> bool:
        limit = self._cache_limit
        return limit is not None and self._copied_bytes > limit and len(self._open) > _LEAST_COPIES

    def _bytes_of_copy(self, number: int) -> int:
        source, place = self._shards[number]
        assert isinstance(source, Source)
        return source.bytes_of_copy(place)

    def _open_and_verify(self, number: int, verify: bool, *, keeps_table: bool = True) -> Shard:
        source, place = self._shards[number]
        assert isinstance(source, Source)
        claimed = self._claim(number)
        try:
            shard = source.open(place, check=claimed and verify, table=self._tables.get(number))
        except BaseException:
            if claimed:
                self._states[number] = 0
            raise
        self._states[number] = _VERIFIED
        if keeps_table and isinstance(shard, TarShard):
            self._keep_table(number, shard.table)
        return shard

    def _keep_table(self, number: int, table: TarTable) -> None:
        if number not in self._tables:
            self._table_bytes += table.nbytes
            self._tables[number] = table
        self._tables.move_to_end(number)
        while self._table_bytes > _TABLE_BYTES and len(self._tables) > 1:
            self._table_bytes -= self._tables.popitem(last=False)[1].nbytes

    def _claim(self, number: int) -> bool:
        """Claim the verification of a shard, after waiting for other processes. False: it is verified already."""
        own, end = os.getpid(), time.monotonic() + self.timeout
        while (state := int(self._states[number])) not in (0, own, _VERIFIED) and time.monotonic() < end:
            if not _is_alive(state):
                break
            time.sleep(0.002)
        if state == _VERIFIED:
            return False
        self._states[number] = own
        return True


class StoredShard:
    """A shard of a store, by number: it has the methods of `source.Shard`, and is open only while the store keeps it so.

    Errors that may pass are retried with the file opened again. If they do not pass within the store's timeout, they are a
    UserError.
    """

    def __init__(self, store: OpenShards, number: int, verify: bool) -> None:
        self._store, self._number, self._verify = store, number, verify

    @property
    def name(self) -> str:
        """Its path or address, for messages."""
        return self._store.address(self._number)

    def _use(self, call: Callable[[Shard], T]) -> T:
        store, number = self._store, self._number
        return retried(
            lambda: call(store.get(number, verify=self._verify)),
            lambda: f"shard {self.name}",
            store.timeout,
            lambda: store.close(number),
        )

    def __len__(self) -> int:
        return self._use(len)

    def key(self, index: int) -> str:
        """As `source.Shard.key`."""
        return self._use(lambda shard: shard.key(index))

    def fields(self, index: int) -> list[str]:
        """As `source.Shard.fields`."""
        return self._use(lambda shard: shard.fields(index))

    def read(self, index: int, field: str) -> bytes | None:
        """As `source.Shard.read`."""
        return self._use(lambda shard: shard.read(index, field))

    def close(self) -> None:
        """Close its file; the next read opens it again."""
        self._store.close(self._number)


def most_open() -> int:
    """Number of shards that a process may keep open: half of its limit of open files, which is raised first.

    The other half is for sockets, shared memory and other data sets.
    """
    return max(1, permit_open_files(_DESCRIPTORS) // 2)


def _is_alive(process: int) -> bool:
    try:
        # The third field of `stat`. A killed child is a zombie (Z) until its parent waits for it.
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(") ")[2][:1] != "Z"
    except OSError:
        return False
