"""Decoding one image: what cameras, editors and browsers write becomes RGB pixels of the wanted size."""

import contextlib
import functools
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm_core.data.reading import may_pass
from scfm_core.data.schema import BadData, Size
from scfm_core.data.text import shown_name

# Only these formats: some of PIL's other formats run programs (EPS) or are rarely tested.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000")
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2",
)  # fmt: skip

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
# What a file is that PIL does not read, by its first bytes.
_OTHER_CONTENT = (
    (rb"version https://git-lfs", "it is a pointer of Git LFS: run `git lfs pull`"),
    (rb"\s*<(?:!doctype|html|head|\?xml)", "it is a page, which a failed download leaves"),
    (rb"....ftyp(?:hei|hev|mif1|msf1)", "it is HEIC, whatever its suffix: convert it to JPEG"),
    (rb"\0\x05\x16[\0\x07]", "it is macOS's AppleDouble file, not the image"),
    (rb"PK\x03\x04|Rar!|7z\xbc|\x1f\x8b", "it is an archive: unpack it"),
    (rb"%PDF", "it is a PDF"),
    (rb"8BPS", "it is a Photoshop file: export it"),
)

_MAX_TEXT = 64 << 20
"""Bytes of text in a PNG, decompressed; more is taken for an attack."""
_LEAST_KEPT = 0.6
"""Share of an image that is kept without a word. A photo of 3:2 in a square keeps 0.67."""

CROPPED = "of another shape than their size in training, more than 40 % cut off (aspect-ratio buckets: data.buckets, data.bucket_step)"
ENLARGED = "smaller than their size in training, enlarged"
TRANSPARENT = "transparent, laid on data.background"
ANIMATED = "of several frames or pages, the first one taken"


@dataclass(frozen=True)
class Picture:
    """An image as training sees it."""

    pixels: Tensor
    """uint8 [3, height, width]; `unit_range` makes it what networks take."""
    notes: tuple[str, ...]
    """What may surprise: `CROPPED`, `ENLARGED`, `TRANSPARENT`, `ANIMATED`."""


def unit_range(pixels: Tensor) -> Tensor:
    """Pixels uint8 -> fp32 in [-1, 1], bit for bit the same on every device.

    Images are uint8 until they are on the device: a quarter of the bytes to pass and to copy.
    """
    # A tensor and not a number: CUDA multiplies by the reciprocal of a number, which differs in the last bit.
    return pixels.float() / torch.full((), 127.5, device=pixels.device) - 1


