"""Triton's compiler on every launch of every kernel, for A100 and H100, without a GPU.

It finds errors that the interpreter does not: types that differ between branches, shapes that do not lower, too many
registers, too much shared memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # of a block, CUDA programming guide, table of compute capabilities


pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def launches():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_launches.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kernel_compiles_for_both_gpus(launches):
    kernels = {row["kernel"] for row in launches}
    sources = Path(__file__).parents[2].joinpath("scfm_core/kernels").glob("*.py")
    launched = {
        f"{source.stem}.{line.partition('[')[0].strip()}"
        for source in sources
        for line in source.read_text().splitlines()
        if line.strip().startswith("_") and "_kernel[(" in line
    }
    assert len(kernels) >= 11 and kernels == launched
    for capability in SHARED_MEMORY:
        assert {row["kernel"] for row in launches if row["capability"] == capability} == kernels


def test_shared_memory_suffices(launches):
    for row in launches:
        assert row["shared"] <= SHARED_MEMORY[row["capability"]], row


def test_nothing_spills_in_bf16(launches):
    spilled = [row for row in launches if row["stack"] and row["dtype"] == "torch.bfloat16"]
    assert not spilled
