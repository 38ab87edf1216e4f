"""After kill -9 at random moments, SIGTERM or SIGINT the same command resumes, and the result is bitwise the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from scfm_core.distributed.engine import GROUPS
from scfm_core.train.checkpoint import find_checkpoint, load_checkpoint
from scfm_core.train.parse import dump_config

STEPS = 36


@pytest.fixture
def recipe(make_config, tmp_path):
    changes = {
        "train.steps": STEPS,
        "train.micro_batch_size": 4,
        "checkpoint.every": 4,
        "method.step_gain": {"gamma": 0.5},
        "ema.restart_every": 15,
        "data.num_workers": 1,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(make_config(changes)))
    return path


def start(recipe, run_dir):
    command = [sys.executable, "-m", "recipes.cli", "train", str(recipe), f"run.dir={run_dir}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def steps_logged(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_for_steps(process, run_dir, steps):
    deadline = time.monotonic() + 200
    while steps_logged(run_dir) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.02)


def assert_same_end(left, right):
    ends = [find_checkpoint(run_dir) for run_dir in (left, right)]
    assert [end.name for end in ends] == [f"step_{STEPS:08d}"] * 2
    checkpoints = [load_checkpoint(end) for end in ends]
    contents = [{group: c.reader.group(group) for group in GROUPS} for c in checkpoints]
    adapters = [load_file(run_dir / "adapter" / "pytorch_lora_weights.safetensors") for run_dir in (left, right)]
    for group in (*GROUPS, "adapter"):
        one, other = adapters if group == "adapter" else (content[group] for content in contents)
        assert one and one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one), group
    clock = {"seconds", "config"}  # the run's folder is in the configuration
    states = [{key: value for key, value in c.state.items() if key not in clock} for c in checkpoints]
    assert states[0] == states[1]
    rows = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (left, right)]
    assert [row["step"] for row in rows[1]] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


def test_killed_and_stopped_runs_end_like_an_uninterrupted_one(recipe, tmp_path):
    whole, killed, stopped = (tmp_path / name for name in ("whole", "killed", "stopped"))
    finish(start(recipe, whole))

    moments = random.Random(20261121)
    for count in range(3):
        process = start(recipe, killed)
        wait_for_steps(process, killed, 8 * (count + 1) + moments.randrange(5))
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert "resuming from" in finish(start(recipe, killed))
    assert_same_end(whole, killed)

    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(recipe, stopped)
        wait_for_steps(process, stopped, steps_logged(stopped) + 6)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number, output
        last = steps_logged(stopped)
        assert f"stopped by {number.name} after step {last}" in output
        assert find_checkpoint(stopped).name == f"step_{last:08d}"
    finish(start(recipe, stopped))
    assert_same_end(whole, stopped)

    # As if killed between the last checkpoint and the export: the adapter is missing.
    (stopped / "adapter" / "pytorch_lora_weights.safetensors").unlink()
    assert "nothing to do" in finish(start(recipe, stopped))
    assert_same_end(whole, stopped)
