"""Each fused operation, forward and backward, compared with eager and compiled PyTorch.

    python tests/benchmarks/bench_kernels.py [--repeats 20] [--batch 8] [--json PATH]

On a GPU: the shapes of Flux.1-dev at 512 x 512 with 256 text tokens, bf16. `of copy` is the bandwidth as a share of a large copy's,
`at least` the time at the bandwidth of the data sheet. Both count each tensor that must be read or written once, also if an arm reads it
more often. On a CPU: tiny shapes in Triton's interpreter, without compilation.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from harness import DEVICE, GPU, NULL, STARTED, at_least, copy_bandwidth, measure, parser, report, save
from torch import Tensor

from scfm_core.kernels import reference
from scfm_core.kernels.lora import lora_linear
from scfm_core.kernels.ops import triton_ops

HEADS, DIM, HIDDEN = (24, 128, 12288) if GPU else (2, 16, 64)
WIDTH = HEADS * DIM
IMAGE, TEXT = (1024, 256) if GPU else (12, 4)
DTYPE = torch.bfloat16 if GPU else torch.float32
RANK = 64 if GPU else 4
COLUMNS = {
    "kernel": "",
    "pass": "",
    "arm": "",
    "microseconds": ".0f",
    "at_least_us": ".0f",
    "of_copy": ".0%",
    "x_reference": ".2f",
    "goal": "",
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE, requires_grad=True)


def cases(batch: int) -> dict[str, tuple[list[Any], int, int]]:
    """Arguments of each operation, and the number of elements that its forward and its backward must read or write."""
    tokens = IMAGE + TEXT
    x, row = batch * tokens * WIDTH, batch * WIDTH
    angles = torch.rand(tokens, DIM // 2, device=DEVICE).repeat_interleave(2, dim=1)
    weight = torch.ones(DIM, device=DEVICE, dtype=DTYPE)
    stream = (batch, tokens, WIDTH)
    linear = [tensor.requires_grad_(False) for tensor in (draw(WIDTH, WIDTH), draw(WIDTH))]  # the base is frozen
    strengths = torch.rand(batch, device=DEVICE)
    wide = x + batch * tokens * HIDDEN
    return {
        "norm_rope": (
            [draw(batch, IMAGE, WIDTH), draw(batch, TEXT, WIDTH), weight, weight, angles.cos(), angles.sin(), HEADS],
            2 * x,
            3 * x,
        ),
        "modulate": ([draw(*stream), draw(batch, WIDTH), draw(batch, WIDTH)], 2 * x + 2 * row, 3 * x + 3 * row),
        "gate_residual": ([draw(*stream), draw(*stream), draw(batch, WIDTH)], 3 * x + row, 3 * x + 2 * row),
        "gated_modulate": (
            [draw(*stream), draw(*stream), *(draw(batch, WIDTH) for _ in range(3))], 4 * x + 3 * row, 6 * x + 6 * row,
        ),
        "gelu_concat": ([draw(*stream), draw(batch, tokens, HIDDEN)], 2 * wide, 3 * (wide - x)),
        "swiglu_concat": ([draw(*stream), draw(batch, tokens, 6 * WIDTH)], 11 * x, 15 * x),  # as FLUX.2 klein-4B
        "lora_linear": ([draw(*stream), *linear, draw(RANK, WIDTH), draw(WIDTH, RANK), strengths], 2 * x, 2 * x),
    }  # fmt: skip


def passes(function: Callable[..., Any], arguments: list[Any]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Two functions: the forward without gradients, and forward with backward."""
    with torch.no_grad():
        results = function(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    grads = [torch.randn_like(result) for result in results]

    def forward() -> None:
        with torch.no_grad():
            function(*arguments)

    def both() -> None:
        found = function(*arguments)
        torch.autograd.backward(found if isinstance(found, tuple) else (found,), grads)
        for argument in arguments:
            if isinstance(argument, Tensor):
                argument.grad = None

    return forward, both


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, "kernels", 20).parse_args(argv)
    bandwidth = copy_bandwidth()
    ours = {**vars(triton_ops()), "lora_linear": lora_linear}
    title = (
        f"fused operations, batch {arguments.batch}, {IMAGE} + {TEXT} tokens of {WIDTH}, {str(DTYPE)[6:]}; "
        f"a copy: {bandwidth / 1e9:.0f} GB/s"
    )
    rows: list[dict[str, Any]] = []
    width = torch.finfo(DTYPE).bits // 8
    for name, (inputs, forward_elements, backward_elements) in cases(arguments.batch).items():
        if rows and time.monotonic() > STARTED + arguments.seconds:
            break
        plain = getattr(reference, f"{name}_reference")
        functions = {"reference: eager": plain, "ours": ours[name]}
        if GPU and not NULL:
            functions["reference: compiled"] = torch.compile(plain, dynamic=False)
        arms = {arm: passes(function, inputs) for arm, function in functions.items()}
        for number, (kind, elements) in enumerate(
            (("forward", forward_elements), ("forward + backward", forward_elements + backward_elements))
        ):
            seconds = measure({arm: pair[number] for arm, pair in arms.items()}, arguments.repeats)
            floor = None if name == "lora_linear" else at_least(0.0, width * elements)
            rows += [
                {
                    "kernel": name,
                    "pass": kind,
                    "arm": arm,
                    "microseconds": 1e6 * spent,
                    "at_least_us": None if floor is None else 1e6 * floor,
                    "of_copy": None if name == "lora_linear" else width * elements / spent / bandwidth,
                    "x_reference": seconds["reference: eager"] / spent,
                    "goal": "80% of a copy, 5 x eager, not slower than compiled" if arm == "ours" else None,
                }
                for arm, spent in seconds.items()
            ]
        save(title, rows, COLUMNS, arguments.json)
    report(title, rows, COLUMNS, arguments.json)


if __name__ == "__main__":
    main()
