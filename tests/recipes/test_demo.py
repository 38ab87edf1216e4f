"""`make demo` from end to end, with a handful of steps: every command, every file; and once more for nothing."""

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SMALL = (
    "--vae-steps", "5", "--paths-per-prompt", "2", "train.steps=4", "train.warmup_steps=0", "train.global_batch_size=8", "train.micro_batch_size=8",
    "checkpoint.every=2", "sample.every=2", "sample.steps=[2]", "evaluate.samples=20", "evaluate.teacher_steps=3",
)  # fmt: skip


def demo(root):
    command = [sys.executable, "-m", "recipes.demo", "--dir", str(root), *SMALL]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_demo(tmp_path):
    root = tmp_path / "a demo"
    output = demo(root)
    assert "step-scaled" in output and "stored paths" in output
    for name in ("trajectories", "distill", "paper_recipe"):
        result = json.loads((root / name / "evaluation.json").read_text())
        assert result["student"].keys() == result["base"].keys() == {"1", "2", "3", "4", "8"}
        assert (root / name / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    for steps in (1, 2, 3, 4):
        assert len(list((root / "trajectories" / "samples" / f"{steps}_steps").glob("*.png"))) == 10
    page = (root / "trajectories" / "report.html").read_text()
    assert "paper_recipe" in page and "distill" in page

    results = [
        root / run / name for run in ("trajectories", "distill") for name in ("metrics.jsonl", "evaluation.json")
    ]
    results.append(root / "trajectories" / "samples" / "4_steps" / "0009.png")
    before = [path.stat().st_mtime_ns for path in results]
    demo(root)
    assert "".join(path.read_text() for path in (root / "logs").glob("*.log")).count("nothing to do") == 4
    assert [path.stat().st_mtime_ns for path in results] == before
