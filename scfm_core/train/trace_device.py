"""The meta device in the role of a GPU: attention, autocast, streams and collectives as PyTorch has them for CUDA.

Without these, a step on the meta device would take other operators than on a GPU: attention composed of products, no autocast, norms
tensor by tensor. Everything here holds within `as_gpu` alone.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.overrides import TorchFunctionMode

from scfm_core.distributed.world import World
from scfm_core.train.trace_memory import Memory
from scfm_core.train.trace_mode import Recorder
from scfm_core.train.trace_ops import tensors_in

_IN_COMPUTE_DTYPE = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.einsum,
    torch.baddbmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__,
}  # fmt: skip
_IN_FP32 = {
    F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, torch.exp, Tensor.exp, torch.log, Tensor.log, torch.rsqrt,
    Tensor.rsqrt, torch.pow, Tensor.pow, Tensor.__pow__, F.softplus, F.mse_loss, torch.cumsum, Tensor.cumsum, torch.sum, Tensor.sum,
    torch.layer_norm,
}  # fmt: skip
"""Functions that CUDA's autocast runs in the compute dtype, and in fp32: those of torch/include/ATen/autocast_mode.h that networks use."""


class GpuFunctions(TorchFunctionMode):
    """Above autograd: attention takes a fused kernel, and `autocast` works, though the meta device has none."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None
        """Of autocast; None: there is none."""
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}
        """Weights with gradient that were cast, as autocast keeps them."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            with self:  # also for what it recomputes
                return torch.autograd.backward(args[0], kwargs.get("gradient"))
        if self.dtype is not None and (func in _IN_COMPUTE_DTYPE or func in _IN_FP32):
            cast = self._narrow if func in _IN_COMPUTE_DTYPE else _widen
            args, kwargs = _map(cast, args), {name: _map(cast, value) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention and (args[0] if args else kwargs["query"]).is_meta:
            return _attention(*args, **kwargs)
        if func is F.rms_norm and (args[0] if args else kwargs["input"]).is_meta:
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def autocast(self, dtype: torch.dtype | None) -> Iterator[None]:
        """What `torch.autocast` would do on a GPU."""
        before, self.dtype = self.dtype, dtype
        try:
            yield
        finally:
            self.dtype = before
            if before is None:
                self.forget_casts()

    def forget_casts(self) -> None:
        """As `torch.clear_autocast_cache`."""
        self._casts.clear()

    def _narrow(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta or value.dtype != torch.float32:
            return value
        if not (value.requires_grad and value.is_leaf and torch.is_grad_enabled()):
            return value.to(self.dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = value, value.to(self.dtype)
        return self._casts[id(value)][1]


def _widen(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and value.is_meta and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_narrow else value


def _map(cast: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(map(cast, value)) if type(value) in (tuple, list) else cast(value)


def _rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _RmsNorm.apply(input, list(normalized_shape), weight, eps)  # type: ignore[no-any-return, no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    """PyTorch's `rms_norm` on a GPU: it saves its input and a number for each row. On the meta device it saves several tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None) -> Tensor:
        out, rstd = torch.ops.aten._fused_rms_norm(x, normalized_shape, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.shape = normalized_shape
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], weight is not None and ctx.needs_input_grad[2]]
        of_x, of_weight = torch.ops.aten._fused_rms_norm_backward(grad, x, ctx.shape, rstd, weight, needs)
        return of_x, None, of_weight if needs[1] else None, None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """PyTorch's `scaled_dot_product_attention` on a GPU, by the first allowed backend that takes the inputs."""
    allowed = {str(backend) for backend in _cur_sdpa_kernel_backends()}
    aten, dim = torch.ops.aten, query.shape[-1]
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if str(SDPBackend.FLASH_ATTENTION) in allowed and is_half and attn_mask is None and dim <= 256:
        padded = [F.pad(x, (0, -dim % 8)) if dim % 8 else x for x in (query, key, value)]
        out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, scale=scale or dim**-0.5)[0]
        return out[..., :dim] if dim % 8 else out
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    bias = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                attn_mask.logical_not(), float("-inf")
            )
        if attn_mask.shape[-1] % 16:  # the kernels load aligned rows
            attn_mask = F.pad(attn_mask, (0, -attn_mask.shape[-1] % 16))[..., : key.shape[-2]]
        bias = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if str(SDPBackend.CUDNN_ATTENTION) in allowed and is_half and dim % 8 == 0 and dim <= 256:
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale
        )[0]
    if str(SDPBackend.EFFICIENT_ATTENTION) in allowed and query.shape[1] == key.shape[1]:
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale
        )[0]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class _Stream:
    """A stream of a GPU. What is allocated on it comes from its own part of the allocator."""

    def __init__(self, priority: int = 0) -> None:
        self.number = _Streams.made = _Streams.made + 1

    def wait_stream(self, stream: Any) -> None:
        """Nothing runs."""

    wait_event = synchronize = wait_stream

    def record_event(self, event: Any = None) -> "_Event":
        return _Event()


