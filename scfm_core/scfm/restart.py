"""When the averages restart from the student: at a fixed interval (the paper), or when they lag behind a drift.

The paper tunes the interval by hand and calls an automatic one future work. This one needs no forward pass and no state. An
average of decay b lags 1 / (1 - b) steps behind a student that drifts steadily; behind a random walk, the square root of this
number. The ratio of the two averages' distances to the student distinguishes the two cases at any speed:

    |student - fast| / |student - slow|  ->  rho        on a drift, rho = (1 - slow) / (1 - fast)
                                         ->  rho^1/2    on a random walk

The averages restart when the ratio is below the geometric mean of both limits, rho^3/4: there the lag of the slow average
mostly delays the target. After a restart both distances are 0 and the ratio starts at 1, which determines the interval on a
steady drift: about 800 steps at the paper's decays.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from scfm_core.readback import read_back
from scfm_core.scfm.ema import DualEMA, EMAConfig

CHECK_EVERY = 20
"""Optimizer steps between two computations of the ratio."""


def threshold(config: EMAConfig) -> float:
    """The ratio below which the averages restart."""
    return ((1 - config.slow) / (1 - config.fast)) ** 0.75


@torch.no_grad()
def lag_ratio(
    emas: DualEMA,
    total: Callable[[Tensor], Tensor] = lambda local: local,
    share: Callable[[str], float] = lambda name: 1.0,
) -> float:
    """`|student - fast| / |student - slow|`; 1 if the averages equal the student.

    Args:
        emas: the averages of this process's shards. Their tensors may be on several devices.
        total: sums a tensor over all processes.
        share: of a weight's squares that this process adds: 1, or less for a weight that more processes have than others.
    """
    device = next(iter(emas.student.values())).device

    def square(average: Mapping[str, Tensor]) -> Tensor:
        # One tensor at a time: all differences together would need the memory of another copy of the weights.
        distances = [
            (torch.dist(weight, average[name]).to(device), share(name)) for name, weight in emas.student.items()
        ]
        return torch.stack([far if part == 1 else far * part**0.5 for far, part in distances]).double().square().sum()

    squares = [square(average) for average in (emas.fast, emas.slow)]
    [[fast, slow]] = read_back(total(torch.stack(squares)))
    return 1.0 if slow == 0 else float((fast / slow) ** 0.5)


def restart_due(
    emas: DualEMA, update: int, total: Callable[[Tensor], Tensor], share: Callable[[str], float] = lambda name: 1.0
) -> tuple[bool, float | None]:
    """Whether the averages restart after an update, counted from 1; and the ratio, or None if it was not computed. Skipped steps do
    not count: a restart that is due at one comes with the next update. `total` and `share`: see `lag_ratio`."""
    every = emas.config.restart_every
    if every != "auto":
        return every is not None and update % every == 0, None
    if update % CHECK_EVERY:
        return False, None
    ratio = lag_ratio(emas, total, share)
    return ratio < threshold(emas.config), ratio
