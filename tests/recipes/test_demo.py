"""`make demo` from end to end with few steps: every command and every file; a second start does nothing."""

import json
import sys

import pytest
from tiny_fixtures import adapter_file

from recipes.demo import main

SMALL = (
    "--vae-steps", "5", "--paths-per-prompt", "2", "train.steps=4", "train.warmup_steps=0", "train.global_batch_size=8", "train.micro_batch_size=8",
    "checkpoint.every=2", "sample.every=2", "sample.steps=[2]", "evaluate.samples=20", "evaluate.teacher_steps=3",
)  # fmt: skip


@pytest.fixture
def demo(tmp_path, monkeypatch, capsys):
    """Run `python -m recipes.demo` without a new interpreter; returns its output."""

    def run():
        monkeypatch.setattr(sys, "argv", ["demo", "--dir", str(tmp_path / "a demo"), *SMALL])
        main()
        return capsys.readouterr().out

    return run


@pytest.mark.processes
def test_demo(demo, tmp_path):
    root, output = tmp_path / "a demo", demo()
    assert "step-scaled" in output and "stored paths" in output
    for name in ("trajectories", "distill", "paper_recipe"):
        result = json.loads((root / name / "evaluation.json").read_text())
        assert result["student"].keys() == result["base"].keys() == {"1", "2", "3", "4", "8"}
        assert adapter_file(root / name / "adapter").is_file()
    for steps in (1, 2, 3, 4):
        assert len(list((root / "trajectories" / "samples" / f"{steps}_steps").glob("*.png"))) == 10
    page = (root / "trajectories" / "report.html").read_text()
    assert "paper_recipe" in page and "distill" in page

    results = [
        root / run / name for run in ("trajectories", "distill") for name in ("metrics.jsonl", "evaluation.json")
    ]
    results += (root / "trajectories" / "samples" / "4_steps").glob("*.png")
    before = [path.stat().st_mtime_ns for path in results]
    demo()
    assert "".join(path.read_text() for path in (root / "logs").glob("*.log")).count("nothing to do") == 4
    assert [path.stat().st_mtime_ns for path in results] == before
