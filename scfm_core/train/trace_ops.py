"""What is known of the operators of a traced step: their kind, and what they read, write and launch."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

BASE, ADAPTER, ATTENTION = "base GEMM", "adapter GEMM", "attention"
FUSED, ELEMENTWISE, COMPILED = "fused kernels", "elementwise", "elementwise, compiled"
OPTIMIZER, SHARDING = "optimizer, EMA", "copies of weights"
GROUPS = (BASE, ADAPTER, ATTENTION, FUSED, ELEMENTWISE, COMPILED, OPTIMIZER, SHARDING)
"""The groups of operators."""

PASSES = ("near", "far", "flow map", "teacher", "teacher's score", "fake score", "student", "backward")
"""Phases of a micro-batch."""
UPDATES = ("reduce", "adam", "ema")
"""Phases after the last micro-batch."""

_PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::convolution",
    "aten::convolution_backward",
    "aten::_scaled_mm",
}
_BATCHED = {"aten::bmm", "aten::baddbmm"}
_ATTENTION = ("scaled_dot_product", "_attention_forward", "_attention_backward")
_NO_KERNEL = {
    "aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::detach", "aten::detach_", "aten::lift_fresh", "aten::alias", "aten::set_", "aten::resize_", "aten::is_same_size",
    "aten::_local_scalar_dense", "aten::record_stream", "aten::requires_grad_",
}  # fmt: skip
_WRITE_ONLY = {"aten::zero_", "aten::fill_", "aten::zeros", "aten::ones", "aten::full", "aten::arange", "aten::zeros_like",
    "aten::ones_like", "aten::new_zeros", "aten::new_ones", "aten::full_like", "aten::new_full", "aten::scalar_tensor"}  # fmt: skip
_CHANGE_SHAPES = {
    f"aten::{name}_"
    for name in ("resize", "resize_as", "set", "detach", "t", "transpose", "squeeze", "unsqueeze", "as_strided")
}
_MOST_TENSORS = (110, 64, 48, 36, 30)
"""Tensors of one launch of a multi-tensor kernel with 1, 2, ... lists (ATen/native/cuda/MultiTensorApply.cuh)."""
_CHUNK, _MOST_CHUNKS = 65536, 320
"""Elements of one block of such a kernel, and blocks of one launch."""


@dataclass(frozen=True)
class Operation:
    """Equal calls of one operator: of one phase, and with equal bytes and FLOPs. Numbers are sums over the calls."""

    phase: str
    """Of the step: one of `PASSES` or `UPDATES`, or another name."""
    group: str
    """One of `GROUPS`."""
    op: str
    """Name of the operator, as `aten::mm`; of a Triton kernel, `triton::` and its name."""
    calls: int
    launches: float
    """Kernels, estimated: one a call, but for operators on lists of tensors and the backward of attention."""
    bytes: float
    """Read and written."""
    flops: float
    """A multiply-add counts as two."""


@dataclass(frozen=True)
class About:
    """What is known of an operator without its arguments."""

    name: str
    is_view: bool
    has_no_kernel: bool
    writes_only: bool
    is_composite: bool
    is_mutable: bool
    is_in_place: bool
    """Whether it changes the values of its first argument, and nothing else."""
    is_multi_tensor: bool
    is_sharding: bool
    is_collective: bool
    may_be_known: bool
    """Whether its results and costs depend on the shapes of its arguments alone, and are new tensors."""
    flops: Callable[..., float] | None
    body: Callable[..., Any] | None


@functools.cache
def about_operator(func: Any) -> About:
    """What is known of an operator, an `OpOverload`."""
    name = func._schema.name
    has_alias = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    is_composite = (
        func.namespace == "aten"
        and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        and name not in ("aten::detach", "aten::_fused_rms_norm")
    )
    body = None
    if func.namespace == "scfm":
        from torch._library.custom_ops import OPDEFS

        body = OPDEFS[name]._init_fn if name in OPDEFS else None
    return About(
        name=name,
        is_view=has_alias and not is_composite and func.namespace in ("aten", "prim"),
        has_no_kernel=name in _NO_KERNEL or func.namespace in ("prim", "c10d", "profiler"),
        writes_only=name in _WRITE_ONLY,
        is_composite=is_composite,
        is_mutable=func._schema.is_mutable,
        is_in_place=func.namespace == "aten"
        and name.endswith("_")
        and "_foreach_" not in name
        and func._schema.is_mutable
        and name not in _CHANGE_SHAPES,
        is_multi_tensor="_foreach_" in name or "_fused_adam" in name,
        is_sharding=func.namespace == "fsdp" or name in ("aten::split_with_sizes_copy", "aten::_chunk_cat"),
        is_collective=func.namespace == "c10d",
        may_be_known=func.namespace == "aten" and not func._schema.is_mutable and not has_alias,
        flops=_attention_flops(name) if "_scaled_dot_product" in name else flop_registry.get(func._overloadpacket),
        body=body,
    )


def _attention_flops(name: str) -> Callable[..., float]:
    """PyTorch's own formula does not take fewer heads of keys than of queries. The backward computes the scores again: five products."""
    first, products = (1, 5) if "backward" in name else (0, 2)

    def flops(*args: Any, **_: Any) -> float:
        query, key, value = args[first : first + 3]
        return float(products * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]))

    return flops


