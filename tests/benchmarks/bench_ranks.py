"""What grows with the number of ranks: process groups and descriptors of a rank, the watchdog's requests to the store.

    python tests/benchmarks/bench_ranks.py [--repeats 10] [--json PATH]

No rank but the first exists. PyTorch's fake process group makes the groups of a run of that size. Descriptors of a gloo mesh
are counted on real meshes of up to 16 ranks in this process, and extrapolated: they grow by the same number for each rank. The
store is real, on this machine; in a job the launcher of the first node has it. `milliseconds` is the time to read the
heartbeats of all ranks, which the first rank that finds the run hanging does twice. Asynchronous checkpoints need a second mesh.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import measure, parser, report
from torch.testing._internal.distributed.fake_pg import FakeStore

from scfm_core.distributed import watchdog
from scfm_core.distributed.engine import EngineConfig
from scfm_core.distributed.fsdp2 import Fsdp2Layout
from scfm_core.distributed.watchdog import Watchdog
from scfm_core.distributed.world import World, quiet_gloo

RANKS = (8, 64, 512)
SHARD = 8
MESHES = (4, 16)
"""Ranks of the real meshes."""
PULSES = 200
REQUESTS = 2
"""Of a pulse: a heartbeat, and whether there was progress."""


def group_sizes(ranks: int) -> list[int]:
    """Sizes of the process groups of rank 0: of a run with HSDP, `engine.shard=8`."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        layout = Fsdp2Layout(
            EngineConfig(shard=SHARD), World(0, ranks, dist.group.WORLD), torch.device("cpu"), torch.bfloat16
        )
        assert layout.is_sharded
        return [group.size() for group in dist.distributed_c10d._world.pg_map]
    finally:
        dist.destroy_process_group()


def mesh_descriptors(ranks: int) -> int:
    """Descriptors that `ranks` ranks of a gloo mesh have open together."""
    store, meshes, before = dist.HashStore(), [], _open_descriptors()

    def join(rank: int) -> None:
        meshes.append(dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=60)))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(ranks)]
    with quiet_gloo():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(meshes) == ranks
    return _open_descriptors() - before


def _open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def descriptors(sizes: list[int], own: dict[int, float]) -> float:
    """Descriptors of a rank for gloo groups of these sizes: some for each group and some for each other rank in it.

    Args:
        sizes: of the groups.
        own: descriptors of a rank in a mesh, for each of `MESHES`.
    """
    few, many = MESHES
    each = (own[many] - own[few]) / (many - few)
    fixed = own[few] - each * (few - 1)
    return sum(fixed + each * (size - 1) for size in sizes)


def server_seconds(dog: Watchdog) -> float:
    """CPU seconds of the store's process for a rank's pulse: its threads are those of this process that are not this one."""
    began = time.process_time() - time.thread_time()
    for number in range(PULSES):
        dog._pulse()
        dog._store.add("scfm/progress", number % 2)
    return (time.process_time() - time.thread_time() - began) / PULSES


def key_by_key(store: Any, ranks: int) -> Callable[[], object]:
    """The reference: what version 0.1.0 did, two requests for each rank and each of its three keys."""
    keys = [f"scfm/at/{rank}" for rank in range(ranks)] * 3
    return lambda: [store.get(key) for key in keys if store.check([key])]


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, "ranks", 10).parse_args(argv)
    rows, meshes = [], {ranks: mesh_descriptors(ranks) / ranks for ranks in MESHES}
    for ranks in RANKS:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(ranks):
            store.set(f"scfm/at/{rank}", f"12 step {rank} (in all_reduce, distributed_c10d.py:2500)")
        dog = Watchdog(store, 0, ranks, 600.0)
        seconds = measure({"reference": key_by_key(store, ranks), "ours": dog._heartbeats}, arguments.repeats)
        sizes = group_sizes(ranks)
        own = {
            "groups": len(sizes),
            "descriptors": descriptors(sizes, meshes),
            "asynchronous": descriptors([*sizes, ranks], meshes),
            "requests_per_s": ranks * REQUESTS / watchdog.PULSE,
            "share_of_a_core": ranks * server_seconds(dog) / watchdog.PULSE,
        }
        for arm, more in (("reference", {}), ("ours", own)):
            rows.append(
                {"arm": arm, "place": f"{ranks} ranks", "milliseconds": 1e3 * seconds[arm]}
                | {"x_reference": seconds["reference"] / seconds[arm]}
                | more
            )
    columns = {
        "arm": "", "place": "", "groups": "d", "descriptors": ".0f", "asynchronous": ".0f", "requests_per_s": ".0f", "share_of_a_core": ".3f",
        "milliseconds": ".1f", "x_reference": ".1f",
    }  # fmt: skip
    report(
        f"HSDP with engine.shard={SHARD}: groups, descriptors, and the watchdog's store", rows, columns, arguments.json
    )


if __name__ == "__main__":
    main()
