"""Shards of mosaicml-streaming (MDS). The library parses their layout; the order of samples is decided in `order.py`.

The library's decoders are not used. A column is read as bytes: a JPEG, UTF-8 text and so on. So a pickled column
(`pkl`) is never unpickled.
"""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from scfm_core.data.decompress import decompress
from scfm_core.data.reading import read_at
from scfm_core.data.schema import BadData, Manifest, ShardEntry, Size, refuse_outside, runs_of
from scfm_core.errors import UserError, missing_extra

INDEX = "index.json"
_KEY = "__key__"
# Encodings whose bytes are the same as those of a member of a tar.
_READABLE_ENCODINGS = frozenset({"bytes", "str", "json", "jpeg", "png"})


def _library() -> Any:
    try:
        from streaming.base.format.mds import reader, writer
    except ImportError as error:
        raise missing_extra("data: the format MDS", "mds", error) from error
    return reader.MDSReader, writer.MDSWriter


class MdsIndex:
    """`index.json` of an MDS data set.

    Args:
        text: content of the file.
        where: its path or address, for messages.

    Raises:
        UserError: if it is damaged, has another version, or names shards outside its folder.
    """

    def __init__(self, text: bytes, where: str) -> None:
        try:
            data = json.loads(text)
            self.shards: list[dict[str, Any]] = data["shards"]
            if data["version"] != 2 or any(shard["format"] != "mds" for shard in self.shards):
                raise UserError(f"data: {where} does not have MDS version 2, which mosaicml-streaming writes")
            self.entries = [self._entry(shard) for shard in self.shards]
            for number in range(len(self.shards)):
                self.compressed(number)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"data: {where} is damaged ({error!r}); write the data set again") from error
        compressed = [self.compressed(number) for number in range(len(self.shards))]
        for entry in [*self.entries, *(entry for entry in compressed if entry is not None)]:
            refuse_outside(entry.name, where)
        if not sum(entry.samples for entry in self.entries):
            raise UserError(f"data: {where} lists no samples")

    @staticmethod
    def _entry(shard: dict[str, Any]) -> ShardEntry:
        _library()[0].from_json("", None, shard)  # raises for a layout that it does not know
        names, encodings, sizes = (shard[key] for key in ("column_names", "column_encodings", "column_sizes"))
        if not all(type(column) is list for column in (names, encodings, sizes)):
            raise TypeError("the columns are not lists")
        if not len(names) == len(encodings) == len(sizes) > 0 or len(set(names)) < len(names):
            raise ValueError("the columns do not match")
        if any(type(word) is not str for word in (*names, *encodings)):
            raise TypeError("a column's name or encoding is not a string")
        if any(size is not None and (type(size) is not int or size < 1) for size in sizes):
            raise ValueError(f"the columns' sizes are {sizes}")
        if shard.get("compression") is not None and (type(shard["compression"]) is not str or not shard["zip_data"]):
            raise ValueError("compression without a compressed file")
        return checked_entry(shard["raw_data"], shard["samples"])

    def compressed(self, number: int) -> ShardEntry | None:
        """The compressed file of shard `number`; None if the shard is not compressed."""
        shard = self.shards[number]
        return checked_entry(shard["zip_data"], 0) if shard.get("compression") is not None else None

    def unpack(self, number: int, name: str) -> Callable[[bytes], bytes] | None:
        """A function that decompresses the content of shard `number`; None if the shard is not compressed.

        Args:
            number: of the shard.
            name: of the shard, for messages.

        Raises:
            BadData: from the function, if the content cannot be decompressed.
        """
        algorithm = self.shards[number].get("compression")
        if algorithm is None:
            return None
        size = self.entries[number].bytes

        def unpack(content: bytes) -> bytes:
            try:
                return decompress(algorithm, content, size)
            except Exception as error:  # each of the five algorithms has its own errors
                raise BadData(f"data: shard {name} cannot be decompressed ({error!r})") from error

        return unpack


def checked_entry(file: dict[str, Any], samples: int) -> ShardEntry:
    """The entry of a file in `index.json`.

    Args:
        file: the JSON object that describes it.
        samples: number of samples in it.

    Raises:
        ValueError, TypeError, KeyError: if a value is invalid or missing.
    """
    hashes = file.get("hashes") or {}
    return ShardEntry(
        name=file["basename"], samples=samples, bytes=file["bytes"], sha256=hashes.get("sha256")
    ).checked()


