"""Files of an adapter for other tools: names of tensors, and which of our linears share one layer there."""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from scfm_core.errors import UserError
from scfm_core.models.protocol import ModelFamily

Format = Literal["diffusers", "comfyui", "kohya"]
"""diffusers: `transformer.<module>`. comfyui: `diffusion_model.<original layer>`. kohya: `lora_unet_<original layer>` with alpha."""

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def formats_of(family: ModelFamily) -> tuple[str, ...]:
    """The formats that a family's adapters can be written in."""
    return ("diffusers", *family.other_tools.formats)


@torch.no_grad()
def convert(
    family: ModelFamily,
    factors: Mapping[str, Tensor],
    format: Format,
    *,
    scale: float,
    dtype: torch.dtype,
    leave_out: re.Pattern[str] | None = None,
) -> dict[str, Tensor]:
    """The tensors of an adapter's file, on the CPU. Weight 1 in the tool is `scale * B A` on each of our linears.

    A layer that joins several of our linears (q, k and v) gets their A below each other, and their B as blocks of a block-diagonal
    matrix; its rank is the sum of theirs. Tools split such a layer into parts of one rank, so a part without factors gets zeros.

    Args:
        family: of the adapted network.
        factors: `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank], fp32.
        format: of the file.
        scale: alpha / rank, times the strength that the file has at weight 1. It multiplies B in fp32.
        dtype: of the file's A and B; `alpha` is always fp32.
        leave_out: a module whose full name matches is not written.

    Raises:
        UserError: if no tool reads this family in this format, or if nothing is left.
    """
    if format not in formats_of(family):
        raise UserError(
            f"there is no {format} format for adapters of {family.pipeline}; its formats are {', '.join(formats_of(family))}"
        )
    adapted = [name.removesuffix(_DOWN) for name in factors if name.endswith(_DOWN)]
    kept = dict.fromkeys(name for name in adapted if leave_out is None or not leave_out.fullmatch(name))
    if not kept:
        raise UserError(
            f"all {len(adapted)} adapted linears are left out: {leave_out.pattern if leave_out else ''!r} matches all"
        )
    layers: Mapping[str, tuple[str, ...]] = {name: (name,) for name in kept}
    rows: dict[str, int] = {}
    swapped: frozenset[str] = frozenset()
    if format != "diffusers" and family.other_tools.formats[format] == "original":
        linears = {n: m for n, m in family.meta_network().named_modules() if isinstance(m, nn.Linear)}
        rows = {name: linear.out_features for name, linear in linears.items()}
        layers = family.other_tools.original_layers(rows)
        swapped = family.other_tools.swapped_modules(rows)

    def pair(module: str, like: Tensor) -> tuple[Tensor, Tensor]:
        if module not in kept:
            return torch.zeros_like(like), torch.zeros(rows[module], len(like))
        up = factors[module + _UP].detach().cpu() * scale
        return factors[module + _DOWN].detach().cpu(), torch.cat(up.chunk(2)[::-1]) if module in swapped else up

    tensors: dict[str, Tensor] = {}
    for layer, modules in layers.items():
        present = [module for module in modules if module in kept]
        if present:
            like = factors[present[0] + _DOWN].detach().cpu()
            downs, ups = zip(*(pair(module, like) for module in modules), strict=True)
            down, up = torch.cat(downs).to(dtype), torch.block_diag(*ups).to(dtype)
            tensors |= _named(family, format, layer, down.contiguous(), up.contiguous())
    return tensors


def _named(family: ModelFamily, format: Format, layer: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """A layer's tensors by their names in the file."""
    if format == "kohya":
        name = "lora_unet_" + layer.replace(".", "_")
        alpha = torch.tensor(float(len(down)))
        return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    if format == "comfyui":
        a, b = family.other_tools.comfyui_factors
        return {f"diffusion_model.{layer}.{a}.weight": down, f"diffusion_model.{layer}.{b}.weight": up}
    return {f"transformer.{layer}{_DOWN}": down, f"transformer.{layer}{_UP}": up}
