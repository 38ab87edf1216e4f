"""Attention: every available backend, forward and backward.

    python tests/benchmarks/bench_attention.py [--repeats 20] [--batch 4] [--json PATH]

On a GPU: 24 heads of 128 in bf16 at 1280, 1536 and 4608 tokens (Flux.1-dev at 512 x 512 and 1024 x 1024), and 38 heads
of 64 at 1280 (SD3.5-large). `x reference` is relative to the fastest library. `ours: auto` is the backend that a run
would choose. Per head a forward has 4 S^2 D FLOPs and a backward 10 S^2 D (five products).
"""

import time

import torch
from harness import DEVICE, GPU, STARTED, at_least, measure, parser, report, save

from scfm_core.kernels.attention import BACKENDS, AttentionShape, attention, choose_attention, why_unavailable

SHAPES = [(1280, 24, 128), (1536, 24, 128), (4608, 24, 128), (1280, 38, 64)] if GPU else [(37, 2, 16)]

COLUMNS = {
    "tokens": "d", "heads": "", "pass": "", "arm": "", "milliseconds": ".3f", "at_least_ms": ".3f", "TFLOPS": ".1f", "x_reference": ".2f", "goal": "",
}  # fmt: skip


def measure_shape(shape: AttentionShape, repeats: int) -> list[dict[str, object]]:
    """A row for each backend and pass."""
    available = [backend for backend in BACKENDS if why_unavailable(backend, shape) is None]
    if shape.tokens > 2000 and len(available) > 1:
        available.remove("math")  # whole matrices of scores: gigabytes, and never the fastest
    inputs = shape.draw()
    grad = torch.randn_like(inputs[0])

    def forward(backend: str) -> None:
        with torch.no_grad():
            attention(*inputs, backend)

    def both(backend: str) -> None:
        torch.autograd.grad(attention(*inputs, backend), inputs, grad)

    chosen = choose_attention("auto", shape).backend
    matrix = shape.batch * shape.heads * shape.tokens**2 * shape.head_dim
    rows = []
    for kind, run, flops in (("forward", forward, 4), ("forward + backward", both, 14)):
        seconds = measure({backend: lambda b=backend, run=run: run(b) for backend in available}, repeats)  # type: ignore[misc]
        best = min(time for backend, time in seconds.items() if backend != "triton")
        arms = {f"{'ours' if backend == 'triton' else 'reference'}: {backend}": t for backend, t in seconds.items()}
        arms[f"ours: auto ({chosen})"] = seconds[chosen]
        size = (4 if kind == "forward" else 12) * inputs[
            0
        ].nbytes  # query, key, value, result; their gradients; read again
        floor = at_least(flops * matrix, size)
        rows += [
            {
                "tokens": shape.tokens,
                "heads": f"{shape.heads} x {shape.head_dim}",
                "pass": kind,
                "arm": arm,
                "milliseconds": 1e3 * spent,
                "at_least_ms": None if floor is None else 1e3 * floor,
                "TFLOPS": flops * matrix / spent / 1e12,
                "x_reference": best / spent,
                "goal": goal(arm),
            }
            for arm, spent in arms.items()
        ]
    return rows


def goal(arm: str) -> str | None:
    return "0.7 x" if arm == "ours: triton" else "0.98 x" if arm.startswith("ours: auto") else None


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, "attention", 20, 4).parse_args(argv)
    dtype = torch.bfloat16 if GPU else torch.float32
    title, rows = f"attention, batch {arguments.batch}, {str(dtype)[6:]}", []
    for tokens, heads, dim in SHAPES:
        if rows and time.monotonic() > STARTED + arguments.seconds:
            break
        rows += measure_shape(AttentionShape(arguments.batch, tokens, heads, dim, dtype, DEVICE), arguments.repeats)
        save(title, rows, COLUMNS, arguments.json)
    report(title, rows, COLUMNS, arguments.json)


if __name__ == "__main__":
    main()
