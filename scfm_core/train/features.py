"""Features of images, and the Frechet distance between two sets of them."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm_core.errors import UserError, missing_extra
from scfm_core.models.weights import save_tensors
from scfm_core.train.config import EvaluateConfig

Features = Callable[[Tensor], Tensor]
"""Images fp32 [N, 3, H, W] in [0, 1] -> features [N, D]."""

Accuracy = Callable[[Tensor, Sequence[str]], float]
"""Images fp32 [N, 3, H, W] in [0, 1] and their prompts -> the share of the images that show what their prompt says."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASSIFIER_FILE = "classifier.safetensors"


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """What a benchmark measures images with."""

    features: Features
    accuracy: Accuracy | None = None
    """Prompt following; None: the benchmark cannot tell what an image shows."""


class DigitClassifier(nn.Module):
    """MLP 64-128-64-10 on grey 8x8 images; its features are the 64 activations before the last layer."""

    side = 8

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] -> [N, 64]."""
        small = F.interpolate(images.mean(1, keepdim=True), size=(self.side, self.side), mode="area")
        return self.body(small.flatten(1) * 2 - 1)  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10]."""
        return self.head(self.features(images))  # type: ignore[no-any-return]

    def accuracy(self, images: Tensor, prompts: Sequence[str]) -> float:
        """The share of `images` [N, 3, H, W] in [0, 1] that show the digit that is the last word of their prompt."""
        names = [prompt.split()[-1:] for prompt in prompts]
        wanted = [DIGITS.index(name[0]) if name and name[0] in DIGITS else -1 for name in names]
        return float((self(images).argmax(1).cpu() == torch.tensor(wanted)).double().mean())

    def save(self, folder: Path) -> None:
        """Write the weights into `folder`."""
        save_tensors(folder / CLASSIFIER_FILE, self.state_dict())


def load_extractor(config: EvaluateConfig, device: torch.device) -> Extractor:
    """The extractor that `evaluate.features` names.

    Raises:
        UserError: if its weights or its package are missing.
    """
    path = None if config.features_path is None else Path(config.features_path).expanduser()
    if config.features == "inception":
        return Extractor(features=_inception(path, device))
    if config.features == "classifier":
        classifier = DigitClassifier()
        load_classifier(classifier, path, "give the folder that holds the classifier")
        classifier.to(device).eval()
        return Extractor(features=classifier.features, accuracy=torch.no_grad()(classifier.accuracy))
    module, _, function = config.features.partition(":")
    try:
        load: Callable[[Path | None, torch.device], Extractor] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"evaluate.features: {config.features!r} cannot be imported ({error}). Give classifier, inception, or MODULE:FUNCTION of a "
            f"package that is installed here"
        ) from error
    return load(path, device)


def load_classifier(classifier: nn.Module, path: Path | None, advice: str) -> None:
    """Read the weights of a benchmark's classifier from the folder `evaluate.features_path`.

    Raises:
        UserError: if they are missing, with `advice`, or of another network.
    """
    if path is None or not (path / CLASSIFIER_FILE).is_file():
        raise UserError(f"evaluate.features_path: there is no {CLASSIFIER_FILE} in {str(path)!r}; {advice}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        classifier.load_state_dict(load_file(path / CLASSIFIER_FILE))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"evaluate.features_path: {path / CLASSIFIER_FILE} does not hold weights of {type(classifier).__name__} ({error})"
        ) from error


def _inception(path: Path | None, device: torch.device) -> Features:
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise missing_extra("evaluate.features=inception", "evaluate", error) from error
    if path is None or not path.is_file():
        raise UserError(
            "evaluate.features_path must name Inception's weights, https://github.com/toshas/torch-fidelity/releases/"
            "download/v0.2.0/weights-inception-2015-12-05-6726825d.pth, or set evaluate.features=classifier"
        )
    try:
        # torch-fidelity unpickles any object. A file that loads with weights_only=True contains no code.
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # not a plain state dict: pickle, zip and torch raise different exceptions
        raise UserError(
            f"evaluate.features_path: {path} is not a file of weights only ({type(error).__name__})"
        ) from error
    try:
        network = NoTrainInceptionV3(
            name="inception-v3-compat", features_list=["2048"], feature_extractor_weights_path=str(path)
        )
    except ImportError as error:
        raise missing_extra("evaluate.features=inception", "evaluate", error) from error
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"evaluate.features_path: {path} does not hold Inception's weights ({error})") from error
    network = network.to(device).eval()

    def features(images: Tensor) -> Tensor:
        return network((images * 255).round().to(torch.uint8))  # type: ignore[no-any-return]

    return features


@torch.no_grad()
def extract(features: Features, images: Tensor, device: torch.device, batch_size: int) -> Tensor:
    """Features of many images, fp64 [N, D] on the CPU."""
    return torch.cat([features(part.to(device)).double().cpu() for part in images.split(batch_size)])


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to features [N, D] and [M, D] (Heusel et al., arXiv 1706.08500, Eq. 6).

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)`, with symmetric square roots in fp64.

    Raises:
        ValueError: if a set has fewer than two samples.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("a covariance needs at least two samples in each set")
    mean1, mean2 = first.mean(0), second.mean(0)
    cov1, cov2 = torch.cov(first.T), torch.cov(second.T)
    root1 = _symmetric_sqrt(cov1)
    eigenvalues = torch.linalg.eigvalsh(root1 @ cov2 @ root1).clamp(min=0)
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, float(distance))


def _symmetric_sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