def group_of(about: About, args: tuple, rank: int) -> str:
    """The group of an operator that is not on lists of tensors; `rank` is the adapters', or 0."""
    if about.name in _PRODUCTS:
        sizes = [size for arg in args[:3] if isinstance(arg, Tensor) and arg.dim() == 2 for size in arg.shape]
        narrow = min((size for size in sizes if size >= rank), default=0)
        return ADAPTER if rank and narrow % rank == 0 and narrow <= 8 * rank else BASE
    if about.name in _BATCHED or any(part in about.name for part in _ATTENTION):
        return ATTENTION
    return SHARDING if about.is_sharding else ELEMENTWISE


def touched(tensor: Tensor) -> float:
    """Bytes of a tensor's elements; those of an expanded axis once."""
    count = math.prod(size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return float(count * tensor.element_size())


def traffic(about: About, args: tuple, kwargs: dict, out: tuple) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a call reads, and those that it writes."""
    named = [value for name, value in kwargs.items() if name != "out"]  # `out` is only written
    inputs = [tensor for tensor in tensors_in((*args, *named)) if tensor.is_meta]
    distinct = {id(tensor): tensor for tensor in inputs}
    written = [
        tensor for tensor in tensors_in(out) if tensor.is_meta and (about.is_mutable or id(tensor) not in distinct)
    ]
    if about.writes_only:
        return [], written
    return inputs[1:2] if about.name == "aten::copy_" else list(distinct.values()), written


def known_by(*values: Any) -> Any:
    """What the results of an operator depend on; None if it is not known."""
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if isinstance(value, Tensor):
            if not value.is_meta:
                return None
            found.append((value.shape, value.stride(), value.dtype))
        elif kind in (tuple, list):
            inner = known_by(*value)
            if inner is None:
                return None
            found.append((kind, inner))
        elif kind is dict:
            inner = known_by(*value.values())
            if inner is None:
                return None
            found.append((*value, inner))
        else:
            found.append((kind, value))
    return tuple(found)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors of nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def multi_tensor(name: str, args: tuple) -> tuple[int, float, float]:
    """Launches, bytes and FLOPs of an operator on lists of tensors (ATen/native/cuda/MultiTensorApply.cuh)."""
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
    if "_fused_adam" in name:  # weights, gradients, both moments are read; all but the gradients are written
        lists = lists[:4]
        size = sum(touched(tensor) * (1 if place == 1 else 2) for place, group in enumerate(lists) for tensor in group)
    else:
        size = sum(touched(tensor) for group in lists for tensor in group)
        size += 0 if "norm" in name else sum(touched(tensor) for tensor in lists[0])
    depth = len(lists) + (not name.endswith("_"))
    most, launches, held, blocks = _MOST_TENSORS[min(depth, 5) - 1], 0, 0, 0
    for tensor in lists[0]:
        held += 1
        chunks = -(-tensor.numel() // _CHUNK)
        for chunk in range(chunks):
            blocks += 1
            is_last = chunk == chunks - 1
            if (held == most and is_last) or blocks == _MOST_CHUNKS:
                launches, blocks, held = launches + 1, 0, 0 if is_last else 1
    return launches + (blocks > 0), size, 0.0
