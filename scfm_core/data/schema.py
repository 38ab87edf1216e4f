"""Samples in memory and in a shard, and the manifest that describes the shards of a data set.

A cached sample has three files: `safetensors` (`latents` [C, h, w] and the fields of text that the manifest names, such
as `text` [L, D] and `pooled` [P]; with the teacher's path also `velocities` [K, C, h, w], `sigmas` [K + 1],
`guidance` []), `txt` (caption, UTF-8) and `json` (`height`, `width` in pixels, and `source` or how the teacher made it).
A sample of images has an image file and its captions. In a tar of webdataset's layout
(https://github.com/webdataset/webdataset) a file is the member `<key>.<name>`, in MDS
(https://docs.mosaicml.com/projects/streaming) a column. `manifest.json` has the number and sizes of the samples, the
kinds of their fields (`fields.py`) and the hashes of the shards, for both formats.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm_core.data.fields import FieldKind, PackedTokens, invalid_field
from scfm_core.data.index import ShardEntry as ShardEntry
from scfm_core.data.index import ShardIndex
from scfm_core.errors import UserError
from scfm_core.files import renamed_at_end

MANIFEST = "manifest.json"
JOB = ".job"
"""Folder in a data set that `scfm data encode` or `generate` has not finished."""
MANIFEST_FORMAT = "scfm-manifest"
MANIFEST_VERSION = 3
FIELDS_OF_VERSION_2: dict[str, FieldKind] = {"text": "tokens", "pooled": "vector"}
"""The fields of every cache whose manifest has version 2, which does not name them."""

PATH = ("velocities", "sigmas", "guidance")
"""The tensors of the teacher's path in a cached sample."""

Size = tuple[int, int]
"""Height and width in pixels."""


class BadData(UserError):
    """Invalid content: a corrupt shard, a sample that cannot be decoded. `data.max_bad_fraction` is the share that is
    tolerated."""


@dataclass(kw_only=True)
class Record:
    """One sample as a reader returns it: cached tensors, or an image that is encoded on the fly."""

    key: str
    caption: str
    latents: Tensor | None = None
    """[C, h, w]."""
    fields: dict[str, Tensor] = field(default_factory=dict)
    """The cached text by field; empty for images, and for a cache of latents alone."""
    kinds: Mapping[str, FieldKind] = field(default_factory=dict)
    """The kinds of `fields`."""
    padding: int | None = None
    """Number of the paddings, among those of the corpus, that complete the fields of tokens; None: they have the full length."""
    image: Tensor | None = None
    """uint8 [3, H, W]; `image.unit_range` makes it what networks take."""
    notes: tuple[str, ...] = ()
    """Of an image: what was changed and may surprise, as in `Picture.notes`."""
    path: dict[str, Tensor] | None = None
    """The teacher's path to `latents`, if it is stored and requested: `velocities` [K, C, h, w], the mean velocities of
    its intervals; `sigmas` fp32 [K + 1], of its nodes; `guidance` fp32 []."""


