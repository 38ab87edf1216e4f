"""Every benchmark runs with its smallest sizes and reports consistent numbers; no test asserts a time."""

import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch

SMALLEST = {"bench_loader": ["--samples", "48", "--width", "128", "--workers", "1", "--s3"]}
MEASURED = {"milliseconds": True, "microseconds": True, "samples_per_s": False}
"""Column of the measurement -> whether it is a time."""
SCRIPTS = sorted((Path(__file__).parent / "benchmarks").glob("bench_*.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU they have their full size: make bench")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_benchmark_runs(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "os.environ", os.environ.copy()
    )  # it gets the address of a storage that ends with the benchmark
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = ["--repeats", "1", "--batch", "2", "--json", str(tmp_path / "out.json")]
    module.main([*arguments, *SMALLEST.get(path.stem, [])])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["arm"].partition(":")[0] for row in rows} == {"reference", "ours"}
    assert "x reference" in capsys.readouterr().out
    assert_ratios(rows)


def assert_ratios(rows):
    """The ratio of each row is its measurement relative to a row of a reference arm whose ratio is 1."""
    measured = [
        (row["arm"], row[key], row.get("x_reference", row.get("ratio")), is_time)
        for row in rows
        for key, is_time in MEASURED.items()
        if key in row
    ]
    assert len(measured) == len(rows)
    references = [value for arm, value, ratio, _ in measured if arm.startswith("reference") and ratio == 1]
    for arm, value, ratio, is_time in measured:
        assert value > 0 and math.isfinite(value), arm
        expected = ratio * value if is_time else value / ratio
        assert any(math.isclose(expected, reference, rel_tol=1e-9) for reference in references), arm


def test_a_wrong_ratio_is_found():
    rows = [{"arm": "reference", "milliseconds": 3.0, "x_reference": 1.0}, {"arm": "ours", "milliseconds": 2.0}]
    assert_ratios([rows[0], rows[1] | {"x_reference": 1.5}])
    with pytest.raises(AssertionError, match="ours"):
        assert_ratios([rows[0], rows[1] | {"x_reference": 1.4}])
