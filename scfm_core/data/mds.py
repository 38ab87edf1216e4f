"""Shards of mosaicml-streaming (MDS): the library knows their layout; which sample comes when is decided elsewhere.

The library's own decoders are not used: a column is taken as bytes, which are a JPEG, UTF-8 text and so on, so that a
pickled column (`pkl`) stays a row of bytes.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from scfm_core.data.schema import BadData, Manifest, ShardEntry, Size, refuse_outside, runs_of
from scfm_core.errors import UserError

INDEX = "index.json"
_KEY = "__key__"
# Encodings whose bytes are what a member of a tar of that kind would hold.
_PLAIN = frozenset({"bytes", "str", "json", "jpeg", "png"})


def _library() -> Any:
    try:
        from streaming.base import compression
        from streaming.base.format.mds import reader, writer
    except ImportError as error:
        raise UserError("MDS needs mosaicml-streaming: pip install 'scfm[mds]'") from error
    return reader.MDSReader, writer.MDSWriter, compression.decompress


class MdsIndex:
    """`index.json` of an MDS data set.

    Args:
        text: its content.
        where: what messages name.

    Raises:
        UserError: if it is damaged, of another version, or names shards outside its folder.
    """

    def __init__(self, text: bytes, where: str) -> None:
        try:
            data = json.loads(text)
            self.shards: list[dict[str, Any]] = data["shards"]
            if data["version"] != 2 or any(shard["format"] != "mds" for shard in self.shards):
                raise UserError(f"data: {where} is not of MDS version 2, the one that mosaicml-streaming writes")
            self.entries = [self._entry(shard) for shard in self.shards]
            for number in range(len(self.shards)):
                self.compressed(number)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"data: {where} is damaged ({error!r}); write the data set again") from error
        packed = [self.compressed(number) for number in range(len(self.shards))]
        for entry in [*self.entries, *(entry for entry in packed if entry is not None)]:
            refuse_outside(entry.name, where)
        if not sum(entry.samples for entry in self.entries):
            raise UserError(f"data: {where} lists no sample")

    @staticmethod
    def _entry(shard: dict[str, Any]) -> ShardEntry:
        _library()[0].from_json("", None, shard)  # refuses what it does not know
        names, encodings, sizes = (shard[key] for key in ("column_names", "column_encodings", "column_sizes"))
        if not all(type(column) is list for column in (names, encodings, sizes)):
            raise TypeError("the columns are no lists")
        if not len(names) == len(encodings) == len(sizes) > 0 or len(set(names)) < len(names):
            raise ValueError("the columns do not match")
        if any(type(word) is not str for word in (*names, *encodings)):
            raise TypeError("a column's name or encoding is no text")
        if any(size is not None and (type(size) is not int or size < 1) for size in sizes):
            raise ValueError(f"the columns' sizes are {sizes}")
        if shard.get("compression") is not None and (type(shard["compression"]) is not str or not shard["zip_data"]):
            raise ValueError("compression without a compressed file")
        return checked_entry(shard["raw_data"], shard["samples"])

    def compressed(self, number: int) -> ShardEntry | None:
        """What is stored in place of shard `number`, if it is compressed."""
        shard = self.shards[number]
        return checked_entry(shard["zip_data"], 0) if shard.get("compression") is not None else None

    def unpack(self, number: int, name: str) -> Callable[[bytes], bytes] | None:
        """How a compressed shard becomes a plain one; None if it is one."""
        algorithm = self.shards[number].get("compression")
        if algorithm is None:
            return None
        decompress = _library()[2]

        def unpack(content: bytes) -> bytes:
            try:
                return bytes(decompress(algorithm, content))
            except Exception as error:  # each of the six algorithms has its own
                raise BadData(f"data: shard {name} cannot be decompressed ({error!r})") from error

        return unpack


def checked_entry(file: dict[str, Any], samples: int) -> ShardEntry:
    """A file of `index.json`; ValueError or TypeError if it cannot be one."""
    hashes = file.get("hashes") or {}
    return ShardEntry(
        name=file["basename"], samples=samples, bytes=file["bytes"], sha256=hashes.get("sha256")
    ).checked()


class MdsShard:
    """Any field of any sample of one open shard.

    Args:
        file: opened for reading; belongs to this object from now on.
        description: its entry in `index.json`.
        name: for messages.

    Raises:
        BadData: if it is not what the index says.
    """

    def __init__(self, file: BinaryIO, description: dict[str, Any], name: str) -> None:
        self._file, self.name = file, name
        names, encodings = description["column_names"], description["column_encodings"]
        self._columns = dict(zip(names, encodings, strict=True))
        plain = description | {"column_encodings": ["bytes"] * len(names)}
        self._reader = _library()[0].from_json("", None, plain)
        header = os.pread(file.fileno(), 4, 0)
        if len(header) < 4 or struct.unpack("<I", header)[0] != description["samples"]:
            raise BadData(f"data: shard {name} does not hold the {description['samples']} samples of its index")
        self._samples = int(description["samples"])
        self._last: tuple[int, dict[str, bytes]] = (-1, {})

    def __len__(self) -> int:
        return self._samples

    def key(self, index: int) -> str:
        """Name of sample `index`: its column `__key__`, or its number."""
        key = self._sample(index).get(_KEY)
        return f"{index:06d}" if key is None else key.decode(errors="replace")

    def fields(self, index: int) -> list[str]:
        """What sample `index` has."""
        return [name for name in self._columns if name != _KEY]

    def read(self, index: int, field: str) -> bytes | None:
        """One field of one sample, or None if there is no such column.

        Raises:
            BadData: if the column is of an encoding that is not read, or the sample is damaged.
        """
        encoding = self._columns.get(field)
        if encoding is None:
            return None
        if encoding not in _PLAIN:
            raise BadData(
                f"data: column {field!r} of shard {self.name} is of encoding {encoding!r}, which is not read; "
                f"{', '.join(sorted(_PLAIN))} are"
            )
        return self._sample(index)[field]

    def _sample(self, index: int) -> dict[str, bytes]:
        if self._last[0] != index:
            descriptor = self._file.fileno()
            try:
                begin, end = struct.unpack("<II", os.pread(descriptor, 8, 4 * (1 + index)))
                data = os.pread(descriptor, max(0, end - begin), begin)
                sample = self._reader.decode_sample(data)
                if end <= begin or len(data) != end - begin:
                    raise ValueError(f"it should lie at bytes {begin} to {end}")
            except (ValueError, IndexError, TypeError, OverflowError, struct.error) as error:
                raise BadData(f"data: sample {index} of shard {self.name} is damaged ({error})") from error
            self._last = (index, sample)
        return self._last[1]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MdsWriter:
    """A data set in MDS, with `manifest.json` beside `index.json`.

    Args:
        folder: of the data set.
        fields: of every sample; all of them are stored as bytes, but `txt` as text.
        manifest: everything but the shards, which are filled in.
        shard_bytes: size at which a new shard begins.
        compression: of the shards, as mosaicml-streaming names it (`zstd:7`), or none.
    """

    def __init__(
        self,
        folder: Path,
        fields: list[str],
        manifest: Manifest,
        *,
        shard_bytes: int = 1 << 28,
        compression: str | None = None,
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self._aside = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(self._aside, ignore_errors=True)
        columns = {_KEY: "str"} | {field: "str" if field == "txt" else "bytes" for field in fields}
        self._library = _library()[1](
            out=str(self._aside), columns=columns, compression=compression, hashes=["sha256"], size_limit=shard_bytes
        )
        self._text = {name for name, encoding in columns.items() if encoding == "str"}
        self._sizes: list[Size | None] = []

    def __enter__(self) -> "MdsWriter":
        return self

    def write(self, key: str, fields: Mapping[str, bytes], size: Size | None) -> None:
        """Append a sample; `size` is its height and width in pixels, if known."""
        row = {name: value.decode() if name in self._text else value for name, value in fields.items()}
        self._library.write({_KEY: key, **row})
        self._sizes.append(size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._aside, ignore_errors=True)

    def _finish(self) -> None:
        self._library.finish()
        index = MdsIndex((self._aside / INDEX).read_bytes(), str(self._aside / INDEX))
        shards, at = [], 0
        for entry in index.entries:
            known = [size for size in self._sizes[at : at + entry.samples] if size is not None]
            sizes = runs_of(known) if len(known) == entry.samples else ()
            shards.append(ShardEntry(**{**entry.__dict__, "sizes": sizes}))
            at += entry.samples
        manifest = Manifest(**{**self.manifest.__dict__, "format": "mds", "shards": tuple(shards)})
        manifest.write(self._aside / "manifest.json")
        self._aside.rename(self.folder)
