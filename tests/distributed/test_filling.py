"""Loading weights on several processes: host memory of a machine, and files that fail on one rank."""

import ctypes
import errno
import gc
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import ENGINES, joined_trainer, make_tree, run_distributed

from scfm_core.distributed.world import join_world
from scfm_core.models.families import open_family
from scfm_core.models.student import ShortcutModel
from scfm_core.train.assemble import build_family, build_layout, build_model
from scfm_core.train.config import RunConfig
from scfm_core.train.kernels import Kernels
from scfm_core.train.parse import parse_config

LARGE = {"num_attention_heads": 8, "attention_head_dim": 48, "axes_dims_rope": [16, 16, 16], "num_single_layers": 6}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def large(tiny, tmp_path_factory) -> tuple[Path, int]:
    """A pipeline with a larger network, of random weights, and the bytes of the network in fp32."""
    folder = shutil.copytree(tiny / "flux", tmp_path_factory.mktemp("large") / "flux")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **LARGE}))
    family = open_family(str(folder))
    network = family.network_class.from_config(dict(family.network_config))
    network.save_pretrained(folder / "transformer")
    return folder, sum(4 * parameter.numel() for parameter in network.parameters())


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


@pytest.mark.parametrize(("name", "engine"), [("hsdp", {"shard": 2}), ("zero3", ENGINES["zero3"])])
def test_a_machine_needs_little_more_than_the_networks_themselves(name, engine, large, tiny, tmp_path):
    """On a GPU the tensors that remain are not in host memory, so what is on top of them is what a machine needs."""
    folder, network = large
    tree = make_tree(tiny, tmp_path / "run", engine=engine, train__weights="full", train__compute_dtype="bfloat16")
    by_rank = run_distributed(loading, 4, tree, folder)
    peak, kept = (sum(values) / network for values in zip(*by_rank, strict=True))
    assert kept == pytest.approx(7 if name == "hsdp" else 3.5, rel=0.05)
    assert peak - kept < 1.3, by_rank


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
