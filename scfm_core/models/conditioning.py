"""What a network is conditioned on: named fields of text, their lengths, guidance."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm_core.flow.rows import put_rows, take_rows
from scfm_core.readback import to_device


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The conditioning of a network, one row per sample."""

    fields: dict[str, Tensor]
    """By name, as the family names them (`ModelFamily.fields`): tokens [B, L, ...] or a vector [B, D]."""
    lengths: tuple[int, ...] | None = None
    """Number of tokens of each row, if the network masks the others: then tokens are as long as the longest row, and zero
    behind a row's length. It is on the host, so that nothing waits for a GPU. None: the network sees all L tokens."""
    guidance: Tensor | None = None
    """Guidance, fp32 [B]: an input of the network, or the scale of classifier-free guidance. None: no guidance."""

    def __getitem__(self, rows: slice | Sequence[int]) -> "Conditioning":
        """Some rows: a slice, or their numbers. Nothing waits for a GPU."""

        def chosen(tensor: Tensor) -> Tensor:
            return tensor[rows] if isinstance(rows, slice) else take_rows(tensor, rows)

        lengths = self.lengths
        if lengths is not None:
            lengths = lengths[rows] if isinstance(rows, slice) else tuple(lengths[row] for row in rows)
        guidance = None if self.guidance is None else chosen(self.guidance)
        fields = {name: _fit(chosen(tensor), lengths) for name, tensor in self.fields.items()}
        return Conditioning(fields=fields, lengths=lengths, guidance=guidance)

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    @property
    def device(self) -> torch.device:
        """Of the fields."""
        return next(iter(self.fields.values())).device

    @property
    def mask(self) -> Tensor:
        """bool [B, L], true on the tokens that the network sees."""
        assert self.lengths is not None
        lengths = to_device(torch.tensor(self.lengths), self.device)
        return torch.arange(max(self.lengths), device=self.device) < lengths[:, None]

    @property
    def mask_if_needed(self) -> Tensor | None:
        """`mask`; None if all rows are equally long, which more backends of attention take."""
        assert self.lengths is not None
        return self.mask if len(set(self.lengths)) > 1 else None

    def with_guidance(self, guidance: Tensor | None) -> "Conditioning":
        """The same rows with another guidance, fp32 [B]."""
        return dataclasses.replace(self, guidance=guidance)

    def without_captions(self, rows: Sequence[int], empty: "Conditioning") -> "Conditioning":
        """The same, but the rows with these numbers have the empty caption, the single row of `empty`."""
        lengths = self.lengths
        if lengths is not None and empty.lengths is not None:
            lengths = tuple(empty.lengths[0] if row in rows else own for row, own in enumerate(lengths))
        fields = {}
        for name, tensor in self.fields.items():
            other = _fit(empty.fields[name].to(tensor.dtype), lengths)
            fields[name] = put_rows(_fit(tensor, lengths), rows, other.expand(len(rows), *other.shape[1:]))
        return Conditioning(fields=fields, lengths=lengths, guidance=self.guidance)

    def expand(self, rows: int) -> "Conditioning":
        """A single row `rows` times, without copies."""
        lengths = None if self.lengths is None else self.lengths * rows
        fields = {name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in self.fields.items()}
        guidance = None if self.guidance is None else self.guidance.expand(rows)
        return Conditioning(fields=fields, lengths=lengths, guidance=guidance)

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same rows on `device`."""
        guidance = None if self.guidance is None else self.guidance.to(device)
        fields = {name: tensor.to(device) for name, tensor in self.fields.items()}
        return Conditioning(fields=fields, lengths=self.lengths, guidance=guidance)

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """The rows of all parts. The dtypes are those of the first part; the guidance is None if a part has none."""
        known = [part.lengths for part in parts if part.lengths is not None]
        lengths = sum(known, ()) if known else None
        guidance = [part.guidance for part in parts if part.guidance is not None]
        return Conditioning(
            fields={
                name: torch.cat([_fit(part.fields[name].to(first.dtype), lengths) for part in parts])
                for name, first in parts[0].fields.items()
            },
            lengths=lengths,
            guidance=torch.cat(guidance) if len(guidance) == len(parts) else None,
        )


def _fit(tensor: Tensor, lengths: tuple[int, ...] | None) -> Tensor:
    """Masked tokens [B, L, ...] as long as the longest of `lengths`: cut, or padded with zeros. Other fields as they are."""
    if lengths is None or tensor.dim() < 3 or not lengths:
        return tensor
    missing = max(lengths) - tensor.shape[1]
    if missing <= 0:
        return tensor[:, : max(lengths)]
    return F.pad(tensor, (*[0, 0] * (tensor.dim() - 2), 0, missing))
