"""The fused operations of a transformer block in one table: as Triton kernels, or in plain PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from scfm_core.kernels.reference import (
    gate_residual_reference,
    gated_modulate_reference,
    gelu_concat_reference,
    modulate_reference,
    norm_rope_reference,
    swiglu_concat_reference,
)


@dataclass(frozen=True)
class Ops:
    """The operations that a fused block calls. See the functions in `triton_ops` for shapes and formulas."""

    norm_rope: Callable[..., Tensor]
    modulate: Callable[..., Tensor]
    gate_residual: Callable[..., Tensor]
    gated_modulate: Callable[..., tuple[Tensor, Tensor]]
    gelu_concat: Callable[..., Tensor]
    swiglu_concat: Callable[..., Tensor]


def triton_ops() -> Ops:
    """The Triton kernels; imports Triton."""
    from scfm_core.kernels.concat import gelu_concat, swiglu_concat
    from scfm_core.kernels.modulate import gate_residual, gated_modulate, modulate
    from scfm_core.kernels.norm_rope import norm_rope

    return Ops(norm_rope, modulate, gate_residual, gated_modulate, gelu_concat, swiglu_concat)


REFERENCE = Ops(
    norm_rope_reference,
    modulate_reference,
    gate_residual_reference,
    gated_modulate_reference,
    gelu_concat_reference,
    swiglu_concat_reference,
)
"""Plain PyTorch."""
