"""Benchmarks at their smallest: figures, ratios and inputs of the arms. No time is asserted."""

import importlib.util
import itertools
import json
import math
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tiny_fixtures import streaming_alone
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCRIPTS = sorted((Path(__file__).parent / "benchmarks").glob("bench_*.py"))
LOADER, STARTUP = (next(path for path in SCRIPTS if path.stem == name) for name in ("bench_loader", "bench_startup"))
DIFFERENT_INPUTS = {"bench_ranks", "bench_forward"}
"""One has no tensors; of the other one arm has no adapters."""
REFERENCE = {
    "bench_forward": "reference: diffusers",
    "bench_fsdp": "reference",
    "bench_kernels": "reference: eager",
    "bench_memory": "reference: none",
    "bench_products": "reference: library",
    "bench_ranks": "reference",
    "bench_step": "reference",
    "bench_update": "reference",
}
"""The arm that `x_reference` is against; in the other tables it is the fastest of the libraries."""
KEYS = ("tokens", "heads", "pass", "kernel", "records", "place")
"""Columns that tell one comparison of a table from another."""
TIMES = ("milliseconds", "microseconds")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them at their full size: make bench")


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(module, output, *words):
    module.main(["--repeats", "1", "--batch", "2", "--json", str(output), *words])
    return json.loads(output.read_text())["rows"]


def comparisons(rows):
    """Rows that are compared with each other, by arm."""
    groups = defaultdict(dict)
    for row in rows:
        groups[tuple(row.get(key) for key in KEYS)][row["arm"]] = row
    assert sum(map(len, groups.values())) == len(rows)
    for group in groups.values():
        assert {arm.partition(":")[0] for arm in group} == {"reference", "ours"}
    return groups.values()


def assert_figures(rows):
    figures = [(row["arm"], key, value) for row in rows for key, value in row.items() if isinstance(value, float)]
    assert len(figures) >= 2 * len(rows)  # a time and a ratio at least
    for figure in figures:
        assert math.isfinite(figure[2]) and figure[2] > 0, figure


class Inputs(TorchDispatchMode):
    """Shapes and dtypes of the tensors that an arm reads and has not made itself; scalars and vectors are left out."""

    def __init__(self):
        super().__init__()
        self.read, self.made = set(), {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        for tensor in tree_leaves((arguments, keywords)):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.ndim > 1
                and tensor.untyped_storage()._cdata not in self.made
            ):
                self.read.add((tuple(tensor.shape), tensor.dtype))
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.made[tensor.untyped_storage()._cdata] = tensor  # kept: its address must not be used again
        return result


@pytest.mark.parametrize(
    "path", [path for path in SCRIPTS if path not in (LOADER, STARTUP)], ids=lambda path: path.stem
)
def test_figures_ratios_and_inputs(path, tmp_path, capsys, monkeypatch):
    """With times that the test sets: one second for the first arm that is measured, two for the next, and so on."""
    module, numbers, measured = load(path), itertools.count(1), []

    def measure(arms, repeats, **_):
        assert repeats == 1
        measured.append({})
        for name, run in arms.items():
            run()
            with Inputs() as inputs:
                run()
            measured[-1][name] = inputs.read
        return {name: float(next(numbers)) for name in arms}

    monkeypatch.setattr(module, "measure", measure)
    rows = rows_of(module, tmp_path / "out.json")
    assert "x reference" in capsys.readouterr().out
    assert_figures(rows)
    for group in comparisons(rows):
        times = {arm: next(row[key] for key in TIMES if key in row) for arm, row in group.items()}
        fastest = min((arm for arm in times if arm.startswith("reference")), key=times.__getitem__)
        reference = REFERENCE.get(path.stem, fastest)
        for arm, row in group.items():
            assert row["x_reference"] == pytest.approx(times[reference] / times[arm], rel=1e-12), arm

    if path.stem in DIFFERENT_INPUTS:
        return
    if all(len(arms) == 1 for arms in measured):  # each alone on the device, so measured one by one
        measured = [{name: read for arms in measured for name, read in arms.items()}]
    for arms in measured:
        arms.pop("reference: automodel", None)  # other adapters, and no pairs
        first, *others = arms.values()
        assert first and others
        for read in others:
            # FSDP2 gathers the weights that do not change within the call, so they are not among what it reads.
            assert read < first if path.stem == "bench_fsdp" else read == first, read ^ first


def test_parked_tensors_come_back(monkeypatch):
    """Views, parameters and what an optimizer holds keep their storages; a second time they take new values along."""
    import setting

    monkeypatch.setattr(setting.Parking, "_CHUNK", 24)  # some storages share a chunk, one is larger
    tensors = [torch.arange(4.0), torch.ones(3, dtype=torch.bfloat16), torch.nn.Parameter(torch.arange(20.0))]
    view, parking = tensors[0][1:3], setting.Parking()
    for change in (0.0, 5.0):
        with torch.no_grad():
            tensors[0].add_(change)
        expected = [tensor.detach().clone() for tensor in tensors]
        parking.out(tensor.untyped_storage() for tensor in tensors)
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
        parking.back()
        assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, expected, strict=True))
        assert view.tolist() == [1 + change, 2 + change]


@pytest.mark.processes
def test_loaders_deliver_the_same_tensors(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.environ", os.environ.copy())  # of a storage that ends with the benchmark
    module, epochs = load(LOADER), []
    time_epoch, to_device = module.time_epoch, module.to_device

    def timed(start, arms):
        epochs.append([])
        return time_epoch(start, arms)

    def copied(batch, paddings):
        parts = to_device(batch, paddings)
        epochs[-1] += [(tuple(part.shape), part.dtype) for part in parts]
        return parts

    monkeypatch.setattr(module, "time_epoch", timed)
    monkeypatch.setattr(module, "to_device", copied)
    # Two batches at least: the rate from the first batch on is of the others.
    with streaming_alone():
        rows = rows_of(
            module,
            tmp_path / "out.json",
            "--samples",
            "48",
            "--width",
            "128",
            "--workers",
            "1",
            "--s3",
            "--generated",
            "320",
        )
    assert "x reference" in capsys.readouterr().out
    assert_figures(rows)
    groups = comparisons(rows)
    for group in groups:
        best = max(row["samples_per_s"] for arm, row in group.items() if arm.startswith("reference"))
        for arm, row in group.items():
            assert row["ratio"] == pytest.approx(row["samples_per_s"] / best, rel=1e-12), arm
    arms = len(rows) // len(groups)
    assert len(epochs) == len(rows)
    for number in range(0, len(epochs), arms):
        first, *others = (sorted(epoch, key=str) for epoch in epochs[number : number + arms])
        assert len(first) >= 48 // 2 and all(other == first for other in others)


@pytest.mark.processes
def test_start_of_several_ranks(tmp_path, capsys):
    words = ("--samples", "600", "--shards", "5", "--distinct", "50", "--run", "3", "--processes", "2")
    rows = rows_of(load(STARTUP), tmp_path / "out.json", *words)
    assert "600 samples in 5 shards, 50 sizes in runs of 3" in capsys.readouterr().out
    assert [(row["arm"], row["processes"]) for row in rows] == [("ours: first start", 2), ("ours: next start", 2)]
    for row in rows:
        for key in ("corpus_s", "order_s", "seconds", "read_mb"):
            assert math.isfinite(row[key]) and row[key] > 0, (key, row)
        assert row["seconds"] == pytest.approx(row["corpus_s"] + row["order_s"], rel=0.5)
        assert row["x_reference"] == pytest.approx(rows[0]["seconds"] / row["seconds"], rel=1e-12)
