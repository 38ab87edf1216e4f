"""What an adapter is worth without the linears outside the blocks: distance to the teacher, with all linears and without them.

    python tests/benchmarks/left_out.py RUN_DIR [section.key=value ...]

RUN_DIR is an evaluated run of adapters, such as `runs/demo/distill` of `make demo`.
"""

import argparse
from pathlib import Path

import torch

from recipes.evaluate import Evaluator
from recipes.export import TOP_LEVEL, left_out_pattern
from scfm_core.train.runs import open_run
from scfm_core.wording import number

STEPS = (1, 2, 4, 8)


def main() -> None:
    """Measure and print the rows of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    config = open_run(arguments.run_dir, arguments.overrides)
    evaluator = Evaluator(arguments.run_dir, config)
    evaluator.measure("teacher", config.evaluate.teacher_steps)
    evaluator.set_reference()
    role = config.sample.weights
    ups = {
        name.partition(".lora_B.")[0]: up for name, up in evaluator.model.parameters(role).items() if ".lora_B." in name
    }
    pattern = left_out_pattern(evaluator.model.family, TOP_LEVEL)
    assert pattern is not None
    outside = [up for name, up in ups.items() if pattern.fullmatch(name)]
    print(f"{len(outside)} of {len(ups)} adapted linears are outside the blocks")
    whole = [evaluator.measure(role, steps) for steps in STEPS]
    with torch.no_grad():
        for up in outside:
            up.zero_()
    for steps, before in zip(STEPS, whole, strict=True):
        after = evaluator.measure(role, steps)
        cells = [number(row[key]) for key in ("fid_teacher", "mse_teacher") for row in (before, after)]
        print(f"| {steps} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
