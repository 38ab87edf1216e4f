"""The files of an image folder: which are images, captions or metadata, and which are left out."""

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from scfm_core.data.image import IMAGE_SUFFIXES
from scfm_core.data.reading import retried
from scfm_core.data.text import shown_name
from scfm_core.errors import UserError
from scfm_core.progress import beat

TEXT_SUFFIXES = (".txt", ".caption")
"""Of caption files; the second one is the default of kohya's scripts."""
METADATA = ("metadata.jsonl", "metadata.csv")
"""Captions of many images, as the imagefolder of Hugging Face's datasets has them."""

# Made by file managers, servers and archivers beside people's files; a name that begins with a dot is hidden too.
_HIDDEN = frozenset(
    {
        "__macosx",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
    }
)


@dataclass
class Scan:
    """What `scan` found."""

    folder: Path
    images: list[Path] = field(default_factory=list)
    """In the order of their paths."""
    texts: list[Path] = field(default_factory=list)
    """Caption files."""
    metadata: list[Path] = field(default_factory=list)
    """Those of a folder come before those of its subfolders."""
    left_out: Counter[str] = field(default_factory=Counter)
    """What was left out, in words, and how often."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first one of each kind."""

    def leave_out(self, kind: str, example: str | Path) -> None:
        """Count something that is left out."""
        self.left_out[kind] += 1
        self.examples.setdefault(kind, self.name(example) if isinstance(example, Path) else example)

    def name(self, path: Path) -> str:
        """The path of a file relative to the folder, with `/`, as text that can be stored and printed."""
        return shown_name(path.relative_to(self.folder).as_posix())

    @property
    def notes(self) -> list[str]:
        """One line for each kind of what was left out."""
        return [f"{kind}: {count}, for example {self.examples[kind]}" for kind, count in self.left_out.items()]


def same_name(name: str) -> str:
    """Equal for two names that people take for the same: in capitals or not, in composed or decomposed Unicode.

    macOS stores an accent as a character of its own (NFD); most other systems do not (NFC).
    """
    return unicodedata.normalize("NFC", name).casefold()


def scan(folder: Path, timeout: float) -> Scan:
    """Search a folder and its subfolders. Links to folders are followed, and no folder is read twice, so loops end.

    Args:
        folder: an existing folder.
        timeout: seconds for errors of a file system that may pass.

    Raises:
        UserError: if a folder cannot be read.
    """
    found, seen, links = Scan(folder), set(), [folder]
    while links:
        # A link is followed after the real folders. So a folder that is reached in both ways has its real name.
        pending, links = [links[0]], links[1:]
        while pending:
            path = pending.pop()
            identity = _identity(path)
            if identity in seen:
                found.leave_out("links to a folder that is read already", path)
                continue
            seen.add(identity)
            beat(f"searching {folder}")
            for entry in _entries(path, timeout):
                if not _is_folder(entry, found, timeout):
                    continue
                (links if entry.is_symlink() else pending).append(Path(entry.path))
    found.images.sort()
    found.texts.sort()
    found.metadata.sort(key=lambda path: (len(path.parts), path))
    return found


def _entries(folder: Path, timeout: float) -> list[os.DirEntry[str]]:
    def read() -> list[os.DirEntry[str]]:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    try:
        return retried(read, lambda: shown_name(str(folder)), timeout)
    except OSError as error:
        raise UserError(
            f"data: the folder {shown_name(str(folder))} cannot be read ({error.strerror}). Make it readable, or move it elsewhere"
        ) from error


def _is_folder(entry: os.DirEntry[str], found: Scan, timeout: float) -> bool:
    """Whether an entry is a folder to search; a file goes to its kind."""
    name, path = entry.name, Path(entry.path)
    suffix = path.suffix.lower()
    if name.startswith(".") or name.lower() in _HIDDEN:
        found.leave_out("hidden names", path)
        return False
    try:
        is_folder, is_file = retried(lambda: (entry.is_dir(), entry.is_file()), lambda: shown_name(entry.path), timeout)
    except OSError:  # a link to itself
        is_folder = is_file = False
    if is_folder:
        return True
    if not is_file:
        found.leave_out("links to nothing" if entry.is_symlink() else "pipes and devices", path)
    elif suffix in IMAGE_SUFFIXES:
        found.images.append(path)
    elif name.lower() in METADATA:
        found.metadata.append(path)
    elif suffix in TEXT_SUFFIXES:
        found.texts.append(path)
    else:
        found.leave_out(f"{suffix} files" if suffix else "files without a suffix", path)
    return False


def _identity(folder: Path) -> tuple[int, int] | str:
    """The same for every path of one folder. Some network file systems number all files 0."""
    try:
        status = folder.stat()
    except OSError:
        return str(folder)  # `_entries` raises the error
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)
