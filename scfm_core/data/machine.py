"""Arrays that one process of a machine makes for all: files in `data.cache.dir`, which every process maps into its memory.

Each file has a name made of everything that its content depends on, so it is never stale. It is written under another name
and renamed. Its layout is that of safetensors (https://github.com/huggingface/safetensors#format).
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from scfm_core.errors import UserError
from scfm_core.files import lock_file, written_whole
from scfm_core.progress import beat

Array = NDArray[Any]
_TYPES = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "U8": np.uint8, "F32": np.float32, "F64": np.float64}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_ENDING = ".safetensors"
_POLL = 0.02
_warned: set[str] = set()


@dataclass(frozen=True)
class Arrays:
    """Named arrays, and a text for each other value. Those of a file are read-only, and shared by all processes."""

    values: Mapping[str, Array]
    texts: Mapping[str, str] = field(default_factory=dict)
    file: IO[bytes] | None = None
    """The mapped file. While it is open it is not deleted by other processes."""

    def __getitem__(self, name: str) -> Array:
        return self.values[name]


@dataclass(frozen=True)
class MachineFiles:
    """Files of arrays that the processes of a machine share.

    Args:
        folder: `data.cache.dir`; made when the first file is written. On a file system without flock, several processes may
            make the same file; the content is the same.
        patience: seconds without progress after which a process no longer waits for the one that makes a file.
    """

    folder: Path
    patience: float

    def get(self, kind: str, key: str, make: Callable[[Callable[[], None]], Arrays], *, kept: int = 4) -> Arrays:
        """Arrays from a file. If there is none, one process makes it, and the others wait.

        Args:
            kind: of the content, as "order": the name of the subfolder, and for messages.
            key: of the content: a hash of everything that it depends on.
            make: makes the arrays. It gets a function to call after each unit of work, so that the others see progress.
            kept: files in the subfolder. The others that nobody uses are deleted, the least recently used ones first.

        Returns:
            the arrays of the file. If the folder cannot be written, which is said once, those of this process.
        """
        path, made = self.folder / kind / f"{key}{_ENDING}", None
        is_making = False
        try:
            if (found := _load(path)) is not None:
                return found
            path.parent.mkdir(parents=True, exist_ok=True)
            with alone(path.with_suffix(".lock"), self.patience, kind) as step:
                if (found := _load(path)) is not None:
                    return found
                is_making = True
                made = make(step)
                is_making = False
                with written_whole(path, "data.cache.dir", "Choose another folder") as partial:
                    _write(partial, made)
                _prune(path.parent, kept)
                return _load(path) or made
        except (OSError, UserError) as error:
            if is_making:
                raise
            reason = (
                str(error)
                if isinstance(error, UserError)
                else f"data.cache.dir: {self.folder} cannot be used ({error.strerror})"
            )
            warn_once(f"{reason}. Each process keeps the {kind} in its own memory")
        return make(lambda: beat(kind)) if made is None else made

    def fetch(
        self, address: str, download: Callable[[Path, float], None], timeout: float, large: int
    ) -> Path | bytes | None:
        """A remote object as it is now: a copy that another process has made since this call began, or an own one.

        So processes that start together download a large one once. An older copy is not used: nothing shows that it is still
        right.

        Args:
            address: of the object.
            download: writes it to a path, within some seconds.
            timeout: seconds, with the time of waiting for another process.
            large: bytes; a smaller object is not kept.

        Returns:
            the path of the copy, or a small object's content; None if the folder cannot be used.

        Raises:
            UserError: of `download`, or if the disk is full.
        """
        begun, end = time.time_ns(), time.monotonic() + timeout
        path = self.folder / "fetched" / hashlib.sha256(address.encode(errors="surrogatepass")).hexdigest()[:32]
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(alone(path.with_suffix(".lock"), timeout, f"download of {address}"))
                if path.exists() and path.stat().st_mtime_ns >= begun:
                    return path
            except OSError:
                return None
            with written_whole(path, "data.cache.dir", "Choose another folder") as partial:
                download(partial, max(1.0, end - time.monotonic()))
            if path.stat().st_size >= large:
                return path
            content = path.read_bytes()
            path.unlink()
            return content


@contextlib.contextmanager
def alone(path: Path, patience: float, what: str) -> Iterator[Callable[[], None]]:
    """Do something while no other process of the machine does it.

    Args:
        path: of the lock file; it exists while a process works. Its time shows the others that there is progress.
        patience: seconds. After so long without progress of the other process, this one works too.
        what: the result of the work, for the watchdog's message.

    Yields:
        a function to call after each unit of work.
    """
    while True:
        with path.open("ab") as file:
            seen, end = 0, time.monotonic() + patience
            while (is_locked := lock_file(file)) is False and time.monotonic() < end:
                # A beat without progress of the other process would hide from the watchdog that it hangs.
                if (progress := os.fstat(file.fileno()).st_mtime_ns) != seen:
                    seen, end = progress, time.monotonic() + patience
                    beat(f"waiting for another process: {what}")
                time.sleep(_POLL)
            if is_locked and not _is_at(file, path):
                continue  # the last owner of the lock has deleted this file; there may be a new one

            def step() -> None:
                with contextlib.suppress(OSError):
                    os.utime(file.fileno())
                beat(what)

            try:
                yield step
            finally:
                if is_locked is not False and _is_at(file, path):
                    path.unlink(missing_ok=True)
            return


def warn_once(text: str) -> None:
    """Print a warning about the files of the machine; one for each process."""
    if "folder" not in _warned:
        _warned.add("folder")
        print(f"scfm: warning: {text}", file=sys.stderr)


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _write(path: Path, arrays: Arrays) -> None:
    """Write arrays as safetensors, the widest types first: so each begins at a multiple of its type's size."""
    values = {name: np.ascontiguousarray(value) for name, value in arrays.values.items()}
    values = dict(sorted(values.items(), key=lambda item: -item[1].itemsize))
    header: dict[str, Any] = {"__metadata__": dict(arrays.texts)}
    at = 0
    for name, value in values.items():
        header[name] = {"dtype": _NAMES[value.dtype], "shape": value.shape, "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in values.values():
            if value.size:
                file.write(value.data.cast("B"))
        file.flush()
        os.fsync(file.fileno())  # a power failure must not leave a file of the right length with other bytes


def _load(path: Path) -> Arrays | None:
    """The arrays of a file, memory-mapped; None if it does not exist or is damaged."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    try:
        lock_file(file, shared=True)
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        texts = header.pop("__metadata__")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        values = {}
        for name, entry in header.items():
            kind, shape, begin = _TYPES[entry["dtype"]], entry["shape"], 8 + length + entry["data_offsets"][0]
            values[name] = np.frombuffer(memory, kind, math.prod(shape), begin).reshape(shape)
        with contextlib.suppress(OSError):  # the folder may be read-only
            os.utime(path)  # marks it as used
        return Arrays(values, texts, file)
    except (ValueError, KeyError, TypeError, struct.error):
        file.close()
        return None


def _prune(folder: Path, kept: int) -> None:
    """Delete the least recently used files beyond `kept`. One that is in use is locked, and is not deleted."""
    with contextlib.suppress(OSError):
        found = [
            path for path in folder.glob(f"*{_ENDING}") if not path.name.startswith(".")
        ]  # not those being written
        paths = sorted(found, key=lambda path: path.stat().st_mtime_ns)
        for path in paths[:-kept]:
            with path.open("r+b") as file:
                if lock_file(file) is not False:
                    path.unlink()
