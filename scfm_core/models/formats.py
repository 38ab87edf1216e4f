"""The tensors of an adapter's file, under the names that a tool reads."""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from scfm_core.errors import UserError
from scfm_core.models.protocol import ModelFamily

Format = Literal["diffusers", "comfyui", "kohya"]


def convert(
    family: ModelFamily,
    factors: Mapping[str, Tensor],
    format: Format,
    *,
    scale: float,
    dtype: torch.dtype,
    leave_out: re.Pattern[str] | None,
) -> dict[str, Tensor]:
    """The tensors of an adapter's file.

    Args:
        family: of the base model.
        factors: `<module>.lora_A.weight` and `<module>.lora_B.weight`, fp32.
        format: of the file.
        scale: B is multiplied by it, in fp32, before the cast to `dtype`.
        dtype: of the file's tensors.
        leave_out: modules whose whole name matches are left out.

    Raises:
        UserError: if the family has no such format.
    """
    if format != "diffusers":
        raise UserError(f"--format {format}: {type(family).__name__} has only the format diffusers")
    return {
        f"transformer.{name}": (factor * scale if ".lora_B." in name else factor).to(dtype)
        for name, factor in factors.items()
        if leave_out is None or not leave_out.fullmatch(name.partition(".lora_")[0])
    }
