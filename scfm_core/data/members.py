"""`manifest.members` beside `manifest.json`: the tables of all tars. With it, opening a tar reads none of its headers.

`scfm data generate`, `encode`, `pack` and `index` write it. It is optional: a tar without a table is parsed. A table belongs
to a sha256, so that it is never that of another tar. The file has a mark, the number of tars, a directory sorted by sha256
(for each tar: sha256, offset, bytes and CRC-32 of its table), and the tables.
"""

import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scfm_core.data.reading import read_at
from scfm_core.data.schema import ShardEntry
from scfm_core.data.tar_table import TarTable, parse_tar
from scfm_core.files import renamed_at_end

_ENDING = ".members"
_HEAD = struct.Struct("<16sq")
_MARK = b"scfm members 1\n\0"
_ROW = np.dtype([("sha256", "S32"), ("offset", "<i8"), ("bytes", "<i8"), ("crc", "<u4")])
_ARRAYS = ("keys", "starts", "fields", "blocks", "sizes")


def pack_table(table: TarTable) -> bytes:
    """A table as bytes: the length of a JSON text, the text (names of the fields; dtypes and lengths), the arrays."""
    arrays = [getattr(table, name) for name in _ARRAYS]
    text = json.dumps([table.names, [[array.dtype.str, len(array)] for array in arrays]]).encode()
    return struct.pack("<I", len(text)) + text + b"".join(array.tobytes() for array in arrays)


def unpack_table(content: bytes, entry: ShardEntry) -> TarTable:
    """The table of `pack_table`.

    Args:
        content: of the table.
        entry: of the tar; what the table says must be inside of it.

    Raises:
        ValueError, TypeError, struct.error: if it is damaged.
    """
    (length,) = struct.unpack_from("<I", content)
    names, kinds = json.loads(content[4 : 4 + length])
    arrays, at = [], 4 + length
    for kind, count in kinds:
        arrays.append(np.frombuffer(content, kind, count, at))
        at += arrays[-1].nbytes
    keys, starts, fields, blocks, sizes = arrays
    table = TarTable(keys, starts, tuple(names), fields, blocks, sizes)
    ends = 512 * blocks.astype(np.int64) + sizes.astype(np.int64)
    if (
        len(keys) != entry.samples
        or len(starts) != len(keys) + 1
        or not len(fields) == len(blocks) == len(sizes) == starts[-1]
        or fields.max(initial=0) >= len(names)
        or (np.diff(starts.astype(np.int64)) < 0).any()
        or int(ends.max(initial=0)) > entry.bytes
    ):
        raise ValueError("the table does not fit the tar")
    return table


def table_of(tar: Path) -> bytes:
    """The table of a tar that was just written, from `pack_table`."""
    with tar.open("rb") as file:
        return pack_table(parse_tar(file, tar.name))


def write_members(manifest: Path, tables: Mapping[str, bytes]) -> None:
    """Write the tables beside a manifest, as `NAME.members`, under another name that is then replaced.

    Args:
        manifest: path of the manifest, `NAME.json`.
        tables: by sha256 of the tar, in hex: from `pack_table`.
    """
    path = manifest.with_suffix(_ENDING)
    rows, at = np.zeros(len(tables), _ROW), _HEAD.size + len(tables) * _ROW.itemsize
    with renamed_at_end(path) as partial, partial.open("wb") as file:
        for row, (sha256, content) in zip(rows, sorted(tables.items()), strict=True):
            # S32 would drop zeros at the end, which the comparison ignores too.
            row["sha256"], row["offset"], row["bytes"] = bytes.fromhex(sha256), at, len(content)
            row["crc"] = zlib.crc32(content)
            at += len(content)
        file.write(_HEAD.pack(_MARK, len(rows)) + rows.tobytes())
        for _, content in sorted(tables.items()):
            file.write(content)


@dataclass(frozen=True)
class Members:
    """An open file of tables; forked processes share it."""

    descriptor: int
    rows: NDArray[np.void]

    @classmethod
    def beside(cls, manifest: Path) -> "Members | None":
        """The file beside a manifest; None if there is none, or its directory is damaged."""
        try:
            file = manifest.with_suffix(_ENDING).open("rb")
        except OSError:
            return None
        with file:
            try:
                mark, count = _HEAD.unpack(read_at(file.fileno(), 0, _HEAD.size))
                size = count * _ROW.itemsize
                if mark != _MARK or not 0 <= size <= os.fstat(file.fileno()).st_size:
                    return None
                rows = np.frombuffer(read_at(file.fileno(), _HEAD.size, size), _ROW, count)
                return cls(os.dup(file.fileno()), rows)
            except (OSError, ValueError, struct.error):
                return None

    def table(self, entry: ShardEntry) -> TarTable | None:
        """The table of a tar; None if there is none, or it is damaged: then the tar is parsed.

        Args:
            entry: of the tar in its manifest.
        """
        if entry.sha256 is None:
            return None
        wanted = np.bytes_(bytes.fromhex(entry.sha256))
        at = int(np.searchsorted(self.rows["sha256"], wanted))
        if at == len(self.rows) or self.rows["sha256"][at] != wanted:
            return None
        row = self.rows[at]
        try:
            content = read_at(self.descriptor, int(row["offset"]), min(int(row["bytes"]), entry.bytes))
            return unpack_table(content, entry) if zlib.crc32(content) == row["crc"] else None
        except (OSError, ValueError, TypeError, OverflowError, struct.error):
            return None