@dataclass(kw_only=True)
class Batch:
    """Records of one shape, stacked."""

    sample_ids: Tensor
    """Global sample indices, int64 [B]: places in the endless stream of the run. All randomness of a sample depends on
    its index."""
    keys: list[str]
    captions: list[str]
    latents: Tensor | None
    """[B, C, h, w]."""
    fields: dict[str, PackedTokens | Tensor]
    """The cached text by field: packed tokens, or vectors [B, D]; empty if the captions must be encoded."""
    images: Tensor | None
    """uint8 [B, 3, H, W]; `image.unit_range` makes it what networks take, on the device."""
    path: dict[str, Tensor] | None = None
    """The stacked paths of the records."""
    bad: list[str] = field(default_factory=list)
    """Invalid samples that were replaced: their names, and what is wrong with them."""

    def __len__(self) -> int:
        return len(self.keys)

    def pinned(self) -> "Batch":
        """A copy in pinned memory, for asynchronous copies to a GPU. Needs CUDA."""

        def pin(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.pin_memory()

        fields: dict[str, PackedTokens | Tensor] = {
            name: value.pin_memory() if isinstance(value, Tensor) else replace(value, tokens=value.tokens.pin_memory())
            for name, value in self.fields.items()
        }
        path = None if self.path is None else {name: tensor.pin_memory() for name, tensor in self.path.items()}
        return replace(self, latents=pin(self.latents), fields=fields, images=pin(self.images), path=path)

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Tokens of each row of the masked fields; None if there is no such field."""
        packed = (value for value in self.fields.values() if isinstance(value, PackedTokens))
        return next((value.lengths for value in packed if value.paddings is None), None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        fields = [value if isinstance(value, Tensor) else value.tokens for value in self.fields.values()]
        tensors = [self.latents, self.images, *fields, *(self.path or {}).values()]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def collate(sample_ids: Sequence[int], records: Sequence[Record]) -> Batch:
    """Stack records to a batch.

    Args:
        sample_ids: global sample indices, one for each record.
        records: of one shape.

    Raises:
        UserError: if their shapes differ.
    """

    def stack(name: str, tensors: Sequence[Tensor | None], advice: str = "Set data.buckets") -> Tensor | None:
        found = [tensor for tensor in tensors if tensor is not None]
        if not found:
            return None
        _check_shapes(records, name, {tuple(tensor.shape) for tensor in found}, advice)
        return torch.stack(found)

    def field_of(name: str, kind: FieldKind) -> PackedTokens | Tensor:
        rows, advice = [record.fields[name] for record in records], "List invalid samples with `scfm data validate`"
        if kind == "vector":
            vectors = stack(name, rows, advice)
            assert vectors is not None
            return vectors
        paddings = tuple(record.padding for record in records)
        full = {tuple(row.shape) for row, padding in zip(rows, paddings, strict=True) if padding is None}
        if kind == "tokens":
            _check_shapes(records, name, full, advice)
        _check_shapes(records, name, {tuple(row.shape[1:]) for row in rows}, advice)
        lengths = tuple(len(row) for row in rows)
        return PackedTokens(torch.cat(rows), lengths, paddings if kind == "tokens" else None)

    def paths() -> dict[str, Tensor] | None:
        found = [record.path for record in records if record.path is not None]
        if not found:
            return None
        shapes: set[tuple[int, ...]] = {tuple(path["velocities"].shape) for path in found}
        _check_shapes(records, "paths of the teacher", shapes, "Set data.buckets")
        return {name: torch.stack([path[name] for path in found]) for name in PATH}

    return Batch(
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        keys=[record.key for record in records],
        captions=[record.caption for record in records],
        latents=stack("latents", [record.latents for record in records]),
        fields={name: field_of(name, kind) for name, kind in records[0].kinds.items()},
        images=stack("image", [record.image for record in records]),
        path=paths(),
    )


def _check_shapes(records: Sequence[Record], name: str, shapes: set[tuple[int, ...]], advice: str) -> None:
    if len(shapes) > 1:
        keys = ", ".join(record.key for record in records[:4])
        raise UserError(
            f"data: a batch needs {name} of one shape, but samples {keys} ... have {sorted(shapes)}. {advice}"
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json` of a data set."""

    format: Literal["webdataset", "mds"] = "webdataset"
    encoder: str | None = None
    """Of a cache: fingerprint of the VAE and the text encoders; caches of two models cannot be mixed. None: images."""
    fields: Mapping[str, FieldKind] = field(default_factory=dict)
    """Of a cache: its fields of text, and their kinds. Empty: latents alone; the captions are encoded in training."""
    text_length: int | None = None
    """Of a cache: number of text tokens of the network; of a masked field, the largest number."""
    padding: str | None = None
    """Of a cache with trimmed fields of tokens: sha256 of `padding.safetensors`, which holds their padding."""
    network: str | None = None
    """Of stored paths: fingerprint of the network that made them. It must be the teacher of the student that learns
    them."""
    background: str | None = None
    """Of a cache of images: the colour behind transparent images, `data.background`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of a cache: the values of `data.resolution`, `data.buckets`, `data.bucket_step` and `model.text_length` with which it was made.
    A run on it has the same, if its recipe does not set them."""
    shards: Sequence[ShardEntry] = ()

    @property
    def index(self) -> ShardIndex:
        """The shards as arrays. Those of a parsed manifest are arrays already."""
        return ShardIndex.of(self.shards)

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return int(self.index.samples.sum())

    @property
    def sizes(self) -> set[Size]:
        """Every height and width that occurs."""
        return self.index.sizes

    @property
    def head(self) -> dict[str, Any]:
        """All fields but the shards."""
        return {name: value for name, value in vars(self).items() if name != "shards"}

    def dumps(self) -> str:
        """As JSON text, one line for each shard."""
        data = {"manifest": MANIFEST_FORMAT, "version": MANIFEST_VERSION, **self.head, "samples": self.samples}
        shards = ",\n    ".join(json.dumps(asdict(shard)) for shard in self.shards)
        return json.dumps(data, indent=2)[:-2] + f',\n  "shards": [\n    {shards}\n  ]\n}}\n'

    def write(self, path: Path) -> None:
        """Write to a temporary file and rename it, so that an existing manifest is always complete."""
        with renamed_at_end(path) as aside:
            aside.write_text(self.dumps(), encoding="utf-8")

    @classmethod
    def parse(cls, text: bytes | str, where: str, step: Callable[[], None] = lambda: None) -> "Manifest":
        """Parse and check the text of a manifest.

        Args:
            text: JSON.
            where: path or address of the manifest, for messages.
            step: called for each shard; a hundred million sizes take minutes.

        Raises:
            UserError: if it is damaged, has another version, or names shards outside its folder.
        """
        try:
            data, described = _decode(text if isinstance(text, str) else text.decode())
            version = data.pop("version", None)
            if data.pop("manifest", None) != MANIFEST_FORMAT or version not in (2, MANIFEST_VERSION):
                raise UserError(
                    f"data: {where} has another format or version than this release reads. Encode again, or index "
                    f"the shards again with `scfm data index`"
                )
            if version == 2:
                data["fields"] = {} if data.get("encoder") is None else FIELDS_OF_VERSION_2
            if problem := invalid_field(data["fields"]):
                raise UserError(f"data: {where}: {problem}. Use the release that made it, or encode again")
            samples = data.pop("samples")
            shards = ShardIndex.collect(_entry(shard, where, step) for shard in described)
            manifest = cls(shards=shards, **data)
            if manifest.format not in ("webdataset", "mds") or type(manifest.text_length) not in (int, type(None)):
                raise ValueError(f"format {manifest.format!r}, text_length {manifest.text_length!r}")
            if any(
                type(value) not in (str, type(None))
                for value in (manifest.encoder, manifest.padding, manifest.network, manifest.background)
            ):
                raise TypeError("encoder, padding, network and background must be strings")
            if manifest.fields and (manifest.encoder is None or manifest.text_length is None):
                raise ValueError("a cache of text needs encoder and text_length")
            if type(manifest.settings) is not dict:
                raise TypeError(f"settings must be an object, got {manifest.settings!r}")
        except UserError:
            raise
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
        ) as error:  # not JSON, not UTF-8, or other keys
            raise UserError(
                f"data: {where} is damaged ({error!r}). Make it again: `scfm data encode` or `scfm data index`"
            ) from error
        if manifest.samples != samples:
            raise UserError(f"data: {where} is damaged: its shards do not add up to {samples} samples. Make it again")
        if samples == 0:
            raise UserError(f"data: {where} lists no samples")
        return manifest