class _Event:
    def record(self, stream: Any = None) -> "_Event":
        return self

    wait = record

    def synchronize(self) -> None:
        """Nothing runs."""

    def query(self) -> bool:
        return True


class _Streams(ModuleType):
    """What `torch.cuda` is for CUDA, as far as FSDP2 uses it."""

    made = 0
    Stream, Event = _Stream, _Event

    def __init__(self, memory: Memory) -> None:
        super().__init__("torch.meta")
        self._memory, self._current = memory, _Stream()
        memory.stream = self._current.number

    def current_stream(self, device: Any = None) -> _Stream:
        return self._current

    @contextlib.contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        self._memory.stream = stream.number
        try:
            yield
        finally:
            self._current = before
            self._memory.stream = before.number

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def set_device(self, device: Any) -> None:
        """There is one."""


class FakeWorld(World):
    """Rank 0 of several processes that do not exist: each has the same values."""

    def gather(self, value: Any) -> list[Any]:
        """See `World`."""
        return [value] * self.size

    def from_main(self, value: Any) -> Any:
        """See `World`."""
        return value

    def second_group(self) -> World:
        """See `World`."""
        return self


@contextlib.contextmanager
def as_gpu(recorder: Recorder) -> Iterator[GpuFunctions]:
    """Within, the meta device behaves as a GPU. `recorder` learns of Triton's launches, and of storages that FSDP2 resizes."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

    memory, functions, resize = recorder.memory, GpuFunctions(), torch.UntypedStorage.resize_

    def resized(storage: Any, size: int) -> Any:
        result = resize(storage, size)
        memory.resized(storage, size)
        return result

    def autocast(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **options: Any) -> Any:
        if device_type != "meta":
            return real_autocast(device_type, dtype=dtype, enabled=enabled, **options)
        return functions.autocast((dtype or torch.bfloat16) if enabled else None)

    real_autocast = torch.autocast
    replacements: list[tuple[Any, str, Any]] = [
        (torch, "meta", _Streams(memory)),
        (torch, "autocast", autocast),
        (torch, "clear_autocast_cache", functions.forget_casts),
        (torch.UntypedStorage, "resize_", resized),
        (fsdp.FSDPParamGroup, "_validate_no_meta_params", lambda group: None),
        (fsdp.FSDPParamGroup, "post_backward", _with_named_gradients(fsdp.FSDPParamGroup.post_backward, memory)),
        (fsdp, "foreach_all_gather", memory.naming("gathered weights", fsdp.foreach_all_gather)),
        (fsdp, "foreach_all_gather_copy_out", memory.naming("gathered weights", fsdp.foreach_all_gather_copy_out)),
        (fsdp, "foreach_reduce", memory.naming("reduce buffers", fsdp.foreach_reduce)),
    ]
    for module in map(importlib.import_module, ("torch.utils._foreach_utils", "torch.optim.optimizer")):
        for kind in ("foreach", "fused"):
            replacements += [(module, f"_get_{kind}_kernels_supported_devices", lambda: ["meta", "cuda", "cpu"])]
    replacements += [(kernel, "run", _recorded_launch(recorder)) for kernel in _triton_kernels()]
    with contextlib.ExitStack() as stack:
        for target, name, value in replacements:
            stack.enter_context(_replaced(target, name, value))
        stack.enter_context(functions)
        yield functions


def _triton_kernels() -> list[type]:
    """The classes of kernels, which launch themselves."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:  # then no kernel is launched
        return []
    return [JITFunction, InterpretedFunction]


def _recorded_launch(recorder: Recorder) -> Callable[..., None]:
    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        name = f"triton::{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        recorder.launched(name, list(tensors_in((*args, *kwargs.values()))))

    return run


def _with_named_gradients(post_backward: Callable[..., None], memory: Memory) -> Callable[..., None]:
    """FSDP2's reduction of a unit's gradients, which names their storages."""

    def call(group: Any, *args: Any) -> None:
        for parameter in group.fsdp_params:
            if hasattr(parameter, "_unsharded_param"):
                memory.label(parameter._unsharded_param.grad, "unsharded gradients")
        post_backward(group, *args)
        for parameter in group.fsdp_params:
            gradient = parameter.sharded_param.grad
            memory.label(None if gradient is None else gradient._local_tensor, "gradients")

    return call


@contextlib.contextmanager
def _replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = getattr(target, name, missing)
    setattr(target, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(target, name)
        else:
            setattr(target, name, before)


@contextlib.contextmanager
def fake_world(size: int) -> Iterator[World]:
    """Rank 0 of `size` processes, with PyTorch's process group that communicates with nobody."""
    if size == 1:
        yield World()
        return
    from torch.distributed._tools import fake_collectives  # noqa: F401  (collectives of tensors on the meta device)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield FakeWorld(0, size, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
