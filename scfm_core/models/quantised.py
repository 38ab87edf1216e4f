"""Networks whose frozen linears are quantised (`scfm_core.kernels.quantised`)."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from scfm_core.filling import PackedModule
from scfm_core.kernels.nf4 import fits_nf4
from scfm_core.kernels.quantised import Packing, quantise, quantised_linear, quantised_lora_linear

Base = Literal["bfloat16", "float8", "int8", "nf4"]
"""How a frozen network is stored. `bfloat16`: not quantised, in its own dtype."""


class QuantisedLinear(PackedModule):
    """A frozen linear. Its weight, `weight` [out, in], is replaced by `values` and `scale` in `pack`.

    These are buffers that no state dict has: a network's names and checkpoints do not depend on quantisation.

    Args:
        linear: on any device; on the meta device its weight is filled later.
        packing: type of the packed weight.
    """

    values: Tensor
    """See `scfm_core.kernels.quantised.quantise`."""
    scale: Tensor

    def __init__(self, linear: nn.Linear, packing: Packing) -> None:
        super().__init__()
        self.in_features, self.out_features, self.packing = linear.in_features, linear.out_features, packing
        self.weight: nn.Parameter | None = linear.weight
        self.bias = linear.bias

    @torch.no_grad()
    def pack(self) -> None:
        """See `PackedModule`."""
        assert self.weight is not None
        values, scale = quantise(self.weight, self.packing)
        self.weight = None
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + bias`, [..., out] in the dtype of `x`."""
        return quantised_linear(x, self.values, self.scale, self.bias)

    def with_adapter(self, x: Tensor, down: Tensor, up: Tensor, strength: Tensor) -> Tensor:
        """See `scfm_core.kernels.lora.lora_linear`."""
        return quantised_lora_linear(x, self.values, self.scale, self.bias, down, up, strength)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.packing}"


def quantise_linears(network: nn.Module, parts: Iterable[nn.Module], base: Base, rows: Mapping[str, int]) -> None:
    """Replace the frozen linears within `parts` of a network, adapted or not, by `QuantisedLinear`s that are not packed yet.

    With nf4, linears with one input row for a sample (the modulations) get int8: their rounding error affects every token, and
    they are a third of Flux.1-dev's weights. The same holds for shapes that do not fit nf4.

    Args:
        network: changed in place.
        parts: of it, such as its blocks.
        base: type; nothing is done for `bfloat16`.
        rows: input rows of each linear for one sample, by its name without adapters.
    """
    if base == "bfloat16":
        return
    inside = {module for part in parts for module in part.modules()}
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and module in inside and not {"lora_A", "lora_B"} & set(name.split(".")):
            is_small = rows.get(name.removesuffix(".base_layer"), 0) <= 1
            fits = not is_small and fits_nf4(module.out_features, module.in_features)
            parent, _, child = name.rpartition(".")
            packed = QuantisedLinear(module, "int8" if base == "nf4" and not fits else base)
            setattr(network.get_submodule(parent), child, packed)
