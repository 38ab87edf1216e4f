"""Images of the benchmark with rich prompts: emoji on coloured grounds, drawn from a font that a package of Debian has.

A caption tells the glyph and the ground ("red apple on a blue background"). It does not tell the place, the size and the shade, so
the images of one caption differ, as those of a real prompt do. One pair of glyph and ground in five is held out of training.
"""

import functools
import json
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm_core.errors import UserError

SIZE = 32
"""Pixels of an image's side."""
SIZES = (20, 24, 28)
"""Sides of a glyph's box, in pixels."""
PLACE = 4
"""A glyph's left and upper edges are multiples of this many pixels. Any shift would need a model that two cores cannot train."""
SHADE = 18
"""A ground's red, green and blue differ from its colour by at most this much, of 255."""
PLANTS = "🌵🌷🌹🌻🌽🌲🌴🌱🌰🍀🍁🍄🌸🍅🍆🍇🍉🍊🍋🍌🍍🍎🍏🍐🍑🍒🍓🥝🥥🥑🥕🥦🥒🧅🫐"
FOOD = "🌭🌮🍔🍕🍗🍙🍚🍜🍞🍟🍣🍤🍦🍩🍪🍫🍬🍭🍮🍯🍰🍿🥐🥓🥚🥞🥨🧀🧁🎂🍷🍹🍼🥛🫖"
ANIMALS = (
    "🐄🐅🐇🐈🐉🐊🐋🐌🐍🐎🐐🐒🐓🐔🐕🐘🐙🐚🐛🐜🐝🐞🐟🐠🐡🐢🐣🐤🐧🐨🐪🐬🐭🐮🐯"
    "🐰🐱🐲🐴🐵🐶🐷🐸🐺🐻🐼🐾🦀🦁🦂🦄🦅🦆🦇🦈🦉🦊🦋🦌🦎🦏🦑🦒🦓🦔🦕🦖🦚🦜🦩"
)
THINGS = (
    "🎀🎁🎃🎄🎈🎒🎓🎡🎤🎧🎨🎩🎪🎮🎯🎲🎷🎸🎹🎺🎻🏀🏆🏈🏠🏰👑👒👓👕👖👗👜👟👠💄💊💍💎💐💡💣💧💀👻👽👾💰"
    "💻📗📘📙📎📦📷📺📻🔑🔒🔔🔥🔧🔨🔮🔋🥁🥊🧤🧦🧩🧭🧲🧸🪁🪐🪑🌙🌟💙💚💛💜🚀🚁🚂🚌🚑🚒🚓🚕🚗🚚🚜🚢🚤🚲🛵🛶🛸🛹"
)
GLYPHS = PLANTS + FOOD + ANIMALS + THINGS
GROUNDS = {
    "red": (200, 50, 45),
    "orange": (235, 140, 40),
    "yellow": (240, 210, 70),
    "green": (70, 150, 75),
    "blue": (60, 105, 200),
    "purple": (130, 75, 170),
    "pink": (240, 160, 190),
    "brown": (125, 85, 55),
    "white": (240, 240, 240),
    "black": (28, 28, 32),
}
_COLOURS = tuple(GROUNDS.values())
_BITMAP = 109
"""The one size of the font's bitmaps, in pixels."""
_PLACES = ("truetype/noto", "noto", "google-noto-emoji", "google-noto-color-emoji-fonts")
_ON = " on a "
_BACKGROUND = " background"


def name_of(glyph: int) -> str:
    """Unicode's name of a glyph, in words of letters: `red apple`, `t rex`."""
    return unicodedata.name(GLYPHS[glyph]).lower().replace("-", " ")


NAMES = tuple(name_of(glyph) for glyph in range(len(GLYPHS)))
GROUND_NAMES = tuple(GROUNDS)


@dataclass(frozen=True)
class Pair:
    """A glyph and a ground, by number."""

    glyph: int
    ground: int

    @property
    def is_held_out(self) -> bool:
        """Whether no image of training shows it. Every glyph is held out on two grounds of ten."""
        return (self.glyph + self.ground) % 5 == 0

    @property
    def caption(self) -> str:
        """What is told of its images."""
        return f"{NAMES[self.glyph]}{_ON}{GROUND_NAMES[self.ground]}{_BACKGROUND}"


def pairs(*, held_out: bool) -> list[Pair]:
    """The pairs of training, or those that are held out; neighbours have different glyphs."""
    every = (Pair(glyph, ground) for ground in range(len(GROUNDS)) for glyph in range(len(GLYPHS)))
    return [pair for pair in every if pair.is_held_out == held_out]


