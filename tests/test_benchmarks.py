"""Benchmarks run at their smallest, so that they cannot rot; nothing here asserts a time."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

SMALLEST = {"bench_loader": ["--samples", "48", "--width", "128", "--workers", "1", "--s3"]}
SCRIPTS = [
    pytest.param(path, marks=[pytest.mark.processes] if path.stem == "bench_loader" else [])
    for path in sorted((Path(__file__).parent / "benchmarks").glob("bench_*.py"))
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them at their full size: make bench")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_benchmark_runs(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.environ", os.environ.copy())  # of a storage that ends with the benchmark
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = ["--repeats", "1", "--batch", "2", "--json", str(tmp_path / "out.json")]
    module.main([*arguments, *SMALLEST.get(path.stem, [])])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["arm"].partition(":")[0] for row in rows} == {"reference", "ours"}
    assert "x reference" in capsys.readouterr().out
