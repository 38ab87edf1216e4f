"""The captions of a folder's images: from caption files beside them, `metadata.jsonl` and `metadata.csv`."""

import csv
import difflib
import io
import itertools
import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from scfm_core.data.reading import may_pass, read_in_threads, retried
from scfm_core.data.scan import TEXT_SUFFIXES, Scan, same_name
from scfm_core.data.schema import BadData
from scfm_core.data.text import check_size, check_text, decode_text, shown_name
from scfm_core.errors import UserError


class NoCaption(BadData):
    """An image without a caption."""


@dataclass(frozen=True)
class _Row:
    """A line of metadata."""

    file_name: str
    text: str
    where: str
    """File and line, for messages."""


def read_captions(found: Scan, timeout: float) -> list[str | BadData]:
    """The caption of each image, or why it has no valid one.

    A row of metadata wins over a caption file. Metadata of a folder win over those of the folders above it.

    Args:
        found: the folder; what is not used is counted in `left_out`.
        timeout: seconds for errors of a file system that may pass.

    Raises:
        UserError: if a file of metadata is invalid, or gives one image two captions, or if a file cannot be read in time.
    """
    listed, texts = _read_metadata(found, timeout), _Texts(found)
    files = {path: texts.of(path) for path in found.images}
    needed = list(dict.fromkeys(file for path, file in files.items() if file is not None and path not in listed))
    content = dict(zip(needed, read_in_threads(needed, _read_text, timeout), strict=True))
    used: set[Path] = set()
    captions: list[str | BadData] = []
    is_first = True
    for path in found.images:
        file = files[path]
        if path in listed:
            captions.append(listed[path])
            if file is not None:
                found.leave_out("caption files of images that have a row of metadata", file)
        elif file is None:
            captions.append(_no_caption(found, path, with_near=is_first))
            is_first = False
        else:
            captions.append(content[file])
            if file in used:
                found.leave_out("images that share the caption file of another image", path)
        used |= {file} if file is not None else set()
    for file in found.texts:
        if file not in used:
            found.leave_out("caption files without an image", file)
    return captions


class _Texts:
    """Finds the caption file of an image."""

    def __init__(self, found: Scan) -> None:
        self._exact = set(found.texts)
        self._similar: dict[tuple[Path, str], Path] = {}
        for path in found.texts:
            self._similar.setdefault((path.parent, same_name(path.name)), path)

    def of(self, image: Path) -> Path | None:
        """`a.txt` or `a.caption` of `a.png`, else `a.png.txt`; if none exists, one in other capitals or Unicode form."""
        names = [stem + suffix for stem in (image.stem, image.name) for suffix in TEXT_SUFFIXES]
        for name in names:
            if (path := image.with_name(name)) in self._exact:
                return path
        similar = (self._similar.get((image.parent, same_name(name))) for name in names)
        return next((path for path in similar if path is not None), None)


def _read_text(path: Path) -> str | BadData:
    where = shown_name(str(path))
    try:
        check_size(path.stat().st_size, where)
        return decode_text(path.read_bytes(), where).strip()
    except BadData as error:
        return error
    except OSError as error:
        if may_pass(error):
            raise
        return BadData(f"data: {where} cannot be read ({error.strerror}). Make it readable")


def _no_caption(found: Scan, path: Path, *, with_near: bool) -> NoCaption:
    name, near = found.name(path), ""
    if with_near:  # for the first one only: the search takes time
        near = _near(path.stem, [text.name for text in found.texts if text.parent == path.parent])
    return NoCaption(
        f"data: {name!r} in {found.folder} has no caption{near}. Put it into "
        f'{PurePosixPath(name).with_suffix(".txt").as_posix()!r}, or add a line {{"file_name": "{name}", "text": "..."}} to '
        f"metadata.jsonl"
    )


def _near(name: str, others: list[str]) -> str:
    """` (there is 'x')` for the most similar name; empty if none is similar."""
    stem, stems = same_name(PurePosixPath(name).stem), [same_name(PurePosixPath(other).stem) for other in others]
    near = [stem] if stem in stems else difflib.get_close_matches(stem, stems[:2000], 1, 0.75)
    return f" (there is {shown_name(others[stems.index(near[0])])!r})" if near else ""


