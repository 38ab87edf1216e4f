"""`scfm data encode`: images with captions -> shards of cached latents and text embeddings."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from data_tools.job import Job, PlannedShard, plan_shards
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
    """Number of T5 tokens."""
    keep_padding: bool = False
    """Store T5's output at padding tokens too. False: store it up to the end of the caption. The padding is then the
    output for an empty caption, which is nearly the same (the job prints the difference)."""
    dtype: torch.dtype = torch.bfloat16
    """Of the encoders and the stored tensors."""
    device: torch.device | str = "cpu"
    """Of the encoders."""
    batch_size: int = 16
    """Number of images in a forward pass."""
    samples_per_shard: int = 1000
    """Number of samples in a full shard."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.samples_per_shard) < 1 or not 1 <= self.text_length <= 512:
            raise UserError(
                f"batch size and samples per shard must be at least 1 and the text length in 1..512, got {self.batch_size}, "
                f"{self.samples_per_shard} and {self.text_length}"
            )

    def parameters(self, family: ModelFamily) -> dict[str, object]:
        """Everything that determines the content of a cache made with the encoders of `family`."""
        return {
            "encoder": encoder_fingerprint(family.folder),
            "text_length": self.text_length,
            "keep_padding": self.keep_padding,
            "dtype": str(self.dtype),
            "samples_per_shard": self.samples_per_shard,
        }


class CacheWriter:
    """Makes cached samples of latents and captions. If texts are trimmed, writes their padding beside the shards.

    Args:
        output: folder of the shards.
        family: the model whose text encoders are used.
        config: of the cache.

    Raises:
        UserError: if the padding cannot be written.
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
        """Content of the padding's file. One process writes it for all, because another GPU may round differently."""
        padding = self.text.encode([""]).text[0].to(self.config.dtype).cpu().contiguous()
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(save({"text": padding}))
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
            return path.read_bytes()
        except OSError as error:
            raise UserError(
                f"the cache could not be written to {path.parent}: {error.strerror}. Fix this and run again"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

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
            captions: B captions.
            details: content of the field `json` of each sample.
            path: the teacher's path, stored unchanged: tensors of B rows by name.
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
        """||T5's padding - shared padding|| / ||T5's padding||, over all samples so far; None: the padding is stored."""
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
    """Encode every image and caption once; each shard has one size.

    Args:
        corpus: the images. The recipe decides their sizes and crops.
        output: folder of the shards.
        family: the model whose VAE, CLIP and T5 are used.
        config: of the cache.
        rank, world_size: of this process; the processes share the shards.
        progress: shows a progress bar; called with (shards, their number), it returns the shards.

    Returns:
        the manifest (None while other processes are working), and `CacheWriter.padding_error`.

    Raises:
        UserError: if an image, caption or size cannot be encoded, or the output cannot be written or has other data.
    """
    for size in corpus.sizes:
        family.latent_shape(*size)
    if corpus.is_cached:
        raise UserError("data: the source is a cache already; only images can be encoded")
    parameters = {
        "data": corpus.fingerprint,
        "fields": [[config.image, dict(config.captions)] for config in corpus.configs],
        "sizes": corpus.sizes,
        **config.parameters(family),
    }
    job = Job(output, parameters)  # before loading the encoders, which takes minutes
    if job.finished is not None:
        return job.finished, None
    writer = CacheWriter(output, family, config)
    vae = Autoencoder(family, config.dtype, config.device)

    def write(shard: PlannedShard, tar: TarWriter) -> list[str]:
        return _write_shard(shard.items, tar, corpus, vae, writer)

    shards = plan_shards([corpus.items_of(size).tolist() for size in corpus.sizes], config.samples_per_shard)
    manifest = job.run(shards, write, writer.draft, rank=rank, world_size=world_size, progress=progress)
    return manifest, writer.padding_error


def _write_shard(
    items: Sequence[int], tar: TarWriter, corpus: Corpus, vae: Autoencoder, writer: CacheWriter
) -> list[str]:
    """Write the samples of one shard, which have one size; returns what is wrong with those left out."""
    size, left_out = corpus.sizes[corpus.buckets[items[0]]], []
    for start in range(0, len(items), writer.config.batch_size):
        valid, records = [], []
        for item in items[start : start + writer.config.batch_size]:
            try:
                records.append(corpus.record(item, item))
                valid.append(item)
            except BadData as error:
                if corpus.config.max_bad_fraction == 0:
                    raise
                left_out.append(str(error))
        if records:
            _write_batch(tar, valid, records, size, vae, writer)
    return left_out


def _write_batch(
    tar: TarWriter, items: list[int], records: list[Record], size: Size, vae: Autoencoder, writer: CacheWriter
) -> None:
    latents = vae.encode(torch.stack([record.image for record in records if record.image is not None]))
    details: list[dict[str, object]] = [
        {"height": size[0], "width": size[1], "source": record.key} for record in records
    ]
    samples = writer.fields(latents, [record.caption for record in records], details)
    for item, fields in zip(items, samples, strict=True):
        tar.write(f"{item:08d}", fields, size)  # not the file's name, which may have a dot or a slash
