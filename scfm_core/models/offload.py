"""Blocks of a frozen network whose weights are in host memory, and on the GPU only while a block runs.

Two slots on the GPU, each as large as the largest of these blocks, take their weights in turn: while one block computes, the next
one is copied into the other slot, in the opposite order in the backward pass. A weight is a view of its slot, so its address is
always the same, and what autograd or a compiled graph has saved of it is right again when the block's backward pass begins.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from scfm_core.errors import UserError
from scfm_core.models.quantised import Base, saved_bytes

_ALIGNMENT = 256
"""Bytes; kernels assume that tensors start at such addresses."""
_PAGE = 4096
"""Bytes."""


def spread(blocks: Sequence[nn.Module], number: int) -> list[nn.Module]:
    """`number` of the blocks, evenly spaced: so the blocks between them give the copies time."""
    return [blocks[place * len(blocks) // number] for place in range(number)]


def offloaded_bytes(
    network: nn.Module, blocks: Sequence[nn.Module], number: int, base: Base, width: int
) -> tuple[int, int]:
    """Bytes in host memory, and of the two slots, if `number` of a network's blocks are offloaded; it may be on the meta device.

    Args:
        network, blocks: not quantised.
        number: see `spread`.
        base: how the blocks are stored.
        width: bytes of an element that is not packed.
    """
    chosen = spread(blocks, number)
    saved = saved_bytes(network, chosen, base, width)
    sizes = [
        width * sum(tensors[key].numel() for tensors, key in _frozen(block))
        - sum(saved.get(module, 0) for module in block.modules())
        for block in chosen
    ]
    return sum(sizes), 2 * max(sizes, default=0)


def fill_on_host(blocks: Sequence[nn.Module]) -> None:
    """Make `scfm_core.filling.materialise` move the frozen weights of these blocks to host memory, one module after the other."""
    for block in blocks:
        for module in _without_adapters(block):
            module.filled_on = "cpu"  # type: ignore[assignment]


class Offload:
    """Keeps the frozen weights of blocks in host memory, pinned if the device is a GPU.

    Args:
        blocks: in the order in which they run; at least two. They are changed in place, and may be compiled.
        device: where they compute. On the meta device there is no copy in host memory.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        frozen = [_frozen(block) for block in blocks]
        sizes = [sum(_padded(tensors[name]) for tensors, name in weights) for weights in frozen]
        self._slots = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        # Writes through these do not count as changes of the views that autograd has saved.
        self._targets = [slot.data for slot in self._slots]
        self._holds: list[int | None] = [None, None]
        """The block whose weights are in each slot, or on their way."""
        self._host = [self._move(*block, self._slots[n % 2]) for n, block in enumerate(zip(frozen, sizes, strict=True))]
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrived: list[Any] = [None, None]
        for number, block in enumerate(blocks):
            self._wrap(number, block)

    @staticmethod
    def _move(weights: list[tuple[dict[str, Any], str]], size: int, slot: Tensor) -> Tensor | None:
        """Copy a block's weights to host memory, `size` bytes, and replace them by views of its slot."""
        host = None if slot.is_meta else _host_memory(size, pinned=slot.is_cuda)
        start = 0
        for tensors, name in weights:
            weight = tensors[name]
            stop = start + weight.nbytes
            if host is not None:
                host[start:stop].copy_(weight.detach().reshape(-1).view(torch.uint8))
            view = slot[start:stop].view(weight.dtype).view(weight.shape)
            tensors[name] = nn.Parameter(view, requires_grad=False) if isinstance(weight, nn.Parameter) else view
            start += _padded(weight)
        return host

    def _wrap(self, number: int, block: nn.Module) -> None:
        # What `nn.Module.__call__` calls: outside of the graph that `compile` made.
        inner = block._compiled_call_impl or block._call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            has_backward, is_last = torch.is_grad_enabled(), number == len(self._host) - 1
            self.fetch(number, number if is_last and has_backward else number + 1)
            output = inner(*args, **kwargs)
            if not has_backward:
                return output
            return tree_map_only(Tensor, lambda tensor: _BeforeBackward.apply(tensor, self, number), output)

        block._compiled_call_impl = call  # type: ignore[assignment]

    def fetch(self, number: int, following: int) -> None:
        """Before block `number` runs: its weights are in its slot for what comes next on the current stream. Start to copy those of
        `following`, the block that runs after it; the first one follows the last.
        """
        self._copy(number)
        if (arrived := self._arrived[number % 2]) is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        following %= len(self._host)
        if following % 2 != number % 2:
            self._copy(following)

    def _copy(self, number: int) -> None:
        slot, host = number % 2, self._host[number]
        if self._holds[slot] == number or host is None:
            return
        self._holds[slot] = number
        target = self._targets[slot][: len(host)]
        if self._stream is None:
            target.copy_(host)
            return
        # After the last block that used the slot: all of its kernels are on the current stream already.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(host, non_blocking=True)
            self._arrived[slot] = self._stream.record_event()


class _BeforeBackward(torch.autograd.Function):
    """The identity; its backward fetches the block's weights."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, offload: Offload, number: int) -> Tensor:  # type: ignore[override]
        ctx.offload, ctx.number = offload, number
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.offload.fetch(ctx.number, max(0, ctx.number - 1))
        return grad, None, None


def _frozen(block: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a block has its parameters and buffers that never change: not those of adapters."""
    return [
        (tensors, key)
        for module in _without_adapters(block)
        for tensors in (module._parameters, module._buffers)
        for key, tensor in tensors.items()
        if tensor is not None
    ]


def _without_adapters(block: nn.Module) -> list[nn.Module]:
    return [module for name, module in block.named_modules() if not {"lora_A", "lora_B"} & set(name.split("."))]


def _host_memory(size: int, *, pinned: bool) -> Tensor:
    """uint8 [size]. PyTorch's own pinned memory would take up to twice as much: it is rounded up to a power of two.

    Raises:
        UserError: if the system pins no memory.
    """
    if not pinned:
        return torch.empty(size, dtype=torch.uint8)
    pages = -(-size // _PAGE)
    whole = torch.empty((pages + 1) * _PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % _PAGE  # whole pages are pinned, so two blocks must not share one
    address = whole.data_ptr() + start
    try:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, pages * _PAGE, 0))
    except RuntimeError as error:
        raise UserError(
            f"model.offload_blocks: {size / 2**20:.0f} MiB of host memory cannot be pinned ({error}). Free host memory, raise its limit "
            f"(`ulimit -l`; WSL2 allows half of it), or offload fewer blocks"
        ) from error
    weakref.finalize(whole.untyped_storage(), _unpin, address)  # else memory at this address could not be pinned again
    return whole[start : start + size]


def _unpin(address: int) -> None:
    torch.cuda.synchronize()  # a copy from it may not have ended
    torch.cuda.cudart().cudaHostUnregister(address)


def _padded(weight: Tensor) -> int:
    return -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
