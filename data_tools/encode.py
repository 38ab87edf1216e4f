"""`scfm data encode`: images with captions -> shards of cached latents and text embeddings."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from data_tools.job import LEFT_OUT, Job, Made, Progress, plan_shards
from data_tools.validate import printable
from scfm_core.data.corpus import Corpus
from scfm_core.data.image import unit_range
from scfm_core.data.recipe import DataConfig
from scfm_core.data.schema import BadData, Manifest, Record
from scfm_core.data.source import PADDING
from scfm_core.errors import UserError
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.fingerprint import encoder_fingerprint
from scfm_core.models.protocol import ModelFamily
from scfm_core.wording import count

CUT = "captions longer than the text length, cut"
_PADDING_WAIT = 10.0
"""Seconds to wait for the process that writes the padding, before it is taken for killed."""


class Encoded(NamedTuple):
    """The result of a job."""

    manifest: Manifest | None
    """None while other processes are working."""
    padding_error: float | None
    """`CacheWriter.padding_error`; None if the job was finished before."""
    counts: Mapping[str, int]
    """What was changed in the samples, in words, and how often; empty while other processes are working."""


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
            settings={"model.text_length": config.text_length},
        )
        self._error = [0.0, 0.0]

    def _shared_padding(self, path: Path) -> bytes:
        """Content of the padding's file. One process writes it for all, because another GPU may round differently."""
        padding = self.text.encode([""]).fields["text"][0].to(self.config.dtype).cpu().contiguous()
        content = save({"text": padding})
        try:
            # "x" creates the file in one process only. A hard link would do the same with a complete file, but exFAT,
            # SMB shares and mounted buckets have no hard links. So the others wait until it is complete.
            with path.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            _wait_until_complete(path, content)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise UserError(
                f"the cache could not be written to {path.parent}: {error.strerror}. Fix this and run again"
            ) from error
        return path.read_bytes()

    def fields(
        self,
        latents: Tensor,
        captions: list[str],
        details: list[dict[str, object]],
        path: Mapping[str, Tensor] | None = None,
    ) -> Iterator[tuple[dict[str, bytes], list[str], bool]]:
        """Each sample: its stored fields, the names of its tensors that are not finite, and whether its caption was cut.

        Args:
            latents: [B, C, h, w].
            captions: B captions.
            details: content of the field `json` of each sample.
            path: the teacher's path, stored unchanged: tensors of B rows by name.
        """
        cond = self.text.encode(captions)
        tokens = self.text.token_counts(captions)
        for row, (caption, used, detail) in enumerate(zip(captions, tokens, details, strict=True)):
            text, length = cond.fields["text"][row].to(self.config.dtype).cpu(), None
            if self.padding is not None:
                length = self.text.kept(used)
                self._error[0] += float((text[length:].float() - self.padding[length:].float()).square().sum())
                self._error[1] += float(text[length:].float().square().sum())
            tensors = {"latents": latents[row], "text": text[:length], "pooled": cond.fields["pooled"][row]}
            stored = {name: tensor.to(self.config.dtype) for name, tensor in tensors.items()}
            stored |= {name: tensor[row] for name, tensor in (path or {}).items()}
            fields = {
                "safetensors": save({name: tensor.cpu().contiguous() for name, tensor in stored.items()}),
                "txt": caption.encode(),
                "json": json.dumps(detail).encode(),
            }
            not_finite = [name for name, tensor in stored.items() if not bool(tensor.isfinite().all())]
            yield fields, not_finite, used > self.config.text_length

    @property
    def padding_error(self) -> float | None:
        """||T5's padding - shared padding|| / ||T5's padding||, over all samples so far; None: the padding is stored."""
        return (self._error[0] / self._error[1]) ** 0.5 if self._error[1] else None


def _wait_until_complete(path: Path, content: bytes) -> None:
    """Wait for another process that writes a file of as many bytes as `content`; if it was killed, write `content`."""
    end = time.monotonic() + _PADDING_WAIT
    while path.stat().st_size != len(content):
        if time.monotonic() > end:
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(content)
            temporary.replace(path)
        time.sleep(0.05)


