"""The cost of one pass of a network, counted while it runs on the meta device."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scfm_core.models.conditioning import Conditioning
from scfm_core.models.protocol import ModelFamily


@dataclass(frozen=True)
class Forward:
    """One sample's pass without adapters. FLOPs count a multiply-add as two."""

    linear: float
    """FLOPs of products with weights, convolutions too."""
    attention: float
    """FLOPs of products of activations."""
    rows: dict[str, int]
    """Input rows of each linear, by module name: its tokens, or 1 for a layer of the sample as a whole."""


_OF_WEIGHTS = ("mm", "addmm", "convolution")


def trace_forward(
    family: ModelFamily, network: nn.Module, latent_shape: tuple[int, int, int], text_length: int
) -> Forward:
    """Run one pass of one sample.

    Args:
        family: of the network.
        network: on the meta device, without adapters.
        latent_shape: [C, H, W].
        text_length: `model.text_length`.
    """
    fields = {name: torch.empty(1, *shape, device="meta") for name, shape in family.shapes(text_length).items()}
    is_masked = "masked" in family.fields.values()
    cond = Conditioning(
        fields=fields,
        lengths=(family.text_tokens(text_length),) if is_masked else None,
        guidance=torch.empty(1, device="meta") if family.guidance_kind == "input" else None,
    )
    x = torch.empty(1, *latent_shape, device="meta")
    rows: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(_counting(rows, name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        family.predict(network, x, torch.empty(1, device="meta"), cond)
    for hook in hooks:
        hook.remove()
    flops = counter.get_flop_counts()["Global"]
    linear = sum(number for op, number in flops.items() if op.__name__ in _OF_WEIGHTS)
    return Forward(float(linear), float(sum(flops.values()) - linear), dict(rows))


def architecture(family: ModelFamily) -> str:
    """The same for two families whose networks have the same shapes."""
    return f"{type(family).__name__} {family.passes} {sorted(family.network_config.items())} {sorted(family.vae_config.items())}"


def forward_of(family: ModelFamily, latent_shape: tuple[int, int, int], text_length: int) -> Forward:
    """`trace_forward` of the family's network, traced once: a dry run compares many layouts of one network."""
    key = (architecture(family), latent_shape, text_length)
    if key not in _KNOWN:
        _KNOWN[key] = trace_forward(family, family.meta_network(), latent_shape, text_length)
    return _KNOWN[key]


_KNOWN: dict[tuple[str, tuple[int, int, int], int], Forward] = {}


def _counting(rows: Counter[str], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows[name] += inputs[0].shape[:-1].numel()

    return count
