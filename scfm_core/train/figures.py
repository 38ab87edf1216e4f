"""Figures of sets of images that few-step papers report beside the Frechet distance, on features of any kind.

All functions take features [N, D], fp32 or fp64, on any device, and compare rows in chunks: no matrix of all pairs is kept.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NEIGHBOURS = 3
"""k of the paper's experiments (Kynkaanniemi et al., arXiv 1904.06991, Section 3.1)."""
_CHUNK = 512
"""Rows of one block of distances: 123 MB in fp64 for 30,000 columns."""
_ROUNDING = 1e-12
"""Bound of the relative error of a squared distance in fp64: some thousand products are added."""
_SIGMA, _SCALE = 10.0, 1000.0
"""Bandwidth of the kernel and factor of CMMD (Jayasumana et al., arXiv 2401.09603, Section 4)."""


class Manifold:
    """The manifold of a set of features: a ball around each, which reaches to its k-th nearest neighbour (Eq. 1).

    Args:
        features: [N, D].
        k: which neighbour.

    Raises:
        ValueError: if there are no `k` neighbours.
    """

    def __init__(self, features: Tensor, k: int = NEIGHBOURS) -> None:
        if len(features) <= k:
            raise ValueError(f"{len(features)} features have no neighbour number {k}")
        self.features = features.double()
        # The nearest of all is the feature itself.
        found = [_squared_distances(part, self.features).kthvalue(k + 1).values for part in self.features.split(_CHUNK)]
        self.squared_radii = torch.cat(found)


def precision_recall(generated: Manifold, reference: Manifold) -> tuple[float, float]:
    """Precision and recall (Eq. 2).

    Precision is the share of the generated features that are in a ball of the reference: quality. Recall is the share of the reference
    that is in a ball of the generated features: coverage.
    """
    inside, covered = 0, torch.zeros(len(reference.features), dtype=torch.bool, device=reference.features.device)
    for part, radii in zip(generated.features.split(_CHUNK), generated.squared_radii.split(_CHUNK), strict=True):
        distances = _squared_distances(part, reference.features)
        inside += int((distances <= reference.squared_radii).any(1).sum())
        covered |= (distances <= radii[:, None]).any(0)
    return inside / len(generated.features), float(covered.double().mean())


def seed_distances(features: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """For each prompt, the mean distance of two features of it. A prompt with a single feature is left out."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return {prompt: float(torch.pdist(features[own]).mean()) for prompt, own in rows.items() if len(own) > 1}


def diversity(distances: Mapping[str, float], reference: Mapping[str, float]) -> float | None:
    """The mean over prompts of `distances`, each divided by that of the same prompt in `reference` (see `seed_distances`).

    1: the seeds of a prompt differ as much as the reference's; 0: they make one image. Prompts for which the reference itself makes one
    image are left out. None: no prompt is left.
    """
    ratios = [distances[prompt] / other for prompt, other in reference.items() if other > 0]
    return sum(ratios) / len(ratios) if ratios else None


def cmmd(first: Tensor, second: Tensor, *, sigma: float = _SIGMA, scale: float = _SCALE) -> float:
    """CMMD: `scale` times the unbiased estimate of the squared maximum mean discrepancy (arXiv 2401.09603, Eq. 3).

    The kernel is `exp(-|x - y|^2 / (2 sigma^2))`; pairs of a feature with itself are left out. (The authors' code includes them, which
    adds less than `scale (1 / N + 1 / M)` times the mean of `1 - kernel`.) An unbiased estimate may be slightly below 0.

    Args:
        first, second: embeddings of CLIP ViT-L/14-336, of length 1: [N, D] and [M, D].
        sigma, scale: those of the paper.

    Raises:
        ValueError: if a set has fewer than two embeddings.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("an unbiased estimate needs at least two embeddings in each set")
    first, second = first.double(), second.double()
    within = sum(
        (_kernel_sum(each, each, sigma) - len(each)) / (len(each) * (len(each) - 1)) for each in (first, second)
    )
    between = _kernel_sum(first, second, sigma) / (len(first) * len(second))
    return scale * (within - 2 * between)


def _kernel_sum(first: Tensor, second: Tensor, sigma: float) -> float:
    parts = (_squared_distances(part, second).div(-2 * sigma**2).exp().sum() for part in first.split(_CHUNK))
    return sum(float(part) for part in parts)


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Squared Euclidean distances of fp64 features, [N, M].

    A matrix product is some ten times as fast as differences. Its rounding is removed where it counts: equal features have distance 0.
    """
    norms = first.square().sum(1, keepdim=True) + second.square().sum(1)
    squared = torch.addmm(norms, first, second.T, alpha=-2)
    return squared.masked_fill_(squared < _ROUNDING * norms, 0)
