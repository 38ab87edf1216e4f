"""Ports for servers that a test starts."""

import itertools
import os
import random
import re
import socket

# Below those that Linux gives to outgoing connections (32768 on) and that the job scripts compute (20000 on): a port that the
# kernel chooses may be given to a connection of another test before the server has it.
_FIRST, _EACH, _WORKERS = 10_000, 500, 20


def _own_range() -> range:
    """Of this pytest worker: two that look for a port at the same moment must not find the same."""
    worker = re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or "0"
    first = _FIRST + int(worker) % _WORKERS * _EACH
    return range(first, first + _EACH)


_candidates = itertools.cycle(random.sample(_own_range(), _EACH))


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens, and that none of the last calls returned."""
    found: list[int] = []
    for port in itertools.islice(_candidates, _EACH):
        if len(found) == count:
            return found
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    raise RuntimeError(f"fewer than {count} ports of {_own_range()} are free")
