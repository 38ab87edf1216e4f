"""After kill -9 at random moments, SIGTERM or SIGINT the same command resumes, and the result is bitwise the same.

The trainings are forked from the server that tests/distributed/launch.py preloads. They start in a tenth of a second and share
no state with this process. The last start is a new interpreter.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import launch
import pytest
from safetensors.torch import load_file
from tiny_fixtures import adapter_file

from recipes.cli import command
from scfm_core.distributed.engine import GROUPS
from scfm_core.train.checkpoint import find_checkpoint, load_checkpoint
from scfm_core.train.parse import dump_config

pytestmark = pytest.mark.processes
assert launch.run_distributed  # imported for the server's preloaded modules
CONTEXT = multiprocessing.get_context("forkserver")
STEPS = 12


@pytest.fixture
def recipe(make_config, tmp_path):
    changes = {
        "train.steps": STEPS,
        "train.micro_batch_size": 4,
        "checkpoint.every": 4,
        "method.step_gain": {"gamma": 0.5},
        "ema.restart_every": 5,
        "data.num_workers": 1,
        "lora.targets": r".*attn\.to_[qv]",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(make_config(changes)))
    return path


def scfm_train(recipe, run_dir, output, number, steps, seconds):
    """In a process: run `scfm train`, and send a signal to itself `seconds` after `steps` steps are logged."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def send_signal():
        while steps_logged(run_dir) < steps:
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(os.getpid(), number)

    if number is not None:
        threading.Thread(target=send_signal, daemon=True).start()
    sys.argv = ["scfm", "train", str(recipe), f"run.dir={run_dir}"]
    command()


def train(recipe, run_dir, number=None, steps=0, seconds=0.0):
    """Start the run; returns its exit code and its output."""
    output = run_dir.with_suffix(".out")
    process = CONTEXT.Process(target=scfm_train, args=(recipe, run_dir, output, number, steps, seconds), daemon=False)
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, output.read_text()


def finish(recipe, run_dir):
    code, output = train(recipe, run_dir)
    assert code == 0, output
    return output


def steps_logged(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def assert_same_end(left, right):
    ends = [find_checkpoint(run_dir) for run_dir in (left, right)]
    assert [end.name for end in ends] == [f"step_{STEPS:08d}"] * 2
    checkpoints = [load_checkpoint(end) for end in ends]
    contents = [{group: c.reader.group(group) for group in GROUPS} for c in checkpoints]
    adapters = [load_file(adapter_file(run_dir / "adapter")) for run_dir in (left, right)]
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


def test_a_run_killed_three_times(recipe, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(recipe, whole)
    moments = random.Random(20261121)
    for count in range(3):
        steps, seconds = 3 * count + 1 + moments.randrange(3), moments.uniform(0, 0.05)
        code, output = train(recipe, killed, signal.SIGKILL, steps, seconds)
        assert code == -signal.SIGKILL, output
    assert "resuming from" in finish(recipe, killed)
    assert_same_end(whole, killed)


def test_a_run_stopped_by_signals(recipe, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(recipe, whole)
    for number, steps in ((signal.SIGTERM, 3), (signal.SIGINT, 7)):
        code, output = train(recipe, stopped, number, steps)
        assert code == 128 + number, output
        last = steps_logged(stopped)
        assert steps <= last < STEPS
        assert f"stopped by {number.name} after step {last}" in output
        assert find_checkpoint(stopped).name == f"step_{last:08d}"
    finish(recipe, stopped)
    assert_same_end(whole, stopped)

    # As if killed between the last checkpoint and the export: the adapter is missing.
    adapter_file(stopped / "adapter").unlink()
    words = [sys.executable, "-m", "recipes.cli", "train", str(recipe), f"run.dir={stopped}"]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert_same_end(whole, stopped)
