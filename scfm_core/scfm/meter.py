"""Means of the loss by slice and by sigma."""

import math

import torch
from torch import Tensor

from scfm_core.scfm.plan import SLICES, ShortcutPlan

SIGMA_BINS = 4
MATCHING, FAKE = SLICES.index("matching"), len(SLICES)


class LossMeter:
    """Sums of the loss by slice and by sigma bin. They stay on the device until `compute`, so no step waits for the GPU."""

    def __init__(self, device: torch.device | str) -> None:
        self.sums = torch.zeros(2, len(SLICES) + 1, SIGMA_BINS, dtype=torch.float64, device=device)
        """fp64 [2, slices and the fake score, sigma bins]: losses, then counts. The sums of several processes may be added."""
        self._samples: list[tuple[Tensor, Tensor, list[int]]] = []

    @torch.no_grad()
    def add(self, prediction: Tensor, target: Tensor, plan: ShortcutPlan) -> None:
        """Add a micro-batch."""
        losses = (prediction.to(target.dtype) - target).square().flatten(1).mean(1).double()
        sigma_bin = (plan.sigma_start * SIGMA_BINS).long().clamp_(0, SIGMA_BINS - 1)
        index = torch.add(sigma_bin, plan.slice_number, alpha=SIGMA_BINS)
        self.sums.view(2, -1).index_add_(1, index, torch.stack([losses, torch.ones_like(losses)]))
        self._samples.append((plan.sample_ids, losses, plan.matching_rows))

    @torch.no_grad()
    def add_fake(self, losses: Tensor) -> None:
        """Add the fake score's losses of the matching rows of a micro-batch, [n]."""
        self.sums[:, FAKE, 0] += torch.stack([losses.double().sum(), losses.new_full((), len(losses)).double()])

    def by_sample(self) -> list[tuple[int, float]]:
        """(sample id, loss) of every row that was added, without matching rows of a finite loss: see `regression`."""
        return [
            (sample, loss)
            for ids, losses, matching in self._samples
            for row, (sample, loss) in enumerate(zip(ids.tolist(), losses.tolist(), strict=True))
            if row not in matching or not math.isfinite(loss)
        ]

    def regression(self) -> float | None:
        """The loss that spikes are looked for in: the mean without matching rows, whose loss is no measure of progress. The mean over
        all rows if that is not finite; None if there are matching rows alone."""
        total, count = self.sums[:, :FAKE].cpu().sum(2)
        loss = (total.sum() / count.sum()).item()
        if count[MATCHING] == 0 or not math.isfinite(loss):
            return loss
        rows = count.sum() - count[MATCHING]
        return ((total.sum() - total[MATCHING]) / rows).item() if rows > 0 else None

    def compute(self) -> dict[str, float]:
        """Means: `loss`, `loss/<slice>`, `loss/sigma_<low>-<high>` and `loss/fake`; slices and bins without samples are left out, and
        the fake score's own loss counts in no other."""
        total, count = self.sums[:, :FAKE].cpu()
        means = {"loss": (total.sum() / count.sum()).item()}
        for row, name in enumerate(SLICES):
            if count[row].sum() > 0:
                means[f"loss/{name}"] = (total[row].sum() / count[row].sum()).item()
        fake, rows = self.sums[:, FAKE, 0].tolist()
        if rows > 0:
            means["loss/fake"] = fake / rows
        for column in range(SIGMA_BINS):
            if count[:, column].sum() > 0:
                low, high = column / SIGMA_BINS, (column + 1) / SIGMA_BINS
                means[f"loss/sigma_{low:.2f}-{high:.2f}"] = (total[:, column].sum() / count[:, column].sum()).item()
        return means
