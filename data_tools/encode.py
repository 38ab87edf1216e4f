"""`scfm data encode`: images with captions -> shards of cached latents and text embeddings."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from data_tools.job import Job, Piece, cut
from scfm_core.data.corpus import Corpus
from scfm_core.data.schema import BadData, Manifest, Record, Size
from scfm_core.data.source import PADDING
from scfm_core.data.webdataset import TarWriter
from scfm_core.errors import UserError
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.weights import encoder_fingerprint


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How a cache is made."""

    text_length: int = 256
    """T5 tokens."""
    keep_padding: bool = False
    """Store T5's output at every padding token too. Off: stored up to the caption's end, and filled up with the output
    for an empty caption, which it is near to (the job says how near)."""
    dtype: torch.dtype = torch.bfloat16
    """Of the encoders and the stored tensors."""
    device: torch.device | str = "cpu"
    """Of the encoders."""
    batch_size: int = 16
    """Images a forward."""
    samples_per_shard: int = 1000
    """Records in a full shard."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.samples_per_shard) < 1 or not 1 <= self.text_length <= 512:
            raise UserError(
                f"batch size and samples per shard must be at least 1 and the text length in 1..512, got {self.batch_size}, "
                f"{self.samples_per_shard} and {self.text_length}"
            )

    def parameters(self, family: ModelFamily) -> dict[str, object]:
        """What of it decides a cache's content, with the model whose encoders are used."""
        return {
            "encoder": encoder_fingerprint(family.folder),
            "text_length": self.text_length,
            "keep_padding": self.keep_padding,
            "dtype": str(self.dtype),
            "samples_per_shard": self.samples_per_shard,
        }


class CacheWriter:
    """Turns latents and captions into cached samples; the padding that is trimmed lies beside the shards.

    Args:
        output: folder of the shards.
        family: the model whose encoders are used.
        config: how.
    """

    def __init__(self, output: Path, family: ModelFamily, config: EncodeConfig) -> None:
        self.config = config
        self.text = TextEncoders(family, config.text_length, config.dtype, config.device)
        self.padding: Tensor | None = None
        digest = None
        if not config.keep_padding:
            content = self._shared_padding(output / PADDING)
            self.padding = load(content)["text"]
            digest = hashlib.sha256(content).hexdigest()
        self.draft = Manifest(
            encoder=encoder_fingerprint(family.folder),
            text_length=family.text_tokens(config.text_length),
            padding=digest,
        )
        self._error = [0.0, 0.0]

    def _shared_padding(self, path: Path) -> bytes:
        """The padding's file: that of the process which was first, since another GPU may round otherwise."""
        padding = self.text.encode([""]).text[0].to(self.config.dtype).cpu().contiguous()
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            aside.write_bytes(save({"text": padding}))
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
            return path.read_bytes()
        except OSError as error:
            raise UserError(
                f"the cache could not be written to {path.parent}: {error.strerror}. Mend that and run again"
            ) from error
        finally:
            aside.unlink(missing_ok=True)

    def fields(
        self,
        latents: Tensor,
        captions: list[str],
        details: list[dict[str, object]],
        path: Mapping[str, Tensor] | None = None,
    ) -> Iterator[dict[str, bytes]]:
        """The stored fields of each sample.

        Args:
            latents: [B, C, h, w].
            captions: B of them.
            details: what `json` holds.
            path: the teacher's, to be stored as it is: tensors of B rows by name.
        """
        cond = self.text.encode(captions)
        lengths = self.text.lengths(captions) if self.padding is not None else [None] * len(captions)
        for row, (caption, length, detail) in enumerate(zip(captions, lengths, details, strict=True)):
            text = cond.text[row].to(self.config.dtype).cpu()
            if self.padding is not None:
                self._error[0] += float((text[length:].float() - self.padding[length:].float()).square().sum())
                self._error[1] += float(text[length:].float().square().sum())
            tensors = {"latents": latents[row], "text": text[:length], "pooled": cond.pooled[row]}
            stored = {name: tensor.to(self.config.dtype) for name, tensor in tensors.items()}
            stored |= {name: tensor[row] for name, tensor in (path or {}).items()}
            yield {
                "safetensors": save({name: tensor.cpu().contiguous() for name, tensor in stored.items()}),
                "txt": caption.encode(),
                "json": json.dumps(detail).encode(),
            }

    @property
    def padding_error(self) -> float | None:
        """||T5's padding - what stands for it|| / ||T5's padding||, over all samples so far; None if it is kept."""
        return (self._error[0] / self._error[1]) ** 0.5 if self._error[1] else None


def encode(
    corpus: Corpus,
    output: Path,
    family: ModelFamily,
    config: EncodeConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> tuple[Manifest | None, float | None]:
    """Encode every image and caption once; each shard holds one size.

    Args:
        corpus: images; their sizes and crops are the recipe's.
        output: folder of the shards.
        family: the model whose VAE, CLIP and T5 encode.
        config: how.
        rank, world_size: this process, of how many that share the work.
        progress: wraps the shards to show a bar; called with (shards, their number).

    Returns:
        the manifest written beside the shards (None while other processes are at work), and the error of the padding.

    Raises:
        UserError: for an image, caption or size that cannot be encoded, or an output that is not writable or holds
            something else.
    """
    for size in corpus.sizes:
        family.latent_shape(*size)
    if corpus.is_cached:
        raise UserError("data: this is a cache already; encode images")
    parameters = {
        "data": corpus.fingerprint,
        "fields": [[config.image, dict(config.captions)] for config in corpus.configs],
        "sizes": corpus.sizes,
        **config.parameters(family),
    }
    job = Job(output, parameters)  # before the encoders are loaded, which takes minutes
    if job.finished is not None:
        return job.finished, None
    writer = CacheWriter(output, family, config)
    vae = Autoencoder(family, config.dtype, config.device)

    def write(piece: Piece, tar: TarWriter) -> list[str]:
        size, left_out = corpus.sizes[corpus.buckets[piece.items[0]]], []
        for at in range(0, len(piece.items), config.batch_size):
            items, records = [], []
            for item in piece.items[at : at + config.batch_size]:
                try:
                    records.append(corpus.record(item, item))
                    items.append(item)
                except BadData as error:
                    if corpus.config.max_bad_fraction == 0:
                        raise
                    left_out.append(str(error))
            if records:
                _write_batch(tar, items, records, size, vae, writer)
        return left_out

    pieces = cut([corpus.items_of(size).tolist() for size in corpus.sizes], config.samples_per_shard)
    manifest = job.run(pieces, write, writer.draft, rank=rank, world_size=world_size, progress=progress)
    return manifest, writer.padding_error


def _write_batch(
    tar: TarWriter, items: list[int], records: list[Record], size: Size, vae: Autoencoder, writer: CacheWriter
) -> None:
    latents = vae.encode(torch.stack([record.image for record in records if record.image is not None]))
    details: list[dict[str, object]] = [
        {"height": size[0], "width": size[1], "source": record.key} for record in records
    ]
    samples = writer.fields(latents, [record.caption for record in records], details)
    for item, fields in zip(items, samples, strict=True):
        tar.write(f"{item:08d}", fields, size)  # never the file's name: it may hold a dot or a slash
