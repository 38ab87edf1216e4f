"""A folder of images with captions: caption files of the same names, `metadata.jsonl` or `metadata.csv`."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scfm_core.data.captions import NoCaption, read_captions
from scfm_core.data.image import IMAGE_SUFFIXES, image_size, load_picture, picture_notes
from scfm_core.data.reading import may_pass, read_in_threads
from scfm_core.data.scan import scan
from scfm_core.data.schema import BadData, Record, Size
from scfm_core.errors import UserError

_BLOCK = 4096
_UNCOMPRESSED = (".bmp", ".tif", ".tiff")


class ImageFolder:
    """Images in the order of their paths, each with its caption.

    Hidden names are left out, and so are files that are no images. Links are followed.

    Args:
        folder: searched recursively.
        strict: raise if an image has no valid caption. False: `caption` raises it for that image.
        timeout: seconds for errors of a file system that may pass.

    Raises:
        UserError: if there is no image, metadata are invalid, a file cannot be read in time, or, if `strict`, an image has no valid
            caption.
    """

    def __init__(self, folder: Path, *, strict: bool = True, timeout: float = 60.0) -> None:
        if not folder.is_dir():
            raise UserError(f"data: there is no folder {str(folder)!r}")
        self.folder, self._timeout = folder, timeout
        self._found = scan(folder, timeout)
        self.paths = self._found.images
        self._captions = read_captions(self._found, timeout) if self.paths else []
        self.notes = self._found.notes
        """What was left out of the folder, one line for each kind, with its number."""
        if not self.paths:
            left_out = f". Left out: {'; '.join(self.notes)}" if self.notes else ""
            raise UserError(f"data: {folder} has no images ({', '.join(IMAGE_SUFFIXES)}){left_out}")
        if strict:
            self._check_captions()
        self.marks = self._read_marks()
        """Of each image: its name, its caption, and a hash of its content."""
        self.fingerprint = hashlib.sha256(b"".join(self.marks)).hexdigest()

    def _check_captions(self) -> None:
        invalid = [caption for caption in self._captions if isinstance(caption, BadData)]
        missing = [caption for caption in invalid if isinstance(caption, NoCaption)]
        if missing:
            rows = f". Not used: {'; '.join(self.notes)}" if self.notes else ""
            raise UserError(
                f"data: {len(missing)} of {len(self.paths)} images have no caption. The first: "
                f"{str(missing[0]).removeprefix('data: ')}{rows}"
            )
        if invalid:
            raise UserError(str(invalid[0]))

    def _read_marks(self) -> list[bytes]:
        """See `marks`.

        To read every image in full would take hours for a terabyte. So of each image it takes the size and some blocks.
        In a compressed image the bytes after an edit all change, and a PNG ends with its checksums: first, middle and
        last block suffice. In an uncompressed one an edit changes only its own pixels, so more blocks are read. The
        time of the last change would be cheaper, but a copy has another one, and a copy must not be encoded again.
        """
        contents = read_in_threads(self.paths, _content_mark, self._timeout)
        # Why a caption is invalid may name the folder, which may be moved.
        told = ["\0invalid" if isinstance(caption, BadData) else caption for caption in self._captions]
        return [
            os.fsencode(path.relative_to(self.folder).as_posix()) + b":" + content + f":{caption}\n".encode()
            for path, content, caption in zip(self.paths, contents, told, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        """The path of image `index` relative to the folder."""
        return self._found.name(self.paths[index])

    def caption(self, index: int) -> str:
        """The caption of image `index`.

        Raises:
            BadData: if there is none, or it is not text.
        """
        caption = self._captions[index]
        if isinstance(caption, BadData):
            raise BadData(str(caption))  # a new one: a raised error keeps its traceback
        return caption

    def sizes(self, *, strict: bool = True) -> NDArray[np.int64]:
        """Height and width of every image in pixels, from its header: [images, 2].

        Args:
            strict: raise for an invalid image. False: it has the most frequent size, so that valid images may replace it; loading it
                raises BadData later.

        Raises:
            BadData: if `strict`, and an image is invalid; the message names it.
            UserError: if a file cannot be read in time.
        """

        def read(path: Path) -> Size | None:
            try:
                return image_size(path, str(path))
            except BadData:
                if strict:
                    raise
                return None

        found = read_in_threads(self.paths, read, self._timeout)
        [(usual, _)] = Counter(size for size in found if size is not None).most_common(1) or [((1, 1), 0)]
        return np.array([usual if size is None else size for size in found], np.int64).reshape(-1, 2)

    def picture_notes(self, index: int, size: Size) -> Sequence[str]:
        """`Picture.notes` of image `index` for `size`; BadData if it is not an image."""
        return picture_notes(self.paths[index], size, self.key(index))

    def load(self, index: int, size: Size, background: str = "white") -> Record:
        """Image `index` with its caption, resized to cover `size` and centre-cropped.

        Raises:
            BadData: if the image or its caption cannot be read.
        """
        picture = load_picture(self.paths[index], *size, background=background)
        return Record(key=self.key(index), caption=self.caption(index), image=picture.pixels, notes=picture.notes)


def _content_mark(path: Path) -> bytes:
    """Size of a file, and a hash of some of its blocks."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            count = 64 if path.suffix.lower() in _UNCOMPRESSED else 3
            step = max(_BLOCK, (size - _BLOCK) // (count - 1))
            places = range(0, max(1, size - _BLOCK), step)
            blocks = [os.pread(file.fileno(), _BLOCK, place) for place in (*places, max(0, size - _BLOCK))]
    except OSError as error:
        if may_pass(error):
            raise
        return b"unreadable"  # loading it raises BadData
    return f"{size}:{hashlib.sha256(b''.join(blocks)).hexdigest()}".encode()
