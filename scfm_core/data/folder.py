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

_ORIENTATION = 0x0112  # EXIF tag
# PIL's transposition that undoes each orientation.
_TRANSPOSITIONS = {
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
    """Images in the order of their paths, each with its caption.

    Args:
        folder: searched recursively.

    Raises:
        UserError: if there is no image, an image has no caption, or a caption file is invalid.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"data: there is no folder {str(folder)!r}")
        self.folder = folder
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not self.paths:
            raise UserError(f"data: {folder} has no images ({', '.join(IMAGE_SUFFIXES)})")
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
            text_file = path.with_suffix(".txt")
            if name in listed:
                captions.append(listed[name])
            elif text_file.is_file():
                captions.append(_read_text(text_file).strip())
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
        """Height and width of every image in pixels, from its header.

        Args:
            strict: raise for an invalid image. False: it counts as a square; loading it raises BadData later.

        Raises:
            BadData: if `strict`, and an image is invalid; the message names it.
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
        """Image `index` with its caption, resized to cover `size` and centre-cropped.

        Raises:
            BadData: if the image cannot be read.
        """
        path = self.paths[index]
        return Record(
            key=path.relative_to(self.folder).as_posix(),
            caption=self._captions[index],
            image=load_image(path, *size),
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # utf-8-sig drops a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(
            f"data: {path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8"
        ) from error


def load_image(source: Path | bytes, height: int, width: int, name: str | None = None) -> Tensor:
    """An image resized to cover `height` x `width` and centre-cropped: fp32 [3, height, width] in [-1, 1].

    Args:
        source: a file, or its content.
        height, width: in pixels.
        name: of the image in messages; by default its path.

    Raises:
        BadData: if it is not a readable image.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with _open_image(source, name) as opened:
        # PIL's exif_transpose would also rewrite the other tags, and it fails for unusual ones.
        transposition = _TRANSPOSITIONS.get(_orientation(opened))
        if transposition is None:
            opened.draft("RGB", (width, height))  # decodes a JPEG at 1/2, 1/4 or 1/8 of its size, if that is enough
        image = opened if transposition is None else opened.transpose(getattr(Image.Transpose, transposition))
        if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
    fitted = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def image_size(source: Path | bytes, name: str) -> Size:
    """Height and width of an image as it is displayed (after its EXIF orientation), in pixels, from its header.

    Raises:
        BadData: if it is not an image.
    """
    with _open_image(source, name) as opened:
        width, height = opened.size
        is_rotated = _orientation(opened) >= 5  # by 90 degrees
    return (width, height) if is_rotated else (height, width)


def _orientation(image: Any) -> int:
    # PIL decodes a whole PNG to look for EXIF data after its pixels, so only EXIF data before the pixels counts.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if isinstance(orientation, int) else 1


@contextlib.contextmanager
def _open_image(source: Path | bytes, name: str | None) -> Iterator[Any]:
    """Open an image with PIL; the errors of PIL become BadData."""
    from PIL import Image

    try:
        # Only these formats: some of PIL's other formats run programs (EPS) or are rarely tested.
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=_FORMATS) as opened:
            yield opened
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises all of these
        raise BadData(
            f"data: {source if isinstance(source, Path) else name} is not a readable image ({error}). Remove it or replace it"
        ) from error
