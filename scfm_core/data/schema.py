"""What a sample is, in memory and in a shard.

A cached sample is three members of a tar in webdataset's layout (https://github.com/webdataset/webdataset):
`<key>.safetensors` (`latents` [C, H, W], `text` [L, D], `pooled` [P]), `<key>.txt` (caption, UTF-8) and `<key>.json`
(`height`, `width` in pixels, `source`). Every record carries its own shapes, so one shard may hold several sizes;
`manifest.json` beside the shards counts and hashes them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scfm_core.errors import UserError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "scfm-webdataset"
MANIFEST_VERSION = 1


@dataclass(kw_only=True)
class Record:
    """One sample as a reader returns it: cached tensors, or an image to be encoded on the fly."""

    key: str
    caption: str
    latents: Tensor | None = None
    text: Tensor | None = None
    pooled: Tensor | None = None
    image: Tensor | None = None
    """fp32 [3, H, W] in [-1, 1]."""


@dataclass(kw_only=True)
class Batch:
    """Records of one shape, stacked."""

    sample_ids: Tensor
    """Global sample indices, int64 [B]: the place in the run's endless stream, the counter of its randomness."""
    keys: list[str]
    captions: list[str]
    latents: Tensor | None
    text: Tensor | None
    pooled: Tensor | None
    images: Tensor | None

    def __len__(self) -> int:
        return len(self.keys)


def collate(sample_ids: Sequence[int], records: Sequence[Record]) -> Batch:
    """Stack records.

    Raises:
        UserError: if their shapes differ (one batch holds one size).
    """

    def stack(name: str) -> Tensor | None:
        tensors = [getattr(record, name) for record in records]
        if tensors[0] is None:
            return None
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            keys = ", ".join(record.key for record in records[:4])
            raise UserError(
                f"data: a batch needs {name} of one shape, but samples {keys} ... have {sorted(shapes)}. "
                f"Encode the folder at one resolution"
            )
        return torch.stack(tensors)

    return Batch(
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        keys=[record.key for record in records],
        captions=[record.caption for record in records],
        latents=stack("latents"),
        text=stack("text"),
        pooled=stack("pooled"),
        images=stack("image"),
    )


class Dataset(Protocol):
    """Random access to records; the order is the loader's business."""

    fingerprint: str
    """Identity of the content: a resumed run must find the same."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record at `index`; raises UserError, naming file and key, if it cannot be read."""
        ...

    def caption(self, index: int) -> str:
        """The caption alone, without decoding the rest."""
        ...


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard as the manifest lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json` of a cache."""

    encoder: str
    """Fingerprint of VAE and text encoders; caches of two models do not mix."""
    text_length: int
    """T5 tokens."""
    resolution: tuple[int, int]
    """Height and width in pixels."""
    samples: int
    shards: tuple[ShardEntry, ...]

    def write(self, folder: Path) -> None:
        """Write aside and rename: a manifest that is there is complete."""
        data = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, **asdict(self)}
        aside = folder / f"{MANIFEST}.tmp"
        aside.write_text(json.dumps(data, indent=2) + "\n")
        aside.replace(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check.

        Raises:
            UserError: if it is missing, damaged or of another version.
        """
        path = folder / MANIFEST
        if not folder.is_dir():
            raise UserError(
                f"data.path: there is no folder {str(folder)!r}. Make it with `scfm data encode IMAGES {folder}`"
            )
        if not path.is_file():
            raise UserError(
                f"data.path: {folder} has no {MANIFEST}. Either it is not a cache, or `scfm data encode` did not "
                f"finish: run it again. For a folder of plain images set data.format=folder"
            )
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != MANIFEST_FORMAT or data.pop("version") != MANIFEST_VERSION:
                raise UserError(
                    f"data.path: {path} is of another format or version than this release reads; encode again"
                )
            shards = tuple(ShardEntry(**shard) for shard in data.pop("shards"))
            manifest = cls(resolution=tuple(data.pop("resolution")), shards=shards, **data)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, no UTF-8, or other keys
            raise UserError(f"data.path: {path} is damaged ({error!r}); encode again") from error
        if manifest.samples != sum(shard.samples for shard in manifest.shards):
            raise UserError(
                f"data.path: {path} is damaged: {manifest.samples} samples are not its shards' sum; encode again"
            )
        if manifest.samples == 0:
            raise UserError(f"data.path: {path} lists no sample; encode a folder with images")
        return manifest
