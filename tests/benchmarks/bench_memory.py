"""Peak memory and time of our step with each kind of activation checkpointing.

    python tests/benchmarks/bench_memory.py [--repeats 5] [--batch 8] [--seconds S] [--json PATH]

On a GPU: Flux.1-dev, 512 x 512 pixels, T5 length 512, LoRA rank 64; one arm at a time is on the GPU. An arm that does not fit has no
time. The slowdown is measured at the largest batch at which all fit. On a CPU: the tiny Flux, without memory.
"""

import gc
import time

import torch
from harness import GPU, STARTED, measure, parser, report, save
from setting import Setting
from step_arms import ours

COLUMNS = {"arm": "", "batch": "d", "milliseconds": ".1f", "x_reference": ".2f", "peak_GiB": ".1f", "goal": ""}
MODES = ("selective", "none", "full")


def measured(setting: Setting, backend: str, mode: str, repeats: int, until: float) -> tuple[float | None, float]:
    """Seconds of a step and bytes at its peak; no seconds, if it does not fit."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    try:
        arm = ours(setting, backend=backend, checkpointing=mode)
        seconds = measure({mode: arm.step}, repeats, until=until)[mode]
    except torch.OutOfMemoryError as error:
        print(f"{mode}, batch {setting.batch}: {str(error).splitlines()[0]}", flush=True)
        return None, torch.cuda.max_memory_allocated()
    return seconds, torch.cuda.max_memory_allocated() if GPU else 0


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, "memory", 5).parse_args(argv)
    setting = Setting(arguments.batch, text_length=512)
    backend = setting.attention()
    until = STARTED + arguments.seconds
    title = f"activation checkpointing, {setting.tokens} tokens, {backend} attention"
    rows: list[dict[str, object]] = []
    batch = arguments.batch
    while batch >= 1 and (not rows or time.monotonic() < until):
        found = {}
        for mode in MODES:
            found[mode] = measured(setting.resized(batch), backend, mode, arguments.repeats, until)
            gc.collect()
            if GPU:
                torch.cuda.empty_cache()
        none = found["none"][0]
        rows += [
            {
                "arm": "reference: none" if mode == "none" else f"ours: {mode}",
                "batch": batch,
                "milliseconds": None if seconds is None else 1e3 * seconds,
                "x_reference": None if seconds is None or none is None else none / seconds,
                "peak_GiB": peak / 2**30 if GPU else None,
                "goal": "80 GB at batch 8, 0.95 x" if mode == "selective" else None,
            }
            for mode, (seconds, peak) in found.items()
        ]
        save(title, rows, COLUMNS, arguments.json)
        if none is not None:
            break
        batch //= 2
    report(title, rows, COLUMNS, arguments.json)


if __name__ == "__main__":
    main()
