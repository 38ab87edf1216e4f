"""What the benchmark with rich prompts measures images with: a small network that reads glyph, ground, place and size.

Its features are those of the Frechet distance, of precision, recall and diversity. They also tell place and size, because an
image is drawn well only if these vary as in the data. `evaluate.features: recipes.emoji_classifier:extractor` names it.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.emoji_images import GLYPHS, GROUNDS, SIZE, Drawn, pair_of
from scfm_core.models.weights import save_tensors
from scfm_core.train.features import CLASSIFIER_FILE, Extractor, load_classifier

_BATCH = 128
_WIDTHS, _STRIDES = (32, 64, 96, 192), (2, 2, 1, 2)
_PLACES = 16
"""Channels of the map from which place and size are read."""
FEATURES = 96


class EmojiClassifier(nn.Module):
    """Four convolutions and a linear; its features are the 96 activations before the heads.

    The glyph is read from the maximum and the mean over all places, so that it is learned for all places at once; the box from a
    map of the places.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, width, stride in zip((3, *_WIDTHS), _WIDTHS, _STRIDES, strict=False):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.places = nn.Conv2d(_WIDTHS[-1], _PLACES, 1)
        self.last = nn.Linear(2 * _WIDTHS[-1] + _PLACES * (SIZE // 8) ** 2, FEATURES)
        self.glyph = nn.Linear(FEATURES, len(GLYPHS))
        self.ground = nn.Linear(FEATURES, len(GROUNDS))
        self.box = nn.Linear(FEATURES, 3)

    def features(self, images: Tensor) -> Tensor:
        """Images fp32 [N, 3, H, W] in [0, 1] -> [N, FEATURES]."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, size=(SIZE, SIZE), mode="area")
        found = self.body(images * 2 - 1)
        parts = [found.amax((2, 3)), found.mean((2, 3)), self.places(found).flatten(1)]
        return F.relu(self.last(torch.cat(parts, 1)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the glyph [N, 240] and of the ground [N, 10]; left edge, upper edge and side of the box, as shares [N, 3]."""
        found = self.features(images)
        return self.glyph(found), self.ground(found), self.box(found)

    def accuracy(self, images: Tensor, prompts: Sequence[str]) -> float:
        """The share of `images` [N, 3, H, W] in [0, 1] that show both glyph and ground of their prompt."""
        told = [pair_of(prompt) for prompt in prompts]
        wanted = torch.tensor([(-1, -1) if pair is None else (pair.glyph, pair.ground) for pair in told])
        glyph, ground, _ = self(images)
        found = torch.stack([glyph.argmax(1), ground.argmax(1)], 1).cpu()
        return float((found == wanted).all(1).double().mean())

    def save(self, folder: Path) -> None:
        """Write the weights into `folder`."""
        save_tensors(folder / CLASSIFIER_FILE, self.state_dict())


def extractor(path: Path | None, device: torch.device) -> Extractor:
    """Features and prompt following of the classifier in the folder `path`, for `evaluate.features`.

    Raises:
        UserError: if there is no such classifier.
    """
    classifier = trained_classifier(path).to(device)
    no_grad = torch.no_grad()
    return Extractor(features=no_grad(classifier.features), accuracy=no_grad(classifier.accuracy))


def trained_classifier(path: Path | None) -> EmojiClassifier:
    """The classifier in the folder `path`.

    Raises:
        UserError: if there is none.
    """
    classifier = EmojiClassifier()
    load_classifier(classifier, path, "`scfm data emoji` writes it into runs/emoji/classifier")
    return classifier.eval()


def train_classifier(drawn: Drawn, steps: int, seed: int = 0) -> EmojiClassifier:
    """A classifier of `drawn`. Half of the images are blurred and noisy, as those of a model are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = EmojiClassifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, max(2, steps), pct_start=0.1)
        glyphs = torch.tensor([pair.glyph for pair in drawn.pairs])
        grounds = torch.tensor([pair.ground for pair in drawn.pairs])
        for _ in range(steps):
            rows = torch.randint(len(glyphs), (_BATCH,))
            glyph, ground, box = classifier(_worse(drawn.images[rows] / 255))
            loss = F.cross_entropy(glyph, glyphs[rows]) + F.cross_entropy(ground, grounds[rows])
            loss = loss + 10 * F.mse_loss(box, drawn.boxes[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def _worse(images: Tensor) -> Tensor:
    """The first half of the rows with a blur of random width, and all with noise."""
    half = len(images) // 2
    share = torch.rand(half, 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(images[:half], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.cat([images[:half].lerp(blurred, share), images[half:]])
    return images + 0.03 * torch.randn_like(images)


@torch.no_grad()
def accuracy_of(classifier: EmojiClassifier, drawn: Drawn) -> dict[str, float]:
    """The shares of `drawn` whose glyph, whose ground, and whose glyph and ground are read; the error of the box, in pixels."""
    right, errors = [], []
    for at in range(0, len(drawn.pairs), 256):
        glyph, ground, box = classifier(drawn.images[at : at + 256] / 255)
        part = drawn.pairs[at : at + 256]
        wanted = torch.tensor([(pair.glyph, pair.ground) for pair in part])
        right.append(torch.stack([glyph.argmax(1), ground.argmax(1)], 1) == wanted)
        errors.append((box - drawn.boxes[at : at + 256]).abs() * SIZE)
    found = torch.cat(right)
    glyph_share, ground_share = found.double().mean(0).tolist()
    return {
        "glyph": glyph_share,
        "ground": ground_share,
        "both": float(found.all(1).double().mean()),
        "pixels": float(torch.cat(errors).mean()),
    }
