"""What a GPU would do in a step, recorded while the step runs on meta tensors: operators, bytes, FLOPs, collectives, memory."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from scfm_core.train.trace_memory import Memory
from scfm_core.train.trace_ops import (
    ATTENTION,
    BASE,
    COMPILED,
    ELEMENTWISE,
    FUSED,
    OPTIMIZER,
    PASSES,
    SHARDING,
    UPDATES,
    About,
    Operation,
    about_operator,
    group_of,
    known_by,
    multi_tensor,
    tensors_in,
    touched,
    traffic,
)

_Cost = tuple[str, int, float, float]
"""Group, launches, bytes and FLOPs of a call."""


class Recorder(TorchDispatchMode):
    """Runs operators on meta tensors, and records what they would do on a GPU.

    Operators of other devices run as they are. What would read a value on the host gives ones, and counts as a read.

    Args:
        rank: of the adapters; a product with an axis of some ranks is an adapter's. 0: there are none.
        compiled: model the elementwise operators of passes as regions that `torch.compile` fuses: each reads its inputs and writes
            what is used after it, once.
    """

    def __init__(self, *, rank: int = 0, compiled: bool = False) -> None:
        super().__init__()
        self.memory = Memory()
        self.phase = "load"
        self.is_on = False
        """Whether operators are recorded. Memory always is."""
        self.reads = 0
        """How often the host waited for a value."""
        self.collectives: dict[str, tuple[int, float]] = {}
        """Calls, and bytes of the larger side, by kind."""
        self._rank, self._compiled = rank, compiled
        self._calls: Counter[tuple[str, str, str, int, float, float]] = Counter()
        self._flops_within: list[float] = []
        self._results: dict[Any, tuple[list[tuple[Any, Any, torch.dtype]], bool, _Cost]] = {}
        self._region_reads: dict[tuple[int, int], float] = {}
        self._region_writes: dict[tuple[int, int], float] = {}

    def operators(self) -> list[Operation]:
        """All recorded calls."""
        self._end_region()
        return [
            Operation(phase, group, op, calls, calls * launches, calls * size, calls * flops)
            for (phase, group, op, launches, size, flops), calls in self._calls.items()
        ]

    @contextlib.contextmanager
    def within(self, phase: str, part: str | None = None) -> Iterator[None]:
        """A phase of the step; `part` is the part of memory that is allocated in it."""
        self._end_region()
        before = self.phase, self.memory.part
        self.phase, self.memory.part = phase, part or self.memory.part
        try:
            yield
        finally:
            self._end_region()
            self.phase, self.memory.part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented  # it calls the operators on its shard
        about = about_operator(func)
        if about.is_view:
            return func(*args, **kwargs)
        instead = _INSTEAD.get(about.name)
        if instead is not None and (found := instead(self, func, args, kwargs)) is not NotImplemented:
            return found
        if about.is_collective and self.is_on:
            self._add_collective(about.name, args)
        if about.body is not None:
            return self._run_body(func, about, args, kwargs)
        if about.is_composite:
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if about.may_be_known and (key := known_by(func, args, kwargs)) is not None:
            out, (group, launches, size, flops) = self._known(key, func, about, args, kwargs)
            if self.is_on and launches:
                self._record(about, group, launches, size, flops, args, kwargs, (out,))
            return out
        if about.is_in_place and args[0].is_meta:
            out = args[0]  # nothing changes on the meta device
        else:
            out = func(*args, **kwargs)
            for tensor in tensors_in((out,)):
                if tensor.is_meta:
                    self.memory.see(tensor)
        if (
            self.is_on
            and not about.has_no_kernel
            and any(t.is_meta for t in tensors_in((*args, *kwargs.values(), out)))
        ):
            self._record(about, *self._cost(about, args, kwargs, out), args, kwargs, (out,))
        return out

    def _known(self, key: Any, func: Any, about: About, args: tuple, kwargs: dict) -> tuple[Any, _Cost]:
        """The new tensors and the cost of an operator. A second call with the same shapes does not run it: that takes a third of the time."""
        found = self._results.get(key)
        if found is None:
            out = func(*args, **kwargs)
            outputs = list(tensors_in((out,)))
            cost: _Cost = ("", 0, 0.0, 0.0)
            if not about.has_no_kernel and any(t.is_meta for t in (*outputs, *tensors_in((*args, *kwargs.values())))):
                cost = self._cost(about, args, kwargs, out)
            for tensor in outputs:
                self.memory.see(tensor)
            is_new = outputs and all(
                t.is_meta and t.untyped_storage().nbytes() <= t.numel() * t.itemsize for t in outputs
            )
            if is_new and (isinstance(out, Tensor) or (type(out) is tuple and len(out) == len(outputs))):
                described = [(tuple(t.shape), t.stride(), t.dtype) for t in outputs]
                self._results[key] = described, isinstance(out, Tensor), cost
            return out, cost
        described, is_single, cost = found
        made = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in described]
        for tensor in made:
            self.memory.see(tensor)
        return made[0] if is_single else tuple(made), cost

    def _run_body(self, func: Any, about: About, args: tuple, kwargs: dict) -> Any:
        """Run the Python of a custom operator; its Triton kernels are recorded, not launched."""
        self._flops_within.append(0.0)
        with self:
            out = about.body(*args, **kwargs)  # type: ignore[misc]
        counted = self._flops_within.pop()
        if about.flops is not None and not counted and self.is_on:
            self._add(
                ATTENTION if "attention" in about.name else BASE,
                about.name,
                0,
                0.0,
                about.flops(*args, **kwargs, out_val=out),
            )
        return out

    def launched(self, name: str, tensors: list[Tensor]) -> None:
        """A Triton kernel: its arguments are what it reads and writes."""
        if self.is_on:
            self._end_region()
            size = sum(touched(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())
            group = ATTENTION if ".flash." in name else FUSED
            self._add(group, name, 1, size, 0.0)

    def _cost(self, about: About, args: tuple, kwargs: dict, out: Any) -> _Cost:
        """Group, launches, bytes and FLOPs of a call."""
        if about.is_multi_tensor:
            return (OPTIMIZER, *multi_tensor(about.name, args))
        reads, written = traffic(about, args, kwargs, (out,))
        if about.name == "fsdp::all_gather_copy_in":  # it fills this rank's part of the output
            reads = written = args[0]
        flops = 0.0
        if about.flops is not None:
            flops = float(about.flops(*args, **kwargs, out_val=out))
        elif about.name == "aten::addmm_":
            flops = 2.0 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        group = group_of(about, args, self._rank)
        launches = 3 if group == ATTENTION and "backward" in about.name else 1
        return group, launches, sum(map(touched, reads)) + sum(map(touched, written)), flops

    def _record(
        self,
        about: About,
        group: str,
        launches: int,
        size: float,
        flops: float,
        args: tuple,
        kwargs: dict,
        out: tuple,
    ) -> None:
        if group in (ELEMENTWISE, OPTIMIZER):
            group = OPTIMIZER if self.phase in UPDATES else SHARDING if about.is_multi_tensor else ELEMENTWISE
        if group == ELEMENTWISE and self._compiled and self.phase in PASSES:
            reads, written = traffic(about, args, kwargs, out)
            for tensor in reads:
                self._region_reads.setdefault(self.memory.key_of(tensor), touched(tensor))
            for tensor in written:
                self._region_writes[self.memory.key_of(tensor)] = touched(tensor)
            return
        self._end_region()
        self._add(group, about.name, launches, size, flops)

    def _add(self, group: str, name: str, launches: int, size: float, flops: float) -> None:
        if self._flops_within:
            self._flops_within[-1] += flops
        self._calls[self.phase, group, name, launches, size, flops] += 1

    def _add_collective(self, name: str, args: tuple) -> None:
        kind = name.partition("::")[2].strip("_")
        size = max((float(tensor.nbytes) for tensor in tensors_in(args)), default=0.0)
        calls, total = self.collectives.get(kind, (0, 0.0))
        self.collectives[kind] = (calls + 1, total + size)

    def _end_region(self) -> None:
        """Record the elementwise operators since the last other one as one kernel."""
        if not self._region_reads and not self._region_writes:
            return
        reads = sum(size for key, size in self._region_reads.items() if key not in self._region_writes)
        writes = sum(size for key, size in self._region_writes.items() if self.memory.is_alive(*key))
        self._region_reads, self._region_writes = {}, {}
        if self.is_on:
            self._add(COMPILED, "compiled region", 1, reads + writes, 0.0)


def _scalar(recorder: Recorder, func: Any, args: tuple, kwargs: dict) -> Any:
    if not args[0].is_meta:
        return NotImplemented
    recorder.reads += recorder.is_on
    dtype = args[0].dtype
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


def _copied(recorder: Recorder, func: Any, args: tuple, kwargs: dict) -> Any:
    """A copy to the host: ones."""
    device = kwargs.get("device")
    if device is None or torch.device(device).type == "meta" or not args[0].is_meta:
        return NotImplemented
    recorder.reads += recorder.is_on
    return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=device)


def _copied_into(recorder: Recorder, func: Any, args: tuple, kwargs: dict) -> Any:
    if args[0].is_meta or not args[1].is_meta:
        return NotImplemented
    recorder.reads += recorder.is_on
    return args[0].fill_(1)


def _adam(recorder: Recorder, func: Any, args: tuple, kwargs: dict) -> Any:
    """The fused kernel of Adam has no implementation for the meta device."""
    if not args[0] or not args[0][0].is_meta:
        return NotImplemented
    if recorder.is_on:
        recorder._add(OPTIMIZER, func._schema.name, *multi_tensor(func._schema.name, args))
    return None


def _rms_norm(recorder: Recorder, func: Any, args: tuple, kwargs: dict) -> Any:
    """One kernel on a GPU; on the meta device PyTorch composes it of several."""
    x, shape, weight = args[0], args[1], args[2]
    if not x.is_meta:
        return NotImplemented
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    with recorder:
        out, rstd = (
            x.new_empty(x.shape, dtype=dtype),
            x.new_empty(*x.shape[: x.dim() - len(shape)], *[1] * len(shape), dtype=torch.float32),
        )
    if recorder.is_on:
        about = about_operator(func)
        recorder._record(about, *recorder._cost(about, args, kwargs, (out, rstd)), args, kwargs, (out, rstd))
    return out, rstd


_INSTEAD: dict[str, Callable[..., Any]] = {
    "aten::_local_scalar_dense": _scalar,
    "aten::_to_copy": _copied,
    "aten::copy_": _copied_into,
    "aten::_fused_adamw_": _adam,
    "aten::_fused_rms_norm": _rms_norm,
}
