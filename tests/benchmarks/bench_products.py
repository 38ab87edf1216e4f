"""The product of an adapted linear, base and adapter together: the vendor's library, and a Triton kernel with each of its tiles.

    python tests/benchmarks/bench_products.py [--repeats 20] [--batch 4] [--seconds S] [--json PATH]

On a GPU: the shapes of Flux.1-dev's blocks at 512 x 512 pixels with 256 text tokens, bf16, rank 64, as the forward and as the backward
reads the weight. `kernels.lora: auto` chooses among these. On a CPU: a tiny shape in Triton's interpreter.
"""

import time
from typing import Any

import torch
from harness import DEVICE, GPU, STARTED, measure, parser, report, save

from scfm_core.kernels.lora_gemm import TILES, lora_gemm
from scfm_core.kernels.lora_products import add_product, use_tiles

SIZES = {  # inputs, outputs; tokens of a sample
    "single, to queries": (3072, 3072, 1280), "single, up": (3072, 12288, 1280), "single, down": (15360, 3072, 1280),
    "double, image": (3072, 3072, 1024), "double, image, up": (3072, 12288, 1024), "double, image, down": (12288, 3072, 1024),
}  # fmt: skip
TINY = {"tiny": (32, 48, 20)}
COLUMNS = {"kernel": "", "pass": "", "arm": "", "microseconds": ".0f", "TFLOPS": ".0f", "x_reference": ".3f"}


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, "products", 20, 4).parse_args(argv)
    dtype, rank = (torch.bfloat16, 64) if GPU else (torch.float32, 4)
    title, rows = f"products of adapted linears, batch {arguments.batch}, rank {rank}", []
    use_tiles({})  # `add_product` is the library
    for name, (inputs, outputs, tokens) in (SIZES if GPU else TINY).items():
        if rows and time.monotonic() > STARTED + arguments.seconds:
            break
        stored = torch.randn(outputs, inputs, device=DEVICE, dtype=dtype)
        for kind, weight in (("forward", stored.T), ("backward", stored)):
            count = arguments.batch * tokens
            x = torch.randn(count, weight.shape[0], device=DEVICE, dtype=dtype)
            low = torch.randn(count, rank, device=DEVICE, dtype=dtype)
            factor = torch.randn(rank, weight.shape[1], device=DEVICE, dtype=dtype)
            given: tuple[Any, ...] = (x, weight, low, factor, None)
            arms = {"reference: library": lambda given=given: add_product(*given)}
            for tile in TILES if GPU else TILES[:1]:
                arms[f"ours: {tile.rows} x {tile.columns} x {tile.depth}"] = lambda given=given, tile=tile: lora_gemm(
                    *given, tile
                )
            seconds = measure(arms, arguments.repeats)
            flops = 2 * count * weight.shape[1] * (weight.shape[0] + rank)
            rows += [
                {
                    "kernel": name,
                    "pass": kind,
                    "arm": arm,
                    "microseconds": 1e6 * spent,
                    "TFLOPS": flops / spent / 1e12,
                    "x_reference": seconds["reference: library"] / spent,
                }
                for arm, spent in seconds.items()
            ]
        save(title, rows, COLUMNS, arguments.json)
    report(title, rows, COLUMNS, arguments.json)


if __name__ == "__main__":
    main()
