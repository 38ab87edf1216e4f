"""Changes to a network's blocks for training: activation checkpointing and compilation."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from scfm_core import kernels
from scfm_core.progress import beat

# Results that selective checkpointing saves: matrix products and attention. The rest of a block is elementwise and cheap.
_SAVED = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "scfm::lora_linear",
    "scfm::lora_linears",
    "scfm::lora_add",
    "scfm::quantised_linear",
    "scfm::flash_attention",
    "scfm::flash4_attention",
}
_SAVED_LIBRARIES = {"xformers", "xformers_flash", "xformers_flash3", "flash_attn_3"}  # all of their ops are attention


def set_activation_checkpointing(blocks: Sequence[nn.Module], mode: str) -> None:
    """Recompute each block of a network in the backward pass.

    The checkpoint is inside the block's forward, not around the block as in diffusers: there a compiled block would run
    eagerly under a selective checkpoint.

    Args:
        blocks: changed in place.
        mode: `none`, `selective` (matrix products and attention are saved) or `full`.
    """
    if mode == "none":
        return
    forward = {"selective": _forward_selective, "full": _forward_full}[mode]
    for block in blocks:
        block.forward = MethodType(forward, block)  # type: ignore[method-assign]


# Plain functions of the block, without closures: torch.compile shares their code between blocks.
def _forward_full(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return type(block).forward(block, *args, **kwargs)
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)


def _forward_selective(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return type(block).forward(block, *args, **kwargs)
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, context_fn=_selective_contexts, **kwargs)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_save_expensive_results)


def _save_expensive_results(context: object, op: object, *_: object, **__: object) -> CheckpointPolicy:
    expensive = isinstance(op, torch._ops.OpOverload) and (op.name() in _SAVED or op.namespace in _SAVED_LIBRARIES)
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """`torch.compile` on every block of a network: one graph for each kind of block, shared by all blocks of that kind."""
    # Graphs of one function: two kinds of block x (student, fake score, EMAs, no adapter) x (all, some or one of the rows); with
    # diffusers' blocks also x (strides of the first and of later blocks). Above the limit, 8 by default, dynamo runs eagerly.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    torch.compiler.config.cache_key_tag = torch.compiler.config.cache_key_tag or _kernels_tag()
    from torch._dynamo.callback import callback_handler  # it loads all of dynamo

    if _compiling not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_compiling)
        callback_handler.register_end_callback(_compiling)
    for block in blocks:
        block.compile()


def _kernels_tag() -> str:
    """A hash of our operations. PyTorch's cache on the disk finds a backward graph by the forward graph alone, so it would return one
    with operations as they were before an update."""
    sources = sorted(Path(kernels.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def _compiling(_: object) -> None:
    """Dynamo compiles the graph of a block: minutes in which a rank is slow but not lost."""
    beat()
