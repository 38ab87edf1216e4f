"""A folder of images with captions: same-named `.txt` files, or `metadata.jsonl` (`file_name`, `text`)."""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm_core.data.schema import BadData, Record, Size
from scfm_core.errors import UserError

_ORIENTATION = 0x0112  # the EXIF tag, and what undoes its values
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


class ImageFolder:
    """Images in the order of their names, each with its caption.

    Args:
        folder: searched recursively.

    Raises:
        UserError: if there is no image, or an image has no caption.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"data: there is no folder {str(folder)!r}")
        self.folder = folder
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not self.paths:
            raise UserError(f"data: {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        self._captions = self._read_captions()
        digest = hashlib.sha256()
        for path, caption in zip(self.paths, self._captions, strict=True):
            digest.update(f"{path.relative_to(folder)}:{path.stat().st_size}:{caption}\n".encode())
        self.fingerprint = digest.hexdigest()

    def _read_captions(self) -> list[str]:
        listed = self._read_metadata()
        captions, missing = [], []
        for path in self.paths:
            name = path.relative_to(self.folder).as_posix()
            beside = path.with_suffix(".txt")
            if name in listed:
                captions.append(listed[name])
            elif beside.is_file():
                captions.append(_read_text(beside).strip())
            else:
                missing.append(name)
        if missing:
            raise UserError(
                f"data: {len(missing)} of {len(self.paths)} images in {self.folder} have no caption, the first is "
                f"{missing[0]!r}. Put the caption into {Path(missing[0]).with_suffix('.txt').as_posix()!r}, or add a "
                f'line {{"file_name": "{missing[0]}", "text": "..."}} to metadata.jsonl'
            )
        return captions

    def _read_metadata(self) -> dict[str, str]:
        path = self.folder / "metadata.jsonl"
        if not path.is_file():
            return {}
        listed = {}
        for number, line in enumerate(_read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row["file_name"], str) or not isinstance(row["text"], str):
                    raise TypeError("both must be strings")
                listed[row["file_name"]] = row["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f'data: line {number} of {path} is not {{"file_name": ..., "text": ...}} ({error!r})'
                ) from error
        return listed

    def __len__(self) -> int:
        return len(self.paths)

    def caption(self, index: int) -> str:
        """The caption of image `index`."""
        return self._captions[index]

    def sizes(self, *, strict: bool = True) -> list[Size]:
        """Height and width of every image, from its header.

        Args:
            strict: BadData names one that is none; else it counts as a square, and is met when it is loaded.
        """
        sizes = []
        for path in self.paths:
            try:
                sizes.append(image_size(path, str(path)))
            except BadData:
                if strict:
                    raise
                sizes.append((1, 1))
        return sizes

    def load(self, index: int, size: Size) -> Record:
        """Image `index`, resized to cover `size` and centre-cropped, with its caption; BadData if it cannot be read."""
        path = self.paths[index]
        return Record(
            key=path.relative_to(self.folder).as_posix(),
            caption=self._captions[index],
            image=load_image(path, *size),
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of a caption
    except UnicodeDecodeError as error:
        raise UserError(
            f"data: {path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8"
        ) from error


def load_image(source: Path | bytes, height: int, width: int, name: str | None = None) -> Tensor:
    """An image resized to cover `height` x `width` and centre-cropped: fp32 [3, height, width] in [-1, 1].

    Args:
        source: a file, or its content.
        height, width: in pixels.
        name: for messages; by default the path.

    Raises:
        BadData: if it is not a readable image.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with _opened(source, name) as opened:
        # PIL's exif_transpose would also write the other tags anew, and fail at odd ones.
        turn = _TURNS.get(_orientation(opened))
        if turn is None:
            opened.draft("RGB", (width, height))  # a JPEG is decoded at half, a quarter ... where that is enough
        image = opened if turn is None else opened.transpose(getattr(Image.Transpose, turn))
        if image.mode.startswith("I"):  # 16-bit grey: PIL would clip it at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
    fitted = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def image_size(source: Path | bytes, name: str) -> Size:
    """Height and width as it is shown, from the header alone; BadData if it is no image."""
    with _opened(source, name) as opened:
        width, height = opened.size
        turned = _orientation(opened) >= 5  # by a quarter
    return (width, height) if turned else (height, width)


def _orientation(image: Any) -> int:
    # Asked for its EXIF data, a PNG that has none before its pixels would be decoded whole.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    turn = image.getexif().get(_ORIENTATION, 1)
    return turn if isinstance(turn, int) else 1


@contextlib.contextmanager
def _opened(source: Path | bytes, name: str | None) -> Iterator[Any]:
    """PIL's image; what PIL raises at a damaged one becomes BadData."""
    from PIL import Image

    try:
        # A whitelist: PIL's other formats include some that run programs (EPS) or are rarely tested.
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=_FORMATS) as opened:
            yield opened
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises all of these
        raise BadData(
            f"data: {source if isinstance(source, Path) else name} is not a readable image ({error}). Remove it or replace it"
        ) from error
