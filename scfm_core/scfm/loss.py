"""The loss, and its means by slice and by sigma."""

import torch
from torch import Tensor

from scfm_core.scfm.plan import SLICES, ShortcutPlan

SIGMA_BINS = 4


def scfm_loss(prediction: Tensor, target: Tensor, plan: ShortcutPlan) -> Tensor:
    """Mean squared error in velocity space (paper, Eq. 22), a scalar in fp32.

    Args:
        prediction: the student's velocity at `plan.sigma_start`, [B, ...], any dtype.
        target: from `scfm_target`, fp32 [B, ...].
        plan: the rows' plan; only its length is checked.
    """
    if prediction.shape != target.shape or len(plan) != len(target):
        raise ValueError(
            f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)} and a plan of {len(plan)} rows differ"
        )
    return (prediction.to(target.dtype) - target).square().mean()


class LossMeter:
    """Sums of the loss by slice and by sigma bin. They stay on the device until `compute`, so no step waits for the GPU."""

    def __init__(self, device: torch.device | str) -> None:
        self.sums = torch.zeros(2, len(SLICES), SIGMA_BINS, dtype=torch.float64, device=device)
        """fp64 [2, slices, sigma bins]: losses, then counts. The sums of several processes may be added."""
        self._samples: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, prediction: Tensor, target: Tensor, plan: ShortcutPlan) -> None:
        """Add a micro-batch."""
        losses = (prediction.to(target.dtype) - target).square().flatten(1).mean(1).double()
        sigma_bin = (plan.sigma_start * SIGMA_BINS).long().clamp_(0, SIGMA_BINS - 1)
        index = torch.add(sigma_bin, plan.slice_number, alpha=SIGMA_BINS)
        self.sums.view(2, -1).index_add_(1, index, torch.stack([losses, torch.ones_like(losses)]))
        self._samples.append((plan.sample_ids, losses))

    def by_sample(self) -> list[tuple[int, float]]:
        """(sample id, loss) of every row that was added."""
        return [row for ids, losses in self._samples for row in zip(ids.tolist(), losses.tolist(), strict=True)]

    def compute(self) -> dict[str, float]:
        """Means: `loss`, `loss/<slice>` and `loss/sigma_<low>-<high>`; slices and bins without samples are left out."""
        total, count = self.sums.cpu()
        means = {"loss": (total.sum() / count.sum()).item()}
        for row, name in enumerate(SLICES):
            if count[row].sum() > 0:
                means[f"loss/{name}"] = (total[row].sum() / count[row].sum()).item()
        for column in range(SIGMA_BINS):
            if count[:, column].sum() > 0:
                low, high = column / SIGMA_BINS, (column + 1) / SIGMA_BINS
                means[f"loss/sigma_{low:.2f}-{high:.2f}"] = (total[:, column].sum() / count[:, column].sum()).item()
        return means