class MdsShard:
    """An open MDS shard: random access to the fields of its samples.

    Args:
        file: opened for reading; this object closes it.
        description: the shard's entry in `index.json`.
        name: of the shard, for messages.

    Raises:
        BadData: if its number of samples differs from the index.
    """

    def __init__(self, file: BinaryIO, description: dict[str, Any], name: str) -> None:
        self._file, self.name = file, name
        names, encodings = description["column_names"], description["column_encodings"]
        self._columns = dict(zip(names, encodings, strict=True))
        plain = description | {"column_encodings": ["bytes"] * len(names)}
        self._reader = _library()[0].from_json("", None, plain)
        header = read_at(file.fileno(), 0, 4)
        if len(header) < 4 or struct.unpack("<I", header)[0] != description["samples"]:
            raise BadData(f"data: shard {name} does not have the {description['samples']} samples that its index says")
        self._samples = int(description["samples"])
        self._last: tuple[int, dict[str, bytes]] = (-1, {})

    def __len__(self) -> int:
        return self._samples

    def key(self, index: int) -> str:
        """Name of sample `index`: its column `__key__`, else its number."""
        key = self._sample(index).get(_KEY)
        return f"{index:06d}" if key is None else key.decode(errors="replace")

    def fields(self, index: int) -> list[str]:
        """Names of the fields of sample `index`."""
        return [name for name in self._columns if name != _KEY]

    def read(self, index: int, field: str) -> bytes | None:
        """One field of one sample, or None if there is no such column.

        Raises:
            BadData: if the encoding of the column is not supported, or the sample is corrupt.
        """
        encoding = self._columns.get(field)
        if encoding is None:
            return None
        if encoding not in _READABLE_ENCODINGS:
            raise BadData(
                f"data: column {field!r} of shard {self.name} has the encoding {encoding!r}, which is not supported; "
                f"supported are {', '.join(sorted(_READABLE_ENCODINGS))}"
            )
        return self._sample(index)[field]

    def _sample(self, index: int) -> dict[str, bytes]:
        if self._last[0] != index:
            descriptor = self._file.fileno()
            try:
                begin, end = struct.unpack("<II", read_at(descriptor, 4 * (1 + index), 8))
                data = read_at(descriptor, begin, max(0, end - begin))
                sample = self._reader.decode_sample(data)
                if end <= begin or len(data) != end - begin:
                    raise ValueError(f"its bytes should be {begin} to {end}")
            except (ValueError, IndexError, TypeError, OverflowError, struct.error) as error:
                raise BadData(f"data: sample {index} of shard {self.name} is corrupt ({error})") from error
            self._last = (index, sample)
        return self._last[1]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MdsWriter:
    """Writes a data set in MDS, with `manifest.json` beside `index.json`.

    Args:
        folder: of the data set; appears when it is complete.
        fields: names of the fields that every sample has. `txt` is stored as text, all others as bytes.
        manifest: without shards, which are added here.
        shard_bytes: size at which a new shard begins.
        compression: of the shards, as mosaicml-streaming names it (`zstd:7`); None: not compressed.

    Raises:
        UserError: if mosaicml-streaming is not installed.
        ValueError: from mosaicml-streaming, if it does not know the compression.
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
        self._unfinished = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(self._unfinished, ignore_errors=True)
        columns = {_KEY: "str"} | {field: "str" if field == "txt" else "bytes" for field in fields}
        self._library = _library()[1](
            out=str(self._unfinished),
            columns=columns,
            compression=compression,
            hashes=["sha256"],
            size_limit=shard_bytes,
        )
        self._text_columns = {name for name, encoding in columns.items() if encoding == "str"}
        self._sizes: list[Size | None] = []

    def __enter__(self) -> "MdsWriter":
        return self

    def write(self, key: str, fields: Mapping[str, bytes], size: Size | None) -> None:
        """Append a sample; `size` is its height and width in pixels, if known."""
        row = {name: value.decode() if name in self._text_columns else value for name, value in fields.items()}
        self._library.write({_KEY: key, **row})
        self._sizes.append(size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def _finish(self) -> None:
        self._library.finish()
        index = MdsIndex((self._unfinished / INDEX).read_bytes(), str(self._unfinished / INDEX))
        shards, at = [], 0
        for entry in index.entries:
            known = [size for size in self._sizes[at : at + entry.samples] if size is not None]
            sizes = runs_of(known) if len(known) == entry.samples else ()
            shards.append(ShardEntry(**{**entry.__dict__, "sizes": sizes}))
            at += entry.samples
        manifest = Manifest(**{**self.manifest.__dict__, "format": "mds", "shards": tuple(shards)})
        manifest.write(self._unfinished / "manifest.json")
        self._unfinished.rename(self.folder)
