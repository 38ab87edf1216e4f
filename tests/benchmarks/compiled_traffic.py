"""Bytes and launches of what `torch.compile` makes of a step, counted on the null device: the compiler is the real one.

    python tests/null_device/run.py --card h100 --memory 400 tests/benchmarks/compiled_traffic.py [--arms NAME,...]

A kernel of inductor reads or writes each tensor among its arguments once; those that it updates in place twice. This takes minutes for
each arm, so predict.py reads the figures from compiled_traffic.json. Per sample they hardly depend on the batch.
"""

import argparse
import gc
from pathlib import Path
from typing import Any

import tables
import torch
from bench_step import makers
from harness import NULL
from setting import Setting

PATH = Path(__file__).with_name("compiled_traffic.json")
BATCH = 4
COMPILED = ("reference: tuned", "ours: diffusers' blocks", "ours", "ours: selective")


class Counter:
    """Calls and bytes of inductor's kernels, while it is on."""

    def __init__(self) -> None:
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        self.is_on, self.calls, self.bytes = False, 0, 0
        run, counter = CachingAutotuner.run, self

        def counted(kernel: Any, *args: Any, **options: Any) -> Any:
            if counter.is_on:
                counter.calls += 1
                for name, value in zip(kernel.fn.arg_names, args, strict=False):
                    if isinstance(value, torch.Tensor):
                        counter.bytes += _touched(value) * (1 + name.startswith("in_out"))
            return run(kernel, *args, **options)

        CachingAutotuner.run = counted  # type: ignore[method-assign]


def _touched(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded axis once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(COMPILED))
    names = parser.parse_args().arms.split(",")
    if not NULL:
        parser.error("this counts on the null device: start it with tests/null_device/run.py")
    counter, setting = Counter(), Setting(BATCH)
    make = makers(setting, "flash", eager=False)
    for name in names:
        torch._dynamo.reset()
        arm = make[name]()
        arm()
        arm()
        counter.calls = counter.bytes = 0
        counter.is_on = True
        arm()
        counter.is_on = False
        found = tables.load(PATH) if PATH.is_file() else {}
        found[name] = {
            "torch": torch.__version__, "batch": BATCH, "launches": counter.calls, "bytes": counter.bytes,
        }  # fmt: skip
        tables.save(PATH, found)
        print(f"{name}: {counter.calls} kernels, {counter.bytes / 1e9:.1f} GB", flush=True)
        arm.out()
        del arm
        gc.collect()


if __name__ == "__main__":
    main()
