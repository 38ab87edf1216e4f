"""Shards of cached samples in webdataset's tar layout: the library writes them, random access reads them."""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from scfm_core.data.schema import Manifest, Record, ShardEntry
from scfm_core.errors import UserError

_MEMBERS = ("safetensors", "txt", "json")


class ShardWriter:
    """Writes `shard-000000.tar`, ... and, when closed without an error, `manifest.json`.

    Args:
        folder: created if missing.
        manifest: everything but the counts and shards, which are filled in.
        samples_per_shard: records in a full shard.
    """

    def __init__(self, folder: Path, manifest: Manifest, samples_per_shard: int = 1000) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.samples_per_shard = samples_per_shard
        self._manifest = manifest
        self._entries: list[ShardEntry] = []
        self._in_shard = 0
        self._stream: io.BufferedWriter | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish_shard()
        finally:
            if self._stream is not None:  # an error, here or in the caller
                with contextlib.suppress(OSError):
                    self._tar.close()  # or it would be closed, with a traceback, when it is collected
                with contextlib.suppress(OSError):
                    self._stream.close()
                self._aside.unlink(missing_ok=True)
        if kind is not None:
            return
        Manifest(
            encoder=self._manifest.encoder,
            text_length=self._manifest.text_length,
            resolution=self._manifest.resolution,
            samples=sum(entry.samples for entry in self._entries),
            shards=tuple(self._entries),
        ).write(self.folder)

    def write(self, record: Record, details: dict[str, object]) -> None:
        """Append one cached record."""
        from webdataset import TarWriter

        assert record.latents is not None and record.text is not None and record.pooled is not None
        if self._stream is None:
            self._stream = self._aside.open("wb")
            self._tar = TarWriter(self._stream, mtime=0, encoder=False)  # no clock: equal input, equal hash
        tensors = {"latents": record.latents, "text": record.text, "pooled": record.pooled}
        self._tar.write(
            {
                "__key__": record.key,
                "safetensors": save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}),
                "txt": record.caption.encode(),
                "json": json.dumps(details).encode(),
            }
        )
        self._in_shard += 1
        if self._in_shard == self.samples_per_shard:
            self._finish_shard()

    @property
    def _aside(self) -> Path:
        return self.folder / f"shard-{len(self._entries):06d}.tar.tmp"

    def _finish_shard(self) -> None:
        if self._stream is None:
            return
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        aside, name = self._aside, self._aside.stem
        entry = ShardEntry(name=name, samples=self._in_shard, bytes=aside.stat().st_size, sha256=file_sha256(aside))
        aside.replace(self.folder / name)
        self._entries.append(entry)
        self._stream, self._in_shard = None, 0


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: io.BufferedReader) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Location:
    shard: int
    key: str
    members: dict[str, tuple[int, int]]
    """extension -> (offset, bytes) inside the shard."""


class CachedDataset:
    """A folder of shards with its manifest; records by index, in the shards' order.

    Members are read by offset (`pread`), never extracted by name, so that hostile names do nothing.

    Args:
        folder: holds `manifest.json` and the shards.
        verify: compare every shard's sha256 with the manifest first (about 1 GB/s); the size is always compared.

    Raises:
        UserError: naming the shard that is missing, damaged, or not of the manifest.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._locations: list[_Location] = []
        self._files: dict[int, int] = {}
        for number, entry in enumerate(self.manifest.shards):
            self._check(entry, verify)
            self._index(number, entry)
        digest = hashlib.sha256("".join(entry.sha256 for entry in self.manifest.shards).encode())
        self.fingerprint = digest.hexdigest()

    def _check(self, entry: ShardEntry, verify: bool) -> None:
        path = self.folder / entry.name
        if Path(entry.name).name != entry.name:
            raise UserError(
                f"data.path: the manifest of {self.folder} names a shard outside its folder: {entry.name!r}"
            )
        if not path.is_file():
            raise UserError(f"data.path: shard {path} is listed in the manifest but missing; copy it again")
        size = path.stat().st_size
        if size != entry.bytes:
            raise UserError(
                f"data.path: shard {path} has {size} bytes, the manifest says {entry.bytes}: it is cut or was "
                f"overwritten. Copy it again, or encode again"
            )
        if verify and file_sha256(path) != entry.sha256:
            raise UserError(f"data.path: shard {path} is corrupt (its sha256 differs from the manifest). Copy it again")

    def _index(self, number: int, entry: ShardEntry) -> None:
        members: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(self.folder / entry.name, mode="r:") as tar:  # uncompressed alone: offsets
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    if member.isfile() and extension in _MEMBERS:
                        members.setdefault(key, {})[extension] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise UserError(f"data.path: shard {self.folder / entry.name} is not a readable tar ({error})") from error
        complete = [_Location(number, key, found) for key, found in members.items() if set(_MEMBERS) <= found.keys()]
        if len(complete) != entry.samples:
            raise UserError(
                f"data.path: shard {self.folder / entry.name} holds {len(complete)} complete samples, the manifest "
                f"says {entry.samples}. Copy it again, or encode again"
            )
        self._locations += complete

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}  # descriptors mean nothing in another process

    def __len__(self) -> int:
        return len(self._locations)

    def _read(self, location: _Location, extension: str) -> bytes:
        if location.shard not in self._files:
            path = self.folder / self.manifest.shards[location.shard].name
            self._files[location.shard] = os.open(path, os.O_RDONLY)
        offset, size = location.members[extension]
        return os.pread(self._files[location.shard], size, offset)

    def caption(self, index: int) -> str:
        """The caption of record `index`; UserError if it is not UTF-8."""
        location = self._locations[index]
        try:
            return self._read(location, "txt").decode()
        except UnicodeDecodeError as error:
            raise self._undecodable(location, error) from error

    def __getitem__(self, index: int) -> Record:
        location = self._locations[index]
        try:
            tensors: dict[str, torch.Tensor] = load(self._read(location, "safetensors"))
            return Record(
                key=location.key,
                caption=self.caption(index),
                latents=tensors["latents"],
                text=tensors["text"],
                pooled=tensors["pooled"],
            )
        except (SafetensorError, KeyError) as error:
            raise self._undecodable(location, error) from error

    def _undecodable(self, location: _Location, error: Exception) -> UserError:
        shard = self.folder / self.manifest.shards[location.shard].name
        return UserError(
            f"data.path: sample {location.key!r} of shard {shard} cannot be decoded ({error!r}). Encode again"
        )