_SHARDS = '"shards": ['


def _decode(text: str) -> tuple[dict[str, Any], Iterable[dict[str, Any]]]:
    """A manifest's object without its shards, and the shards.

    Those of `Manifest.dumps` are decoded one by one. If another program has written the text, all are decoded at once.
    """
    begin = text.find(_SHARDS)
    if text.endswith("}\n  ]\n}\n") and text[:begin].endswith(",\n  "):
        try:
            return json.loads(text[:begin].rstrip(" \n,") + "}"), _objects(text, begin + len(_SHARDS))
        except ValueError:
            pass  # the key of another object
    data = json.loads(text)
    return data, data.pop("shards")


def _objects(text: str, at: int) -> Iterator[dict[str, Any]]:
    """The objects of the array that begins at `at` and ends the text."""
    decoder, end = json.JSONDecoder(), len(text) - len("\n  ]\n}\n")
    while at < end:
        at += len(text[at : at + 8]) - len(text[at : at + 8].lstrip(" \n,"))
        shard, at = decoder.raw_decode(text, at)
        yield shard
    if at != end:
        raise ValueError("the list of shards does not end where it should")


def _entry(data: dict[str, Any], where: str, step: Callable[[], None]) -> tuple[ShardEntry, NDArray[np.int64]]:
    """The entry of a shard without its runs of sizes, and the runs: [runs, 3]."""
    runs = np.array(data.pop("sizes") or np.zeros((0, 3), np.int64))
    if runs.dtype != np.int64 or runs.ndim != 2 or runs.shape[1] != 3:
        raise TypeError(f"the sizes of shard {data.get('name')} are not lists of three integers")
    entry = ShardEntry(**data).checked()
    if len(runs) and (runs.min() < 1 or runs[:, 2].sum() != entry.samples):
        raise ValueError(f"the sizes of shard {entry.name} do not add up to {entry.samples} samples")
    refuse_outside(entry.name, where)
    step()
    return entry, runs


def refuse_outside(name: str, where: str) -> None:
    """Refuse the name of a shard that is not a path inside the folder of the data set.

    Args:
        name: of the shard.
        where: the manifest that has the name, for the message.

    Raises:
        UserError: if the name is a path to another place.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or any(mark in name for mark in "\\:\0"):
        raise UserError(f"data: {where} names a shard outside its folder: {name!r}. Do not use it")


def runs_of(sizes: Sequence[Size]) -> tuple[tuple[int, int, int], ...]:
    """Run-length encoding of the sizes of a shard's samples: (height, width, samples) of each run."""
    runs: list[tuple[int, int, int]] = []
    for height, width in sizes:
        if runs and runs[-1][:2] == (height, width):
            runs[-1] = (height, width, runs[-1][2] + 1)
        else:
            runs.append((height, width, 1))
    return tuple(runs)
