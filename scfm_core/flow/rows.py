"""Some rows of a batch, by numbers on the host. They are slices and one concatenation: no index is copied to the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def take_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows `rows` of `tensor` [B, ...], in this order: [len(rows), ...]. All rows in their order are the tensor itself."""
    if list(rows) == list(range(len(tensor))):
        return tensor
    return torch.cat([tensor[row : row + 1] for row in rows])


def put_rows(tensor: Tensor, rows: Sequence[int], values: Tensor) -> Tensor:
    """`tensor` [B, ...] with `values` [len(rows), ...] in place of its rows `rows`; nothing is changed in place.

    Without rows, `values` is not used.
    """
    if not rows:
        return tensor
    if list(rows) == list(range(len(tensor))):
        return values
    replaced = dict(zip(rows, values.split(1), strict=True))
    return torch.cat([replaced.get(row, own) for row, own in enumerate(tensor.split(1))])
