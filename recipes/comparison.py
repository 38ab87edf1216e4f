"""The figures of a set of images: alone, and compared with the data and with the teacher's images."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scfm_core.train.clip import LocalCLIP
from scfm_core.train.config import EvaluateConfig
from scfm_core.train.features import extract, frechet_distance, load_extractor
from scfm_core.train.figures import Manifold, cmmd, diversity, precision_recall, seed_distances
from scfm_core.train.sampling import to_uint8

Score = Callable[[Tensor, Sequence[str]], Tensor]
"""Images uint8 [N, 3, H, W] and their prompts -> scores [N]."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a set of images is compared by."""

    features: Tensor
    """fp64 [N, D]."""
    manifold: Manifold | None
    """None: there are too few images."""
    embeddings: Tensor | None
    """Of CMMD's CLIP; None: no CMMD is measured."""


class Comparison:
    """Loads the networks of all figures, and measures sets of images with them.

    Args:
        settings: which figures.
        device: for the networks.

    Raises:
        UserError: if a network's files are missing or invalid.
    """

    def __init__(self, settings: EvaluateConfig, device: torch.device) -> None:
        self.device, self.size = device, settings.batch_size
        extractor = load_extractor(settings, device)
        self.extract, self.accuracy = extractor.features, extractor.accuracy
        self.scores: dict[str, Score] = {}
        """The mean over images of each is a figure."""
        self._embed: Callable[[Tensor], Tensor] | None = None
        if settings.clip_path is not None:
            self.scores["clip_score"] = _clip_score(settings.clip_path, device)
        if settings.pick_score_path is not None:
            self.scores["pick_score"] = _pick_score(settings.pick_score_path, device)
        if settings.cmmd_path is not None:
            hub_id = "openai/clip-vit-large-patch14-336"
            self._embed = LocalCLIP(settings.cmmd_path, "evaluate.cmmd_path", device, hub_id=hub_id).embed
        self._data: Described | None = None
        self._teacher: tuple[Tensor, Described, dict[str, float]] | None = None

    def describe(self, batches: Iterable[Tensor]) -> Described:
        """Describe images, uint8 or in [0, 1], in batches [N, 3, H, W]."""
        found: list[Tensor] = []
        embedded: list[Tensor] = []
        for batch in batches:
            unit = batch / 255 if batch.dtype == torch.uint8 else batch
            found.append(extract(self.extract, unit, self.device, self.size))
            if self._embed is not None:
                embedded.append(self._embed(batch if batch.dtype == torch.uint8 else to_uint8(batch)))
        features = torch.cat(found)
        try:
            manifold = Manifold(features.to(self.device))
        except ValueError:
            manifold = None
        return Described(features=features, manifold=manifold, embeddings=torch.cat(embedded) if embedded else None)

    def set_data(self, described: Described) -> None:
        """Compare the sets that follow with the data's images."""
        self._data = described

    def set_teacher(self, images: Tensor, described: Described, prompts: Sequence[str]) -> None:
        """Compare the sets that follow with the teacher's images, which have the same prompts in the same order."""
        self._teacher = images, described, seed_distances(described.features, prompts)

    def measure(self, images: Tensor, prompts: Sequence[str]) -> tuple[dict[str, float], Described]:
        """All figures of images uint8 [N, 3, H, W], which have these prompts."""
        found = self.describe(images.split(self.size))
        row = {} if self._data is None else self.against("data", found, self._data)
        if self._teacher is not None:
            teacher_images, teacher, distances = self._teacher
            row |= self.against("teacher", found, teacher)
            pairs = zip(images.split(self.size), teacher_images.split(self.size), strict=True)
            total = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
            row["mse_teacher"] = total / images.numel() / 255**2
            ratio = diversity(seed_distances(found.features, prompts), distances)
            if ratio is not None:
                row["diversity"] = ratio
        parts = [(images[at : at + self.size], prompts[at : at + self.size]) for at in range(0, len(images), self.size)]
        if self.accuracy is not None:
            following = sum(len(part) * self.accuracy(part.to(self.device) / 255, texts) for part, texts in parts)
            row["prompt_following"] = following / len(images)
        for name, score in self.scores.items():
            row[name] = float(torch.cat([score(*part) for part in parts]).mean())
        return row, found

    def floor(self, images: Tensor) -> dict[str, float]:
        """The distances of the teacher's images from others of the teacher: from other noise, of the same prompts."""
        assert self._teacher is not None
        return self.against("floor", self.describe(images.split(self.size)), self._teacher[1])

    def against(self, name: str, found: Described, reference: Described) -> dict[str, float]:
        """The distances of a set from a reference, as figures `..._NAME`."""
        row = {f"fid_{name}": frechet_distance(found.features, reference.features)}
        if found.embeddings is not None and reference.embeddings is not None:
            row[f"cmmd_{name}"] = cmmd(found.embeddings.to(self.device), reference.embeddings.to(self.device))
        if found.manifold is not None and reference.manifold is not None:
            precision, recall = precision_recall(found.manifold, reference.manifold)
            row |= {f"precision_{name}": precision, f"recall_{name}": recall}
        return row


def _clip_score(path: str, device: torch.device) -> Score:
    """100 x the cosine of image and prompt (Hessel et al., arXiv 2104.08718, without their factor 2.5)."""
    clip = LocalCLIP(path, "evaluate.clip_path", device, hub_id="openai/clip-vit-large-patch14")
    return lambda images, prompts: 100 * clip.cosines(images, prompts)


def _pick_score(path: str, device: torch.device) -> Score:
    """The logit of image and prompt (Kirstain et al., arXiv 2305.01569, Eq. 1)."""
    # The model's own folder has no processor; it uses that of the model from which it was trained.
    ids = {"hub_id": "yuvalkirstain/PickScore_v1", "processor_id": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
    clip = LocalCLIP(path, "evaluate.pick_score_path", device, **ids)
    return lambda images, prompts: clip.logit_scale * clip.cosines(images, prompts)