def _read_metadata(found: Scan, timeout: float) -> dict[Path, str | BadData]:
    """The caption of each image that has a row."""
    listed: dict[Path, str | BadData] = {}
    for folder, files in itertools.groupby(found.metadata, key=lambda path: path.parent):
        images, rows = _Images(found, folder), dict[Path, _Row]()
        for row in itertools.chain.from_iterable(_rows(file, timeout) for file in files):
            image = images.find(row)
            if image is None:
                is_first = not found.left_out[_WITHOUT_FILE]
                name = shown_name(row.file_name)
                found.leave_out(_WITHOUT_FILE, f"{name!r}{images.near(row) if is_first else ''}")
                continue
            first = rows.setdefault(image, row)
            if first.text != row.text:
                raise UserError(
                    f"data: {first.where} and {row.where} give the image {found.name(image)!r} two captions. Keep one of them"
                )
            if first is not row:
                found.leave_out("rows of metadata that repeat another row", row.where)
        listed |= {image: _checked(row) for image, row in rows.items()}
    return listed


_WITHOUT_FILE = "rows of metadata without an image"


def _checked(row: _Row) -> str | BadData:
    try:
        return check_text(row.text, row.where)
    except BadData as error:
        return error


class _Images:
    """Finds the image of a row: its path is relative to the folder of the metadata."""

    def __init__(self, found: Scan, folder: Path) -> None:
        self.folder = folder
        below = [path for path in found.images if path.is_relative_to(folder)]
        self._exact = {path.relative_to(folder).as_posix(): path for path in below}
        self._similar: dict[str, list[str]] = {}
        for name in self._exact:
            self._similar.setdefault(same_name(name), []).append(name)

    def find(self, row: _Row) -> Path | None:
        r"""The image that a row means, also with `./`, `sub\\x.png`, other capitals or another Unicode form.

        A path that begins at the root is of the machine that wrote it: here the end of it counts.

        Raises:
            UserError: if it may be one of several.
        """
        if row.file_name in self._exact:
            return self._exact[row.file_name]
        parts = self._parts(row.file_name)
        starts = range(len(parts)) if _is_absolute(row.file_name) else range(1)
        for name in ("/".join(parts[start:]) for start in starts):
            if name in self._exact:
                return self._exact[name]
            similar = self._similar.get(same_name(name), [])
            if len(similar) > 1:
                raise UserError(
                    f"data: {row.where} names {shown_name(row.file_name)!r}, which may be {' or '.join(map(repr, similar))}. Write "
                    f"the exact name"
                )
            if similar:
                return self._exact[similar[0]]
        return None

    def near(self, row: _Row) -> str:
        """` (there is 'x')` for the most similar image."""
        return _near("/".join(self._parts(row.file_name)), list(self._exact))

    @staticmethod
    def _parts(name: str) -> list[str]:
        return [part for part in posixpath.normpath(name.replace("\\", "/")).split("/") if part]


def _is_absolute(name: str) -> bool:
    return re.match(r"[/\\]|[A-Za-z]:", name) is not None


def _rows(path: Path, timeout: float) -> Iterator[_Row]:
    """The rows of a file of metadata; UserError for a line that is not one."""
    where = shown_name(str(path))
    try:
        text = decode_text(retried(path.read_bytes, lambda: where, timeout), where)
    except OSError as error:
        raise UserError(f"data: {where} cannot be read ({error.strerror}). Make it readable") from error
    try:
        for number, row in _csv_rows(text) if path.suffix.lower() == ".csv" else _json_rows(text):
            try:
                name, caption = row["file_name"], row["text"]
                if not isinstance(name, str) or not isinstance(caption, str):
                    raise TypeError("both must be strings")
            except (KeyError, TypeError) as error:
                keys = f", but has {', '.join(map(repr, row))}" if isinstance(row, dict) else ""
                raise UserError(
                    f'data: line {number} of {where} is not {{"file_name": ..., "text": ...}} ({error!r}{keys})'
                ) from error
            yield _Row(name, caption, f"line {number} of {where}")
    except _NotARow as error:
        raise UserError(
            f'data: line {error.args[0]} of {where} is not {{"file_name": ..., "text": ...}} ({error.args[1]})'
        ) from error


class _NotARow(Exception):
    """Number of a line, and what is wrong with it."""


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError also for a number of 5000 digits
                raise _NotARow(number, repr(error)) from error


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Columns are separated by commas, or by semicolons or tabs, as spreadsheets of some countries write them."""
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise _NotARow(reader.line_num, error) from error
