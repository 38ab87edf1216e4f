"""The steps whose numbers are kept, and a process that measures several steps."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import null_driver

HERE = Path(__file__).resolve().parent
MEMORY = 200
"""GiB of each card: a peak is measured on one that holds it. An expandable segment reserves the addresses of all of it."""


@dataclass(frozen=True)
class Case:
    """A step of a shipped recipe, of rank 0."""

    recipe: str
    overrides: tuple[str, ...] = ("train.compile=false",)
    world: int = 1

    @property
    def is_compiled(self) -> bool:
        return self.world == 1 and "train.compile=false" not in self.overrides


CASES = {
    "flux_dev_lora": Case("flux_dev_lora"),
    "flux_dev_lora, reference blocks": Case("flux_dev_lora", ("train.compile=false", "kernels.fused=reference")),
    "flux_dev_lora, blocks of diffusers": Case("flux_dev_lora", ("train.compile=false", "kernels.fused=none")),
    "flux_dev_lora, no checkpointing": Case(
        "flux_dev_lora", ("train.compile=false", "train.activation_checkpointing=none")
    ),
    "flux_dev_lora, 8 replicas": Case("flux_dev_lora", ("train.compile=false", "train.global_batch_size=64"), 8),
    "flux_dev_trajectories": Case("flux_dev_trajectories"),
    "flux_dev_flow_map": Case("flux_dev_flow_map"),
    "sd35_large_lora": Case("sd35_large_lora"),
    "flux2_klein_lora": Case("flux2_klein_lora"),
    "flux2_dev_lora": Case("flux2_dev_lora"),
    "qwen_image_lora": Case("qwen_image_lora"),
    "zimage_lora": Case("zimage_lora"),
    # Without cuDNN, attention of grouped queries with a mask is products and a softmax: 72 GiB; with cuDNN 46 by the trace.
    "krea2_lora": Case("krea2_lora", ("train.compile=false", "kernels.attention=efficient")),
    "sana_lora": Case("sana_lora"),
    "chroma_lora": Case("chroma_lora"),
    "flux_dev_full, 8 shards": Case("flux_dev_full", (), 8),
    "flux_dev_full, 8 x 8": Case("flux_dev_full", ("engine.shard=8", "train.global_batch_size=64"), 64),
    "flux_dev_lora, compiled": Case("flux_dev_lora", ()),
}
GROUPS: dict[str, dict[str, Case]] = {
    "one GPU": {name: case for name, case in CASES.items() if case.world == 1 and not case.is_compiled},
    "several GPUs": {name: case for name, case in CASES.items() if case.world > 1},
    "compiled": {name: case for name, case in CASES.items() if case.is_compiled},
}
"""Cases that one process measures."""


def measure_in_process(cases: Mapping[str, Case]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and results, one after another, measured by a new process on the null device.

    Raises:
        RuntimeError: if it fails, with the end of what it printed.
    """
    if not cases:
        return
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", HERE / "null_cases.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=null_driver.environment(cards=8, memory=MEMORY),
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        json.dump({name: asdict(case) for name, case in cases.items()}, process.stdin)
        process.stdin.close()
        for line in process.stdout:
            if line.startswith("["):
                name, result = json.loads(line)
                yield name, result
        if process.wait():
            errors.seek(0)
            message = errors.read().partition("Extension modules")[0][-4000:]
            raise RuntimeError(f"exit code {process.returncode}:\n{message}")


def main() -> None:
    """Cases as JSON on standard input; a line of JSON for each on standard output."""
    import null_step

    for name, values in json.load(sys.stdin).items():
        case = Case(**values)
        result = null_step.measure(null_step.load(case.recipe, case.overrides), world=case.world)
        print(json.dumps([name, result]), flush=True)


if __name__ == "__main__":
    main()
