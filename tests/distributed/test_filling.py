"""Loading weights on several processes: host memory of a machine, and files that fail on one rank.

`python tests/distributed/test_filling.py` prints the table of docs/engines.md, in two minutes.
"""

import ctypes
import errno
import gc
import json
import os
import shutil
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import ENGINES, joined_trainer, make_tree, run_distributed

from scfm_core.distributed.deepspeed import _units
from scfm_core.distributed.world import join_world
from scfm_core.filling import allocate
from scfm_core.models.families import open_family
from scfm_core.models.student import ShortcutModel
from scfm_core.train.assemble import build_family, build_layout, build_model
from scfm_core.train.config import RunConfig
from scfm_core.train.kernels import Kernels
from scfm_core.train.parse import parse_config

LARGE = {"num_attention_heads": 8, "attention_head_dim": 48, "axes_dims_rope": [16, 16, 16], "num_single_layers": 6}
SCRATCH = {"model__init": "random", "method__teacher_fraction": 0.0, "method__flow_fraction": 1.0}
CPU = torch.device("cpu")


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "FSDP2": ({}, {}, 3.5),
    "HSDP, groups of 2": ({"shard": 2}, {}, 7),
    "ZeRO-3": (ENGINES["zero3"], {}, 3.5),
    "FSDP2, random weights": ({}, SCRATCH, 3),
    "ZeRO-3, random weights": (ENGINES["zero3"], SCRATCH, 3),
}
"""Engine, other settings, and the fp32 networks that remain: student and EMAs in fp32, the teacher in bf16."""


@pytest.fixture(scope="module")
def large(tiny, tmp_path_factory) -> Path:
    return write_large(tiny, tmp_path_factory.mktemp("large") / "flux")


def write_large(tiny: Path, folder: Path) -> Path:
    """A pipeline with a larger network, of random weights."""
    shutil.copytree(tiny / "flux", folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **LARGE}))
    family = open_family(str(folder))
    family.network_class.from_config(dict(family.network_config)).save_pretrained(folder / "transformer")
    return folder


def memory() -> int:
    """Bytes of this process in host memory: its own, and its part of mapped files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_File:")))


def loading(tree: dict[str, Any], folder: Path) -> tuple[int, int]:
    """In a rank: bytes that building the networks of `folder` takes at most, and bytes of the tensors that it leaves here."""
    ctypes.CDLL(None).mallopt(
        -3, 1 << 16
    )  # M_MMAP_THRESHOLD: freed tensors go back to the system, so they are not measured
    config = parse_config(tree, "test")
    with join_world(CPU, 60, always=True) as world:

        def build(config: RunConfig) -> ShortcutModel:
            kernels = Kernels("none", "", None)
            return build_model(config, build_family(config), CPU, kernels=kernels, layout=layout, world=world)

        layout = build_layout(config, world, CPU)
        build(config)  # what is imported and set up once is not measured
        large = replace(config, model=replace(config.model, path=str(folder)))
        gc.collect()
        dist.barrier()
        before = peak = memory()
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        model = build(large)
        peak = max(peak, memory())
        done.set()
        watcher.join()
        tensors = [getattr(p, "ds_tensor", p.detach()) for n in model.networks.values() for p in n.parameters()]
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
        dist.barrier()
        return peak - before, sum(tensor.nbytes for tensor in local)


def measured(name: str, tiny: Path, large: Path, run_dir: Path) -> tuple[float, float]:
    """Host memory of 4 processes while they build `large`, at its peak and of what remains; in fp32 networks."""
    engine, changes, _ = CASES[name]
    tree = make_tree(
        tiny, run_dir, engine=engine, train__weights="full", train__compute_dtype="bfloat16", **changes
    )  # fmt: skip
    by_rank = run_distributed(loading, 4, tree, large)
    network = 4 * sum(parameter.numel() for parameter in open_family(str(large)).meta_network().parameters())
    peak, kept = (sum(values) / network for values in zip(*by_rank, strict=True))
    return peak, kept


def test_a_network_with_a_parameter_of_its_own_is_not_allocated_whole():
    with torch.device("meta"):
        network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        network.token = torch.nn.Parameter(torch.zeros(2))
    allocated = []
    for _, unit in _units(network):
        allocate(unit, "cpu")
        allocated.append({name for name, parameter in network.named_parameters() if not parameter.is_meta})
    assert allocated == [{"token"}, {"token", "0.weight", "0.bias"}, {name for name, _ in network.named_parameters()}]


@pytest.mark.parametrize("name", ["HSDP, groups of 2", "ZeRO-3"])
def test_a_machine_needs_little_more_than_the_networks_themselves(name, large, tiny, tmp_path):
    """On a GPU the tensors that remain are not in host memory, so what is on top of them is what a machine needs."""
    peak, kept = measured(name, tiny, large, tmp_path / "run")
    assert kept == pytest.approx(CASES[name][2], rel=0.05)
    assert peak - kept < 1.3


def failing_reads(tree: dict[str, Any], rank: int) -> None:
    """In a rank: train; on `rank`, no weights can be read after a while."""
    read, reads = os.preadv, 0

    def preadv(*arguments: Any) -> int:
        nonlocal reads
        reads += 1
        if reads > 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*arguments)

    if int(os.environ["RANK"]) == rank:
        os.preadv = preadv
    with joined_trainer(tree):
        pass


@pytest.mark.parametrize(("name", "rank"), [("fsdp2", 1), ("replicas", 1), ("zero3", 0)])
def test_an_error_of_reading_on_one_rank_is_every_ranks(name, rank, tiny, tmp_path):
    tree = make_tree(tiny, tmp_path / "run", engine=ENGINES[name], train__weights="full", train__micro_batch_size=4)
    outcomes = run_distributed(failing_reads, 2, tree, rank, expect_failure=True, timeout=60)
    for outcome in outcomes:
        assert outcome is not None, "a rank still waits for the other"
        assert f"rank {rank}: model.path: " in outcome.traceback
        assert "cannot be read (Input/output error)" in outcome.traceback


def main() -> None:
    from tiny_fixtures import write_tiny

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        tiny = write_tiny(root / "tiny")
        large = write_large(tiny, root / "large")
        for number, name in enumerate(CASES):
            peak, kept = measured(name, tiny, large, root / str(number))
            print(f"| {name} | {kept:.1f} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
