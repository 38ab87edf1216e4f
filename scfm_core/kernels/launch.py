"""Where the Triton kernels can run, and helpers of all launches.

Every kernel is a `torch.library.custom_op` with a fake implementation and an autograd formula, so `torch.compile` and
activation checkpointing see it as one node. A `triton_op` would show the kernel to inductor, which has nothing to fuse
into it. A `triton_op` also cannot run in Triton's interpreter, so the tests would not run the code that a GPU runs.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Of a matrix product (`lora_gemm`): rows and columns of the result that a program owns, elements that it reads of each at a time, launch options."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: on any device, but slowly (TRITON_INTERPRET=1 at import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_no_triton(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`; None if they can."""
    if is_interpreted():
        return None
    if device.type != "cuda":
        return f"Triton kernels need a GPU, this is a {device.type.upper()}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"the kernels need compute capability 8.0 (A100), {torch.cuda.get_device_name(device)} has less"
    return None


def compute_type(tensor: Tensor) -> Any:
    """Triton's type for the arithmetic: fp32; for fp64 inputs fp64, so that tests can check gradients numerically."""
    import triton.language as tl

    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def accumulator(tensor: Tensor) -> torch.dtype:
    """The torch dtype of `compute_type`."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def dense_rows(tensor: Tensor) -> Tensor:
    """`tensor` with a contiguous last dimension; it is copied only if that dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def heads_first(shape: torch.Size) -> tuple[int, int, int, int]:
    """[B, S, H, D] -> [B, H, S, D], the order of torch's formulas of attention's FLOPs."""
    batch, tokens, heads, dim = shape
    return batch, heads, tokens, dim


def save_attention(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    """The `setup_context` of an operation of attention whose second result, the denominators, only its backward uses."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)