def encode(
    corpus: Corpus,
    output: Path,
    family: ModelFamily,
    config: EncodeConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress = lambda items, total: items,
) -> Encoded:
    """Encode every image and caption once; each shard has one size.

    Args:
        corpus: the images. The recipe decides their sizes and crops.
        output: folder of the shards.
        family: the model whose VAE, CLIP and T5 are used.
        config: of the cache.
        rank, world_size: of this process; the processes share the shards.
        progress: shows a progress bar; called with (images, their number), it returns the images.

    Raises:
        UserError: if an image, caption or size cannot be encoded, or the output cannot be written or has other data.
    """
    for size in corpus.sizes:
        family.latent_shape(*size)
    if corpus.is_cached:
        raise UserError("data: the source is a cache already; only images can be encoded")
    parameters = {
        "fields": [[config.image, dict(config.captions)] for config in corpus.configs],
        "sizes": corpus.sizes,
        "background": corpus.config.background,
        **config.parameters(family),
    }
    job = Job(output, parameters, corpus.fingerprint)  # before loading the encoders, which takes minutes
    if job.finished is not None:
        return Encoded(job.finished, None, job.counts)
    writer = CacheWriter(output, family, config)
    vae = Autoencoder(family, config.dtype, config.device)

    def make(items: Sequence[int]) -> Made:
        return _make_batch(items, corpus, vae, writer)

    manifest = job.run(
        plan_shards([corpus.items_of(size).tolist() for size in corpus.sizes], config.samples_per_shard),
        make,
        replace(
            writer.draft,
            background=corpus.config.background,
            settings=writer.draft.settings | size_settings(corpus.config),
        ),
        batch_size=config.batch_size,
        mark=corpus.mark,
        max_left_out=corpus.config.max_bad_fraction,
        rank=rank,
        world_size=world_size,
        progress=progress,
    )
    return Encoded(manifest, writer.padding_error, job.counts)


def size_settings(config: DataConfig) -> dict[str, object]:
    """The sizes of a cache, for `Manifest.settings`."""
    buckets = config.buckets if isinstance(config.buckets, str) else [list(size) for size in config.buckets]
    settings: dict[str, object] = {"data.resolution": list(config.resolution), "data.buckets": buckets}
    return settings | ({"data.bucket_step": config.bucket_step} if buckets == "auto" else {})


def _make_batch(items: Sequence[int], corpus: Corpus, vae: Autoencoder, writer: CacheWriter) -> Made:
    """Encode samples of one size."""
    size, made = corpus.sizes[corpus.buckets[items[0]]], Made()

    def leave_out(error: BadData) -> None:
        if corpus.config.max_bad_fraction == 0:
            raise BadData(
                f"{error}. Or leave such samples out, with data.max_bad_fraction=0.01; what is encoded is kept"
            )
        made.left_out.append(str(error))

    records: dict[int, Record] = {}
    for item in items:
        try:
            records[item] = corpus.record(item, item)
        except BadData as error:
            leave_out(error)
    if not records:
        return made
    images = torch.stack([record.image for record in records.values() if record.image is not None])
    latents = vae.encode(unit_range(images.to(writer.config.device)))
    details: list[dict[str, object]] = [
        {"height": size[0], "width": size[1], "source": record.key} for record in records.values()
    ]
    samples = writer.fields(latents, [record.caption for record in records.values()], details)
    for (item, record), (fields, not_finite, is_cut) in zip(records.items(), samples, strict=True):
        if not_finite:
            leave_out(
                BadData(
                    f"data: the {' and '.join(not_finite)} of {record.key!r} are not finite in {writer.config.dtype}. Look at the image "
                    f"and the caption; if many are so, check the model's weights, or encode with --dtype float32"
                )
            )
            continue
        made.samples.append((f"{item:08d}", fields, size))  # not the file's name, which may have a dot or a slash
        made.counts += Counter([*record.notes, *[CUT] * is_cut])
    return made


def format_result(result: Encoded, output: Path, notes: Sequence[str] = ()) -> str:
    """What a job has written, what was changed, and what was left out, as text.

    Args:
        result: of the job.
        output: its folder.
        notes: what was left out of folders of images, one line for each kind.
    """
    manifest, lines = result.manifest, []
    if result.padding_error is not None:
        lines.append(
            f"text padding is trimmed; the padding in its place differs from T5's by {result.padding_error:.1%} (--keep-padding "
            f"stores T5's)"
        )
    if manifest is None:
        return "\n".join([*lines, f"this process is done; the last process writes the manifest of {output}"])
    lines += [printable(f"left out: {note}") for note in notes]
    lines += [f"{what}: {count} of {manifest.samples}" for what, count in result.counts.items()]
    total = sum(shard.bytes for shard in manifest.shards)
    lines.append(
        f"{count(manifest.samples, 'sample')} in {count(len(manifest.shards), 'shard')}, {total / 1e6:,.1f} MB ({total / manifest.samples / 1e3:,.1f} "
        f"kB per sample), in {output}"
    )
    if (output / LEFT_OUT).is_file():
        left_out = (output / LEFT_OUT).read_text(encoding="utf-8").count("\n")
        lines.append(f"left out: {left_out} of {left_out + manifest.samples} samples, see {output / LEFT_OUT}")
    return "\n".join(lines)
