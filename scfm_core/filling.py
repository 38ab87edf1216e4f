"""Filling a network that was built on the meta device. No process ever holds more of it than its own part."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

Fill = Callable[[str, Tensor, int], None]
"""`fill(name, part, start)` writes the elements from `start` on of the flattened tensor `name` into `part`: 1-D, on any device, any
number of elements. Tensors come in the order of the network's modules."""


def zeros(name: str, part: Tensor, start: int) -> None:
    """A `Fill` for weights that something else sets later."""
    part.zero_()


def allocate(network: nn.Module, device: torch.device | str, *, others_on: torch.device | str | None = None) -> None:
    """Allocate on `device` what is on the meta device, without values; move the other tensors, the buffers, to `others_on`.

    Args:
        network: changed in place.
        device: of the weights.
        others_on: where the network computes, if its weights are kept elsewhere; None: `device`.
    """
    place = device if others_on is None else others_on
    stays = torch.device(device).type == "meta"  # a trace: FSDP2 would also keep what is replaced
    network._apply(
        lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta and not stays else tensor.to(place)
    )


class PackedModule(nn.Module, ABC):
    """A module that packs its weights when they have been filled: no device ever holds more than one such weight unpacked."""

    @abstractmethod
    def pack(self) -> None:
        """Replace the weights, which are on the device of the network, by packed ones."""


def stored_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The tensors that weight files hold: parameters and persistent buffers, live, by name, in the order of the modules."""
    return dict(network.state_dict(keep_vars=True))


def kept_in_fp32(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that diffusers keeps in fp32 in a network of any dtype, by name, such as norms whose scale is 1 + weight."""
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    return {name: parameter for name, parameter in network.named_parameters() if kept.intersection(name.split("."))}


@torch.no_grad()
def materialise(network: nn.Module, device: torch.device | str, fill: Fill) -> None:
    """Allocate a whole network on `device`, and fill it, one module after the other.

    A module with an attribute `filled_on`, a device, is moved there after that.
    """
    for prefix, module in network.named_modules():
        own = _without_children(module)
        allocate(own, device)
        for name, tensor in stored_tensors(own).items():
            fill(f"{prefix}.{name}".removeprefix("."), tensor.detach().view(-1), 0)
        if isinstance(module, PackedModule):
            module.pack()
        if place := getattr(module, "filled_on", None):
            own._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(place))


def _without_children(module: nn.Module) -> nn.Module:
    """A module with the same parameters and buffers, live, and no children."""
    own = nn.Module()
    own._parameters, own._buffers = module._parameters, module._buffers
    own._non_persistent_buffers_set = module._non_persistent_buffers_set
    return own