def pair_of(caption: str) -> Pair | None:
    """The pair that a caption tells; None if it tells none."""
    name, on, rest = caption.partition(_ON)
    ground = rest.removesuffix(_BACKGROUND)
    if not on or name not in NAMES or ground not in GROUND_NAMES:
        return None
    return Pair(NAMES.index(name), GROUND_NAMES.index(ground))


def words() -> list[str]:
    """All words of all captions."""
    captions = (pair.caption for held_out in (False, True) for pair in pairs(held_out=held_out))
    return sorted({word for caption in captions for word in caption.split()})


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Images and what they show; row i belongs to one pair."""

    images: Tensor
    """uint8 [N, 3, SIZE, SIZE]."""
    pairs: list[Pair]
    boxes: Tensor
    """Left edge, upper edge and side of each glyph's box, as shares of SIZE: fp32 [N, 3]. No caption tells them."""


class Font:
    """A colour font with bitmaps.

    Args:
        path: NotoColorEmoji.ttf; None: where the packages of Linux distributions put it.

    Raises:
        UserError: if there is no such font, or if it has no bitmaps.
    """

    def __init__(self, path: Path | None = None) -> None:
        from PIL import ImageFont

        places = [Path("/usr/share/fonts", place, "NotoColorEmoji.ttf") for place in _PLACES]
        found = path or next((place for place in places if place.is_file()), None)
        install = (
            "Install the package fonts-noto-color-emoji (`apt-get install fonts-noto-color-emoji`), or give --font FILE"
        )
        if found is None or not found.is_file():
            raise UserError(f"the font NotoColorEmoji.ttf is missing ({found or places[0].parent}). {install}")
        try:
            self._font: Any = ImageFont.truetype(found, _BITMAP)
        except OSError as error:
            raise UserError(f"{found} has no colour bitmaps of {_BITMAP} pixels ({error}). {install}") from error
        self._path = found
        self.picture = functools.cache(self._picture)

    def _picture(self, glyph: int, side: int) -> Any:
        """A glyph in a square of `side` pixels, as an RGBA image of Pillow.

        Raises:
            UserError: if the font lacks it.
        """
        from PIL import Image

        whole = self._whole(glyph)
        square = Image.new("RGBA", (max(whole.size),) * 2)
        square.paste(whole, ((square.width - whole.width) // 2, (square.height - whole.height) // 2))
        return square.resize((side, side), Image.Resampling.LANCZOS)

    def _whole(self, glyph: int) -> Any:
        """The glyph's bitmap without the empty rows and columns around it."""
        from PIL import Image, ImageDraw

        canvas = Image.new("RGBA", (2 * _BITMAP, 2 * _BITMAP))
        ImageDraw.Draw(canvas).text((0, 0), GLYPHS[glyph], font=self._font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise UserError(f"{self._path} lacks {NAMES[glyph]!r}; its version is too old")
        return canvas.crop(box)


def draw(font: Font, wanted: Sequence[Pair], copies: int) -> Drawn:
    """`copies` images of each pair. An image is a function of its pair and the number of the copy."""
    import numpy as np
    from PIL import Image

    rows = [pair for _ in range(copies) for pair in wanted]
    images = np.empty((len(rows), SIZE, SIZE, 3), np.uint8)
    boxes = torch.empty(len(rows), 3)
    for row, pair in enumerate(rows):
        chance = random.Random(f"{pair.glyph} {pair.ground} {row // len(wanted)}")
        side = chance.choice(SIZES)
        left, upper = (PLACE * chance.randint(0, (SIZE - side) // PLACE) for _ in range(2))
        shade = tuple(min(255, max(0, value + chance.randint(-SHADE, SHADE))) for value in _COLOURS[pair.ground])
        image, glyph = Image.new("RGB", (SIZE, SIZE), shade), font.picture(pair.glyph, side)
        image.paste(glyph, (left, upper), glyph)
        images[row] = np.asarray(image)
        boxes[row] = torch.tensor([left, upper, side]) / SIZE
    return Drawn(images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), pairs=rows, boxes=boxes)


def write_images(folder: Path, drawn: Drawn) -> None:
    """The images as PNG files with `metadata.jsonl`, as `scfm data encode` reads them."""
    from PIL import Image

    folder.mkdir(parents=True)
    rows = []
    for number, (image, pair) in enumerate(zip(drawn.images, drawn.pairs, strict=True)):
        name = f"{number:05d}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": pair.caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")


def write_prompts(path: Path, wanted: Sequence[Pair]) -> None:
    """One caption on each line."""
    path.write_text("".join(f"{pair.caption}\n" for pair in wanted), encoding="utf-8")
