"""The files of a checkpoint as a rank writes them: each is hashed while it is written, so nobody reads it again."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from scfm_core.files import FileEntry, HashedFile, Written

_COPY_AHEAD = 10_000_000
"""Bytes that are copied from a GPU while others are written: DCP's own default."""


def torch_save(value: object, path: Path) -> FileEntry:
    """`torch.save` to a new file, with fsync."""
    with HashedFile(path) as file:
        torch.save(value, file)
    return file.entry


class HashingFileSystem(FileSystem):
    """Where PyTorch's distributed checkpoint writes. It keeps the entry of every file."""

    def __init__(self) -> None:
        self.files: dict[Path, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Iterator[Any]:
        """A stream for DCP, which writes from the first byte to the last."""
        assert mode == "wb"
        with HashedFile(Path(path)) as file:
            yield file
        self.files[Path(path)] = file.entry

    def rename(self, path: str | PathLike[str], new_path: str | PathLike[str]) -> None:
        """Rename a file; its entry follows."""
        super().rename(path, new_path)
        self.files[Path(new_path)] = self.files.pop(Path(path))


class HashingWriter(FileSystemWriter):
    """DCP's writer into a folder; `files` has what this rank wrote.

    `staged`: the tensors are in host memory. Then it does not copy them over a stream, whose thread would be on GPU 0: every process
    of a machine would take memory there.
    """

    def __init__(self, folder: Path, *, staged: bool = False) -> None:
        super().__init__(folder, per_thread_copy_ahead=0 if staged else _COPY_AHEAD)
        self.fs = files = HashingFileSystem()
        self.files: Written = files.files
