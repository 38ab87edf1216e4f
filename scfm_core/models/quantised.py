"""Networks whose frozen linears are quantised (`scfm_core.kernels.quantised`)."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scfm_core.filling import PackedModule
from scfm_core.kernels.nf4 import BLOCK, fits_nf4
from scfm_core.kernels.quantised import Packing, quantise, quantised_linear
from scfm_core.models.initial import is_modulation

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
        self.weight: Any = linear.weight
        self.bias = linear.bias

    @torch.no_grad()
    def pack(self) -> None:
        """See `PackedModule`."""
        values, scale = quantise(self.weight, self.packing)
        self.weight = None
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + bias`, [..., out] in the dtype of `x`."""
        return quantised_linear(x, self.values, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.packing}"


def quantise_linears(network: nn.Module, parts: Iterable[nn.Module], base: Base) -> None:
    """Replace the frozen linears within `parts` of a network, adapted or not, by `QuantisedLinear`s that are not packed yet.

    With nf4, modulations get int8: a sample has one row of them, their rounding error affects every token, and they are a quarter
    of Flux.1-dev's weights. The same holds for shapes that do not fit nf4. A weight that is also used elsewhere, such as that of an
    embedding, stays as it is.

    Args:
        network: changed in place.
        parts: of it, such as its blocks.
        base: type; nothing is done for `bfloat16`.
    """
    for name, linear, packing in list(_choices(network, parts, base)):
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, QuantisedLinear(linear, packing))


def _choices(network: nn.Module, parts: Iterable[nn.Module], base: Base) -> Iterator[tuple[str, nn.Linear, Packing]]:
    """The linears that `quantise_linears` replaces, by name, and their type."""
    if base == "bfloat16":
        return
    inside = {module for part in parts for module in part.modules()}
    uses: Counter[Any] = Counter(parameter for module in network.modules() for parameter in module._parameters.values())
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear) or module not in inside or uses[module.weight] > 1:
            continue
        if not {"lora_A", "lora_B"} & set(name.split(".")):
            plain = name.removesuffix(".base_layer")
            fits = fits_nf4(module.out_features, module.in_features) and not is_modulation(plain, module)
            yield name, module, "int8" if base == "nf4" and not fits else base


def saved_bytes(network: nn.Module, parts: Iterable[nn.Module], base: Base, width: int) -> dict[nn.Module, int]:
    """Bytes by which `quantise_linears` makes each linear smaller whose elements take `width` bytes; the network may be on the meta
    device."""
    saved: dict[nn.Module, int] = {}
    for _, linear, packing in _choices(network, parts, base):
        elements, rows = linear.in_features * linear.out_features, linear.out_features
        packed = elements // 2 + 4 * elements // BLOCK if packing == "nf4" else elements + 4 * rows
        saved[linear] = elements * width - packed
    return saved


def quantise_onto(network: nn.Module, base: Base, device: torch.device | str) -> None:
    """Move a network whose weights are in host memory to a device, with packed linears; one of them at a time is there unpacked."""
    quantise_linears(network, [network], base)
    for module in network.modules():
        if isinstance(module, QuantisedLinear):
            module.to(device).pack()
    network.to(device)
