"""The choice between the vendor's library and `lora_gemm.py` for the products of adapted linears, by measurement."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scfm_core.kernels.attention import triton_errors
from scfm_core.kernels.launch import Tile, why_no_triton
from scfm_core.kernels.lora_products import add_product, shape_of, use_tiles
from scfm_core.kernels.measured import cache_file, milliseconds, write_measured

TIE = 0.03
"""Triton must be faster by this fraction. Times vary between runs; the choice should not."""
Time = Callable[[Tensor, Tensor, Tensor, Tensor, Tile | None], float]


@dataclass(frozen=True)
class ProductChoice:
    """Which products Triton computes, and the reason."""

    why: str | None = None
    """None: nothing was to choose."""
    tiles: dict[str, Tile] = field(default_factory=dict)
    """By `shape_of`; the library computes all others."""

    def __str__(self) -> str:
        which = f"Triton for {'; '.join(self.tiles)}" if self.tiles else "the library"
        return "" if self.why is None else f", products of adapters by {which} ({self.why})"


def choose_products(
    shapes: Iterable[tuple[int, int, int]],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    time: Time | None = None,
) -> ProductChoice:
    """Measure every product of adapted linears in the training, forward and backward, once for each device and shape.

    Args:
        shapes: rows, inputs and outputs of the linears; of linears that differ in their rows alone, those with the most count.
        rank: of the adapters.
        dtype: of the products.
        device: where they run.
        time: milliseconds of `x weight + low factor` with a tile, or with the library (None); by default measured on the GPU.
    """
    if time is None and device.type != "cuda":
        return ProductChoice("Triton's is measured on GPUs only")
    if (reason := why_no_triton(device)) is not None:
        return ProductChoice(reason)
    from scfm_core.kernels.lora_gemm import TILES

    path = cache_file("products.json")
    known, tiles = _read(path), {}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    most: dict[tuple[int, int], int] = {}
    for rows, *sizes in shapes:
        most[sizes[0], sizes[1]] = max(rows, most.get((sizes[0], sizes[1]), 0))
    for (inputs, outputs), rows in most.items():
        for weight in _weights(inputs, outputs, dtype, device):
            key = f"{name}, {rows} rows, {shape_of(weight)}, rank {rank}, torch {torch.__version__}"
            if key not in known:
                known[key] = _fastest(rows, weight, rank, TILES, time or _milliseconds)
                write_measured(path, known)
            if (number := known[key]) is not None and number < len(TILES):
                tiles[shape_of(weight)] = TILES[number]
    return ProductChoice(f"measured here ({path})", tiles)


def _weights(inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """As the forward and the backward read W [out, in]."""
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
    return weight.T, weight


def _fastest(rows: int, weight: Tensor, rank: int, tiles: tuple[Tile, ...], time: Time) -> int | None:
    """Number of the fastest tile; None: the library is as fast."""
    x, low = weight.new_empty(rows, weight.shape[0]).normal_(), weight.new_empty(rows, rank).normal_()
    factor = weight.new_empty(rank, weight.shape[1]).normal_()
    times = [time(x, weight, low, factor, tile) for tile in tiles]
    best = min(range(len(tiles)), key=lambda number: times[number])
    return best if times[best] < time(x, weight, low, factor, None) * (1 - TIE) else None


def _milliseconds(x: Tensor, weight: Tensor, low: Tensor, factor: Tensor, tile: Tile | None) -> float:
    """Of a product with a tile; None: the library's."""
    use_tiles({} if tile is None else {shape_of(weight): tile})
    try:
        return milliseconds(lambda: add_product(x, weight, low, factor), x.device)
    except triton_errors():  # a tile that does not fit this GPU
        return math.inf
    finally:
        use_tiles({})


def _read(path: Path) -> dict[str, int | None]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: number for key, number in found.items() if number is None or (type(number) is int and number >= 0)}
    except (OSError, ValueError, AttributeError):
        return {}  # a missing or damaged file: measure again
