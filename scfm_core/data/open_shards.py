"""The open shards of one process, and which shards have been verified by any process."""

import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scfm_core.data.folder import ImageFolder
from scfm_core.data.schema import BadData
from scfm_core.data.source import Shard, Source

_VERIFIED = -1
"""State of a shard. Other states: 0 (not verified), or the id of the process that is downloading or hashing it."""

_MAX_OPEN = 64
"""Open shards of a process. Each holds a file descriptor and some megabytes of offsets."""


class OpenShards:
    """Opens shards by number; the least recently used ones are closed.

    The table of verified shards is in shared memory. Processes forked from this one share it, so that each shard is
    hashed by one of them only.

    Args:
        shards: the source of each shard, and the shard's number in that source. A folder of images cannot be opened.
        timeout: seconds to wait for another process that is downloading or hashing a shard.
    """

    def __init__(self, shards: Sequence[tuple[Source | ImageFolder, int]], timeout: float) -> None:
        self._shards, self._timeout = shards, timeout
        self._states = np.frombuffer(mmap.mmap(-1, 4 * max(1, len(shards))), np.int32)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._corrupt: dict[int, str] = {}

    def get(self, number: int, *, verify: bool) -> Shard:
        """An open shard.

        Args:
            number: of the shard.
            verify: hash it, if no process has done so yet.

        Raises:
            BadData: if it is corrupt or missing; the same again at each call, without reading it again.
            UserError: if it is unavailable.
        """
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if number in self._corrupt:
            raise BadData(self._corrupt[number])
        try:
            shard = self._open_and_verify(number, verify)
        except BadData as error:
            self._corrupt[number] = str(error)
            raise
        self._open[number] = shard
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        return shard

    def prefetch(self, number: int, *, verify: bool) -> None:
        """Download and hash a shard before it is needed; safe in threads. Arguments and errors as `get`."""
        self._open_and_verify(number, verify).close()

    def _open_and_verify(self, number: int, verify: bool) -> Shard:
        source, place = self._shards[number]
        assert isinstance(source, Source)
        claimed = self._claim(number)
        try:
            shard = source.open(place, check=claimed and verify)
        except BaseException:
            if claimed:
                self._states[number] = 0
            raise
        self._states[number] = _VERIFIED
        return shard

    def _claim(self, number: int) -> bool:
        """Claim the verification of a shard, after waiting for other processes. False: it is verified already."""
        own, end = os.getpid(), time.monotonic() + self._timeout
        while (state := int(self._states[number])) not in (0, own, _VERIFIED) and time.monotonic() < end:
            if not _is_alive(state):
                break
            time.sleep(0.002)
        if state == _VERIFIED:
            return False
        self._states[number] = own
        return True


def _is_alive(process: int) -> bool:
    try:
        # The third field of `stat`. A killed child is a zombie (Z) until its parent waits for it.
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(") ")[2][:1] != "Z"
    except OSError:
        return False
