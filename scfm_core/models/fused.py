"""Fused operations for the networks of diffusers: other blocks around the same layers, and other attention processors.

Layers keep their names and weights, so checkpoints, adapters and exports do not change.
"""

from types import MethodType
from typing import Any

from torch import nn

from scfm_core.kernels.ops import Ops
from scfm_core.models.adapters import join
from scfm_core.models.fused_flux import (
    FusedAttnProcessor,
    FusedBlock,
    FusedDoubleBlock,
    FusedSingleBlock,
    joint_forward,
)
from scfm_core.models.fused_flux2 import FusedFlux2DoubleBlock, FusedFlux2SingleBlock, FusedParallelAttnProcessor

_FUSED: dict[str, tuple[type[FusedBlock], Any]] = {
    "FluxTransformerBlock": (FusedDoubleBlock, FusedAttnProcessor),
    "FluxSingleTransformerBlock": (FusedSingleBlock, FusedAttnProcessor),
    "Flux2TransformerBlock": (FusedFlux2DoubleBlock, FusedAttnProcessor),
    "Flux2SingleTransformerBlock": (FusedFlux2SingleBlock, FusedParallelAttnProcessor),
}
"""diffusers' blocks by class name, and what replaces them and their attention processors."""


def fuse(network: nn.Module, ops: Ops, attention_backend: str, *, blocks: bool = True) -> None:
    """Change a network, adapted or not, in place.

    Args:
        network: with diffusers' own blocks, of the kinds in `_FUSED`.
        ops: the operations that the fused modules call.
        attention_backend: one of `scfm_core.kernels.attention.BACKENDS`.
        blocks: also replace the blocks; else only the attention processors.
    """
    for stack in (network.transformer_blocks, network.single_transformer_blocks):
        assert isinstance(stack, nn.ModuleList)
        for number, block in enumerate(stack):
            fused, processor = _FUSED[type(block).__name__]
            block.attn.set_processor(processor(ops, attention_backend))  # type: ignore[operator, union-attr]
            if blocks:
                stack[number] = replacement = fused(block, ops)
                for layers in replacement.joined():
                    join(layers)
    if blocks and type(network).__name__ == "FluxTransformer2DModel":
        network.forward = MethodType(joint_forward, network)  # type: ignore[method-assign]
