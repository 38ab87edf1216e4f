"""Files as bytes: hashes, comparison with a manifest, and fsync."""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """sha256 of an open file's whole content, in hex; moves the file's position."""
    file.seek(0)
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
    return digest.hexdigest()


def mismatch(file: BinaryIO, size: int, sha256: str | None) -> str | None:
    """How an open file differs from its manifest.

    Args:
        file: opened for reading; its position moves.
        size: bytes, from the manifest.
        sha256: in hex, from the manifest; None: only the size is compared.

    Returns:
        the difference, as part of a sentence; None if the file matches.
    """
    found = os.fstat(file.fileno()).st_size
    if found != size:
        return f"it has {found} bytes, the manifest says {size}"
    if sha256 is None:
        return None
    digest = sha256_of(file)
    return None if digest == sha256 else f"its sha256 is {digest[:12]}..., the manifest says {sha256[:12]}..."


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to disk, so that it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
