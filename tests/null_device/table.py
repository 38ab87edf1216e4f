"""The peak of the dry run's trace against that of the allocator on the null device: `python tests/null_device/table.py [ROW ...]`.

A row is one of `triton`, `reference`, `none` (flux_dev_lora with these blocks), `full` (all weights of Flux.1-dev) and `recipes`
(each recipe's own settings). Without arguments all are printed, in some 10 minutes on a core.
"""

import sys

import null_cases
import null_driver
import null_step
from null_cases import CASES, Case

from scfm_core.train.trace_step import trace_step

EAGER = "train.compile=false"
MICRO = (1, 4, 8)
FULL = {
    "8 GPUs": Case("flux_dev_full", (), 8),
    "8 x 8 GPUs (HSDP)": Case("flux_dev_full", ("engine.shard=8", "train.global_batch_size=64"), 64),
    "64 GPUs (flat)": Case("flux_dev_full", ("train.global_batch_size=64",), 64),
}


def compared(cases: dict[str, Case]) -> dict[str, str]:
    """`null device / trace GiB (difference)` by name."""
    measured = dict(null_cases.measure_in_process(cases))
    cells = {}
    for name, case in cases.items():
        traced = trace_step(null_step.load(case.recipe, case.overrides), world=case.world)
        null = measured[name]["peak"]
        cells[name] = f"{null / 2**30:.2f} / {traced.peak / 2**30:.2f} ({traced.peak / null - 1:+.1%})"
    return cells


def blocks(fused: str) -> None:
    """Checkpointing x micro-batch of flux_dev_lora."""
    for checkpointing in ("none", "selective", "full"):
        settings = (EAGER, f"kernels.fused={fused}", f"train.activation_checkpointing={checkpointing}")
        cases = {
            str(size): Case(
                "flux_dev_lora", (*settings, f"train.micro_batch_size={size}", "train.global_batch_size=16")
            )
            for size in MICRO
        }
        print(f"| {fused}, {checkpointing} | {' | '.join(compared(cases).values())} |", flush=True)


def main() -> None:
    reason = null_driver.why_unavailable() or null_driver.why_no_triton()
    if reason is not None:
        sys.exit(reason)
    rows = sys.argv[1:] or ["triton", "reference", "none", "full", "recipes"]
    if kinds := [row for row in rows if row in ("triton", "reference", "none")]:
        print("Peak GiB of flux_dev_lora in two micro-batches: null device / trace (difference)\n")
        print(
            "| blocks, checkpointing | "
            + " | ".join(f"micro {size}" for size in MICRO)
            + " |\n|---|"
            + "---|" * len(MICRO)
        )
        for fused in kinds:
            blocks(fused)
    recipes = {name: case for name, case in CASES.items() if name == case.recipe}
    for row, cases in (("full", FULL), ("recipes", recipes)):
        if row in rows:
            print(f"\n| {row} | peak GiB: null device / trace (difference) |\n|---|---|")
            for name, cell in compared(cases).items():
                print(f"| {name} | {cell} |", flush=True)


if __name__ == "__main__":
    main()
