"""Counter-based randomness: a draw is a pure function of (seed, sample id, stream), not of rank or batch position.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) on int64 tensors gives the same bits
on every device. Resuming needs no generator state, and 1 or 64 processes draw the same numbers.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(IntEnum):
    """The purpose of a draw. A sample's streams are independent. Never give a used number another meaning."""

    PLAN = 0
    NOISE = 1
    SCORES = 2
    """Noise on the images of matching rows."""
    FAKE = 3
    """The same, for the fake score to learn from."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten Philox rounds, elementwise: four int64 tensors of 32-bit words -> four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # 32 x 32 -> 64 bits. int64 products wrap modulo 2**64, so all bits are right.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seed: int, sample_ids: Tensor, stream: Stream, count: int) -> Tensor:
    """`count` random 32-bit words for each sample: int64 [B, count] with values in [0, 2**32).

    Raises:
        ValueError: if `sample_ids` are not int64 [B].
    """
    if sample_ids.dtype != torch.int64 or sample_ids.ndim != 1:
        raise ValueError(f"sample_ids must be int64 [B], got {sample_ids.dtype} {tuple(sample_ids.shape)}")
    blocks = torch.arange((count + 3) // 4, device=sample_ids.device)
    index, ids = torch.broadcast_tensors(blocks[None, :], sample_ids[:, None])
    counter = (index, ids & _MASK, (ids >> 32) & _MASK, torch.full_like(index, int(stream)))
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def uniform(seed: int, sample_ids: Tensor, stream: Stream, count: int) -> Tensor:
    """Uniform draws in (0, 1), fp64 [B, count]."""
    return (random_words(seed, sample_ids, stream, count).to(torch.float64) + 0.5) * 2.0**-32


def sample_noise(latents: Tensor, sample_ids: Tensor, seed: int, stream: Stream = Stream.NOISE) -> Tensor:
    """Standard normal noise for each sample, fp32, the shape and device of `latents` [B, ...] (Box-Muller).

    A sample's noise depends only on the seed, its id, the stream and its shape.

    Raises:
        ValueError: if `sample_ids` are not int64 [B].
    """
    shape = latents.shape
    if len(sample_ids) != shape[0]:
        raise ValueError(f"{len(sample_ids)} sample ids for {shape[0]} samples")
    count = math.prod(shape[1:])
    half = (count + 1) // 2
    draws = uniform(seed, sample_ids.to(latents.device, non_blocking=True), stream, 2 * half)
    radius, angle = (-2 * draws[:, :half].log()).sqrt(), (2 * math.pi) * draws[:, half:]
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return normal[:, :count].to(torch.float32).reshape(shape)
