"""The benchmark with rich prompts, so small that a test makes it in seconds, and without the font."""

from pathlib import Path

from PIL import Image, ImageDraw

from recipes import emoji, emoji_images


class StandIn:
    """Stands in for `Font`: a shape and a colour for each glyph."""

    def __init__(self, path=None):
        pass

    def picture(self, glyph, side):
        square = Image.new("RGBA", (side, side))
        shape = getattr(ImageDraw.Draw(square), ("ellipse", "rectangle")[glyph % 2])
        shape((0, 0, side - 1, side - 1), fill=(glyph * 90 % 256, glyph * 50 % 256, 255 - glyph * 70 % 256, 255))
        return square


def make_small(root: Path, monkeypatch) -> list[str]:
    """Make `scfm data emoji` small; returns its words."""
    few = [emoji_images.Pair(glyph, ground) for glyph in range(10) for ground in range(2)]
    monkeypatch.setattr(emoji, "Font", StandIn)
    monkeypatch.setattr(emoji, "pairs", lambda held_out: [pair for pair in few if pair.is_held_out == held_out])
    for name, value in (
        ("_COPIES", 2),
        ("_HELD_OUT_COPIES", 2),
        ("_VAE_STEPS", 1),
        ("_SHEET_STEPS", 1),
        ("_CLASSIFIER_STEPS", 1),
    ):
        monkeypatch.setattr(emoji, name, value)
    short = [
        "train.steps=1",
        "train.warmup_steps=0",
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
        "sample.every=0",
    ]
    return ["data", "emoji", "-o", str(root), *short]
