"""Compiles every kernel for A100 and H100 exactly as the ops launch it, without a GPU.

Prints each kernel's registers, spilled bytes and shared memory. test_compilation.py runs it in a process without the
interpreter.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from scfm_core.kernels.concat import _activation_backward, gelu_concat, swiglu_concat
from scfm_core.kernels.flash import _flash, _flash_backward
from scfm_core.kernels.lora_gemm import TILES, lora_gemm
from scfm_core.kernels.modulate import (
    _gate_backward,
    _gated_backward,
    _gated_modulate,
    _modulate,
    _modulate_backward,
    gate_residual,
)
from scfm_core.kernels.nf4_unpack import unpack
from scfm_core.kernels.norm_rope import _backward as _norm_rope_backward
from scfm_core.kernels.norm_rope import norm_rope


class NoDevice:
    """The part of a driver that the compiler calls."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@functools.cache
def resources(kernel: Any) -> dict[str, int]:
    """Registers a thread, and bytes of local memory a thread (spills), as NVIDIA's tool reads them from the binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": kernel.metadata.shared}


def launch_all(dtype: torch.dtype, width: int, dim: int) -> None:
    """Every op once; compiled code does not depend on the number of rows."""
    heads, rows = width // dim, 16

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    x, row = tensor(2, rows, width), tensor(2, width)
    angles, weight = torch.empty(2 * rows, dim), tensor(dim)
    statistic = torch.empty(2, rows)
    joint = tensor(2, 2 * rows, heads, dim)
    norm_rope(x, x, weight, weight, angles, angles, heads, 1e-6)
    for weight_too in (False, True):
        _norm_rope_backward(joint, x, weight, angles, angles, rows, 1e-6, weight_too)
    _modulate(x, row, row, 1e-6)
    _gated_modulate(x, x, row, row, row, 1e-6)
    _modulate_backward(x, x, row, statistic, statistic)
    _gated_backward(x, x, x, x, row, row, statistic, statistic)
    gate_residual(x, x, row)
    _gate_backward(x, x, row)
    gelu_concat(x, tensor(2, rows, 4 * width))
    _activation_backward(tensor(2, rows, 4 * width), tensor(2, rows, 4 * width), False)
    unpack(torch.empty(rows, width // 2, dtype=torch.uint8), torch.empty(rows * width // 64), torch.empty(16), dtype)
    for attention in (x, None):
        swiglu_concat(attention, tensor(2, rows, 6 * width))
    _activation_backward(tensor(2, rows, 3 * width), tensor(2, rows, 6 * width), True)
    for tile in TILES:
        for weight in (tensor(width, width), tensor(width, width).T):  # as in the backward, and in the forward
            lora_gemm(x[0], weight, tensor(rows, 64), tensor(64, width), row[0], tile)
    for keys in (128, 133):
        query, key = tensor(2, keys, heads, dim), tensor(2, keys, heads, dim)
        _flash(query, key, key)
        _flash_backward(query, query, key, key, query, torch.empty(2, heads, keys))


def main() -> None:
    compiled: dict[int, Any] = {}
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        result = run(kernel, *args, grid=grid, warmup=True, **options)
        compiled[id(result)] = (kernel.fn.__module__.rpartition(".")[2] + "." + kernel.fn.__name__, result)
        return result

    JITFunction.run = compile_only
    # The widths of Flux.1 (FLUX.2 klein's are compiled to the same code) and of FLUX.2-dev.
    cases = [(torch.bfloat16, 3072, 64), (torch.bfloat16, 3072, 128), (torch.bfloat16, 6144, 128)]
    cases += [(torch.float32, 3072, 128)]
    for capability in (80, 90):
        triton.runtime.driver.set_active(NoDevice(capability))
        for dtype, width, dim in cases if capability == 80 else cases[:3]:  # fp32 is compiled once
            compiled.clear()
            launch_all(dtype, width, dim)
            for name, kernel in compiled.values():
                row = {"kernel": name, "capability": capability, "dtype": str(dtype), "width": width, "dim": dim}
                print(json.dumps(row | resources(kernel)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
