"""When the averages are set to the student again: at a fixed interval (the paper), or when they lag behind a drift.

The paper tunes the interval by hand and names an automatic one as future work. This one needs no pass and no state. While
the student drifts steadily, an average of decay b lags behind it by 1 / (1 - b) steps; while it only wanders, by the square
root of as many. The ratio of the fast average's distance to the slow one's tells the two apart, whatever the speed:

    |student - fast| / |student - slow|  ->  rho        on a drift, rho = (1 - slow) / (1 - fast)
                                         ->  rho^1/2    on a random walk

Below the geometric mean of both, rho^3/4, the slow average mostly holds the target back: restart. Both distances are 0
after a restart and the ratio begins at 1, so that on a steady drift the interval comes out by itself: some 800 steps at the
paper's decays.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scfm_core.scfm.ema import DualEMA, EMAConfig

CHECK_EVERY = 20
"""Optimizer steps between two looks."""


def threshold(config: EMAConfig) -> float:
    """The ratio below which the averages restart."""
    return ((1 - config.slow) / (1 - config.fast)) ** 0.75


@torch.no_grad()
def lag_ratio(emas: DualEMA, total: Callable[[Tensor], Tensor] = lambda local: local) -> float:
    """`|student - fast| / |student - slow|`; 1 where all are equal.

    Args:
        emas: of this process's shards.
        total: adds up a tensor over all processes. Each weight must be held by equally many.
    """
    squares = [
        # Tensor by tensor: all differences at once would be another copy of the weights.
        torch.stack([torch.dist(weight, average[name]) for name, weight in emas.student.items()])
        .double()
        .square()
        .sum()
        for average in (emas.fast, emas.slow)
    ]
    fast, slow = total(torch.stack(squares)).tolist()
    return 1.0 if slow == 0 else float((fast / slow) ** 0.5)


def restart_due(emas: DualEMA, step: int, total: Callable[[Tensor], Tensor]) -> tuple[bool, float | None]:
    """Whether the averages restart after optimizer step `step`, counted from 1, and the ratio if it was looked at."""
    every = emas.config.restart_every
    if every != "auto":
        return every is not None and step % every == 0, None
    if step % CHECK_EVERY:
        return False, None
    ratio = lag_ratio(emas, total)
    return ratio < threshold(emas.config), ratio