def load_picture(
    source: Path | bytes, height: int, width: int, name: str | None = None, background: str = "white"
) -> Picture:
    """An image resized to cover `height` x `width` and centre-cropped.

    Its EXIF orientation is applied, transparent parts show the background, and the colours of an embedded ICC profile
    become sRGB. Of an animation or a file of several pages the first one is taken.

    Args:
        source: a file, or its content.
        height, width: in pixels.
        name: of the image in messages; by default its path.
        background: a colour as PIL names it, for example `white` or `#808080`.

    Raises:
        BadData: if it is not a readable image.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with _open_image(source, name) as opened:
        notes = _header_notes(opened, (height, width))
        transposition = _TRANSPOSITIONS.get(_orientation(opened))
        if transposition is None:
            opened.draft("RGB", (width, height))  # decodes a JPEG at 1/2, 1/4 or 1/8 of its size, if that is enough
        opened.load()
        image = _eight_bits(opened)
        if _has_alpha(image):
            image = image.convert("RGBA")
            if image.getextrema()[3][0] < 255:
                notes.append(TRANSPARENT)
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
        elif image.mode not in ("L", "CMYK"):  # these may have a profile of their own kind
            image = image.convert("RGB")
        if transposition is not None:
            # PIL's exif_transpose would also rewrite the other tags, and it fails for unusual ones.
            image = image.transpose(getattr(Image.Transpose, transposition))
        fitted = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
        fitted = _to_srgb(fitted, opened.info.get("icc_profile"))
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
    return Picture(pixels.contiguous(), tuple(notes))


def image_size(source: Path | bytes, name: str) -> Size:
    """Height and width of an image as it is displayed (after its EXIF orientation), in pixels, from its header.

    Raises:
        BadData: if it is not an image.
    """
    with _open_image(source, name) as opened:
        return _shown_size(opened)


def picture_notes(source: Path | bytes, size: Size, name: str) -> tuple[str, ...]:
    """`Picture.notes` for `size`; only an image with an alpha channel is decoded.

    Raises:
        BadData: if it is not an image.
    """
    with _open_image(source, name) as opened:
        notes = _header_notes(opened, size)
        if _has_alpha(opened) and opened.convert("RGBA").getextrema()[3][0] < 255:
            notes.append(TRANSPARENT)
    return tuple(notes)


def _header_notes(opened: Any, size: Size) -> list[str]:
    (height, width), notes = _shown_size(opened), []
    if height < size[0] or width < size[1]:
        notes.append(ENLARGED)
    ratio = height * size[1] / (width * size[0])
    if min(ratio, 1 / ratio) < _LEAST_KEPT:
        notes.append(CROPPED)
    # MPO is the JPEG of a camera, with previews or a second eye behind the photo.
    if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:
        notes.append(ANIMATED)
    return notes


def _has_alpha(image: Any) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _eight_bits(image: Any) -> Any:
    """The image with 8 bits a channel. PIL itself would clip 16-bit grey at 255."""
    import numpy as np
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its grey values of {values.dtype} have no fixed range; save it with 8 or 16 bits")
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits, is_inverted = 12 if tags.get(258) == (12,) else 16, tags.get(262) == 0  # BitsPerSample; WhiteIsZero
    grey = (values >> bits - 8).astype(np.uint8)
    return Image.fromarray(~grey if is_inverted else grey)  # PIL inverts 8 bits itself


def _to_srgb(image: Any, profile: bytes | None) -> Any:
    """RGB in sRGB. A profile that is damaged, or of another kind of image, is ignored, as browsers do."""
    from PIL import ImageCms

    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            described = ImageCms.getProfileDescription(given).lower()
            if image.mode != "RGB" or "srgb" not in described or "linear" in described:
                return ImageCms.profileToProfile(image, given, _srgb(), outputMode="RGB")
    return image.convert("RGB")


@functools.cache
def _srgb() -> Any:
    from PIL import ImageCms

    return ImageCms.createProfile("sRGB")


def _shown_size(opened: Any) -> Size:
    width, height = opened.size
    return (width, height) if _orientation(opened) >= 5 else (height, width)  # rotated by 90 degrees


def _orientation(image: Any) -> int:
    # PIL decodes a whole PNG to look for EXIF data after its pixels, so only EXIF data before the pixels counts.
    # PIL itself applies the orientation of a TIFF.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if isinstance(orientation, int) else 1


@contextlib.contextmanager
def _open_image(source: Path | bytes, name: str | None) -> Iterator[Any]:
    """Open an image with PIL; the errors of PIL become BadData, but not those of the disk that may pass."""
    image, unidentified, errors = _pil()
    try:
        with image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=_FORMATS) as opened:
            yield opened
    except errors as error:
        if may_pass(error):
            raise
        where = shown_name(str(source)) if isinstance(source, Path) else name
        reason = _known_content(source) or (
            f"its content is of none of the formats {', '.join(_FORMATS)}"
            if isinstance(error, unidentified)
            else str(error)
        )
        raise BadData(f"data: {where} is not a readable image ({reason}). Remove it or replace it") from error


@functools.cache
def _pil() -> tuple[Any, Any, tuple[type[BaseException], ...]]:
    """PIL's Image, its error for unknown content, and all errors that it raises for a damaged file."""
    import struct
    import warnings

    from PIL import Image, PngImagePlugin, UnidentifiedImageError

    # The text and the profile of a PNG, which may be a workflow of ComfyUI: PIL's limit of 1 MiB refuses real images.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXT
    # Above 179 megapixels it is an error. Below, a warning in each process would be noise.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    # The decoder of AVIF raises RuntimeError.
    of_file = (OSError, EOFError, SyntaxError, ValueError, OverflowError, struct.error, Image.DecompressionBombError)
    return Image, UnidentifiedImageError, (*of_file, KeyError, TypeError, IndexError, RuntimeError)


def _known_content(source: Path | bytes) -> str | None:
    """What a file is instead of an image, if its first bytes show it."""
    try:
        if isinstance(source, Path):
            with source.open("rb") as file:
                head = file.read(4096)
        else:
            head = source[:4096]
    except OSError:
        return None
    if not head:
        return "it is empty"
    if not head.strip(b"\0"):
        return "it has only zero bytes, as a power failure leaves a file"
    return next((what for pattern, what in _OTHER_CONTENT if re.match(pattern, head, re.IGNORECASE | re.DOTALL)), None)
