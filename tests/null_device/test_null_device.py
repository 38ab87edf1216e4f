"""The true-size step of the recipes, and the paths that only a GPU takes, on a driver that does nothing."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import null_cases
import null_driver
import null_step
import pytest
import ratchets
from null_cases import CASES, GROUPS

from scfm_core.train.trace_step import trace_step

pytestmark = pytest.mark.skipif(
    bool(reason := null_driver.why_unavailable() or null_driver.why_no_triton()), reason=str(reason)
)
HERE = Path(__file__).parent
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


@functools.cache
def _measured(group: str) -> tuple[dict[str, dict[str, Any]], Exception | None]:
    found: dict[str, dict[str, Any]] = {}
    try:
        found.update(null_cases.measure_in_process(GROUPS[group]))
    except RuntimeError as error:
        return found, error
    return found, None


def result_of(name: str) -> dict[str, Any]:
    """Of a case; one process measures all of its group. pytest-xdist runs a group on one worker."""
    found, error = _measured(GROUP_OF[name])
    if name not in found:
        raise error or RuntimeError(f"nothing was measured for {name}")
    return found[name]


def case(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.xdist_group(f"null device, {GROUP_OF[name]}"))


@pytest.mark.processes
@pytest.mark.parametrize("name", list(map(case, CASES)))
def test_step_is_no_worse(name: str) -> None:
    kept = ratchets.read()
    if ratchets.versions() != kept["versions"]:
        pytest.skip(f"the numbers are of {kept['versions']}, installed are {ratchets.versions()}")
    found = ratchets.worse(result_of(name), kept["cases"][name])
    assert not found, ratchets.report(name, found)


@pytest.mark.processes
@pytest.mark.parametrize("name", list(map(case, CASES)))
def test_host_waits_once_a_step(name: str) -> None:
    result = result_of(name)
    assert result["waits"] == 1, result["lines"]


TRACED = ("flux_dev_lora", "flux_dev_full, 8 shards")
"""table.py compares all; a trace takes 10 seconds."""


@pytest.mark.processes
@pytest.mark.parametrize("name", list(map(case, TRACED)))
def test_dry_run_knows_the_peak(name: str) -> None:
    """Within 5 % of the allocator's, and the same collectives."""
    traced = trace_step(null_step.load(CASES[name].recipe, CASES[name].overrides), world=CASES[name].world)
    result = result_of(name)
    assert traced.peak == pytest.approx(result["peak"], rel=0.05)
    assert {kind: list(seen) for kind, seen in traced.collectives.items()} == result["collectives"]


def test_ratchet_says_what_grew() -> None:
    kept = {
        "peak": 2**30,
        "reserved": 2**31,
        "launches": 10,
        "waits": 1,
        "pageable": 0,
        "kernels": {"copy": 4, "add": 6},
    }
    same = kept | {"collectives": {}, "lines": {}}
    assert ratchets.worse(same | {"peak": 2**30 + 2**20, "launches": 9}, kept) == []
    assert ratchets.worse(same | {"peak": 2**30 + 2**28}, kept) == ["peak: 1.00 -> 1.25 GiB"]
    more = same | {"launches": 13, "kernels": {"copy": 8, "add": 5}}
    assert ratchets.worse(more, kept) == ["launches: 10 -> 13", "    +4 copy"]
    waits = same | {"waits": 2, "lines": {"cudaStreamSynchronize at a.py:1": 2, "pageable copy at b.py:1": 1}}
    assert ratchets.worse(waits, kept) == ["waits: 1 -> 2", "    2 x cudaStreamSynchronize at a.py:1"]
    gathers = same | {"collectives": {"allgather": [2, 10**9]}}
    assert ratchets.worse(gathers, kept) == ["allgather: 0 of 0.000 GB -> 2 of 1.000 GB"]
    assert "--accept 'a case'" in ratchets.report("a case", ["peak"])


@pytest.mark.processes
@pytest.mark.xdist_group("null device, several GPUs")
def test_memory_of_the_card_is_the_limit() -> None:
    """The allocator's error, as on a GPU: the same code on half the memory."""
    code = (
        "import torch, sys\n"
        "torch.empty(30 * 2**30, dtype=torch.int8, device='cuda')\n"
        "try:\n    torch.empty(50 * 2**30, dtype=torch.int8, device='cuda')\n"
        "except torch.cuda.OutOfMemoryError as error:\n    sys.exit(str(error)[:60])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=null_driver.environment(memory=40), capture_output=True, text=True
    )
    assert done.stderr.strip() == "CUDA out of memory. Tried to allocate 50.00 GiB. GPU 0 has a", done.stderr


PATHS = {
    "adapters": "_gate_forward_kernel",
    "CUDA graphs": "_gate_forward_kernel",
    "triton attention": "_backward_keys_kernel",
    "reference blocks": "flash_fwd_kernel",
    "blocks of diffusers": "fmha_cutlassB_bf16_aligned_64x64_k32_sm80",
    "images": "GroupNormKernelImplInternal",
    "prompts": "flash_fwd_kernel",
    "flow map, compiled": "triton_poi_fused",
    "all weights": "FusedAdamMathFunctor",
    "pretraining": "FusedAdamMathFunctor",
    "compiled, fp8": "triton_per_fused__scaled_mm",
}
"""A kernel that each path must launch."""


@functools.cache
def paths(tiny: Path, folder: Path) -> dict[str, dict[str, Any]]:
    environment = null_driver.environment(card="h100")  # the steps of true size are on an A100
    environment["PYTHONPATH"] += f":{HERE.parent}:{HERE.parent / 'distributed'}"
    command = [sys.executable, HERE / "null_paths.py", tiny, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("null_device")


@pytest.mark.processes
@pytest.mark.xdist_group("null device, paths")
@pytest.mark.parametrize("path", PATHS)
def test_path_of_a_gpu(path: str, tiny: Path, runs: Path) -> None:
    """It runs, launches its kernels, waits once a step and applies the step."""
    result = paths(tiny, runs)[path]
    assert "error" not in result, result["error"]
    assert any(kernel.startswith(PATHS[path]) for kernel in result["kernels"]), sorted(result["kernels"])
    assert (result["graph_nodes"] > 0) == (path == "CUDA graphs")
    assert result["row"]["loss"] == 1.0 and "skipped" not in result["row"]
    assert result["is_expandable"]
    # diffusers copies the numbers of tokens three times, and the host waits for each copy.
    assert result["waits"] == (4 if path == "images" else 1), result["lines"]
    # Two kinds of block x (with gradient; without it all, some or one of the rows).
    assert result["graph_breaks"] == 0 and (0 < result["graphs"] <= 8) == ("compiled" in path), result["graphs"]


@pytest.mark.processes
@pytest.mark.xdist_group("null device, paths")
def test_commands_on_a_gpu(tiny: Path, runs: Path) -> None:
    """Training with validation grids, its continuation, and sampling."""
    result = paths(tiny, runs)["commands"]
    assert result["codes"] == [0, 0, 0], result["printed"]
    assert result["steps"] == [1, 2, 3, 4]
