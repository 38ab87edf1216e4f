"""The fields of text of a cached sample: which kinds there are, and how those of a batch are packed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

FieldKind = Literal["tokens", "masked", "vector"]
"""Of a field. tokens: [L, ...] of one length; the network sees the padding. masked: [n, ...] of any length; the network
does not see padding. vector: [D]."""

KINDS = get_args(FieldKind)
RESERVED = ("latents", "velocities", "sigmas", "guidance")
"""The other tensors of a cached sample: no field has such a name."""


def invalid_field(fields: Any) -> str | None:
    """What is wrong with the fields of a manifest, which may be any value; None: they are names and kinds."""
    if not isinstance(fields, dict):
        return f"fields must be an object of names and kinds, got {fields!r}"
    for name, kind in fields.items():
        if kind not in KINDS:
            return f"the field {name!r} has the kind {kind!r}; this release knows {', '.join(KINDS)}"
        if name in RESERVED or not name:
            return f"a field is named {name!r}; this name is reserved or empty"
    return None


@dataclass(frozen=True)
class PackedTokens:
    """The rows of a field of tokens of a batch, concatenated without padding. The padding is added on the device.

    The padding may be most of the bytes (of 512 tokens a caption has about 60), so it is not sent between processes.
    """

    tokens: Tensor
    """[sum of lengths, ...]."""
    lengths: tuple[int, ...]
    """Tokens of each of the B rows."""
    paddings: tuple[int | None, ...] | None = None
    """Number of each row's padding, None for a row of the full length. None: the field is masked; its padding is zeros."""

    def padded(self, paddings: Sequence[Tensor | None] = (), device: torch.device | str = "cpu") -> Tensor:
        """The padded rows, as the network takes them.

        Args:
            paddings: those of the corpus for this field, [L, ...] each, on `device`.
            device: of the result.

        Returns:
            [B, L, ...] on `device`, of the tokens' dtype. L is the length of the paddings; of a masked field, of the longest row.
        """
        tokens = self.tokens.to(device, non_blocking=True)
        if set(self.paddings or ()) == {None}:
            return tokens.view(len(self.lengths), -1, *tokens.shape[1:])
        rows = tokens.split(self.lengths)
        if self.paddings is None:
            return pad_sequence(rows, batch_first=True)
        length = next(len(p) for n in self.paddings if n is not None and (p := paddings[n]) is not None)
        padded = tokens.new_empty(len(rows), length, *tokens.shape[1:])
        for row, own, number in zip(padded, rows, self.paddings, strict=True):
            row[: len(own)] = own
            padding = None if number is None else paddings[number]
            if padding is not None:
                row[len(own) :] = padding[len(own) :]
        return padded
