"""`scfm data encode`: images with captions -> shards of cached latents and text embeddings."""

import hashlib
import json
import math
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
from scfm_core.files import renamed_at_end
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.encoders import Autoencoder, TextEncoders, load_tokenizer
from scfm_core.models.fingerprint import encoder_fingerprint
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.quantised import Base
from scfm_core.wording import count

CUT = "captions longer than the text length, cut"
_PADDING_WAIT = 10.0
"""Seconds to wait for the process that writes the padding, before it is taken for killed."""


class Encoded(NamedTuple):
    """The result of a job."""

    manifest: Manifest | None
    """None while other processes are working."""
    padding_error: float | None
    """`CacheWriter.padding_error`; None if no padding was trimmed, or the job was finished before."""
    counts: Mapping[str, int]
    """What was changed in the samples, in words, and how often; empty while other processes are working."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How a cache is made."""

    text_length: int = 256
    """Number of tokens of a caption, as `model.text_length`."""
    trim_padding: bool = False
    """Store fields of tokens up to the end of the caption. Their padding is then the encoder's output for an empty caption, which
    differs from the one that diffusers' pipeline gives to the network (the job prints by how much)."""
    latents_only: bool = False
    """Store latents and captions, no text. Training then encodes the captions."""
    dtype: torch.dtype = torch.bfloat16
    """Of the encoders and the stored tensors."""
    encoders: Base = "bfloat16"
    """How text encoders of more than a gigabyte are stored."""
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
        if self.trim_padding and self.latents_only:
            raise UserError("with --latents-only no text is stored that could be trimmed: remove --trim-padding")

    def check(self, family: ModelFamily) -> None:
        """UserError if trimming is requested, but the text of `family` has no padding after the caption that a run adds again."""
        if not self.trim_padding:
            return
        if "tokens" not in family.fields.values():
            raise UserError(
                f"--trim-padding has no effect on {type(family).__name__}: its text is stored without padding. Remove the option"
            )
        if load_tokenizer(family).padding_side == "left":
            raise UserError(
                f"--trim-padding: the tokenizer of {family.folder} pads before the caption, and only padding after it can be trimmed. "
                f"Remove the option"
            )

    def parameters(self, family: ModelFamily) -> dict[str, object]:
        """Everything that determines the content of a cache made with the encoders of `family`."""
        return {
            "encoder": encoder_fingerprint(family.folder),
            "text_length": self.text_length,
            "keep_padding": not self.trim_padding,
            **({"latents_only": True} if self.latents_only else {}),
            "dtype": str(self.dtype),
            **({"encoders": self.encoders} if self.encoders != "bfloat16" else {}),
            "samples_per_shard": self.samples_per_shard,
        }


class CacheWriter:
    """Makes cached samples of latents and captions. If text is trimmed, writes its padding beside the shards.

    Args:
        output: folder of the shards.
        family: the model whose text encoders are used.
        config: of the cache.
        needs_text: load the text encoders. False: for a cache of latents alone.

    Raises:
        UserError: if the text encoders cannot be loaded, or the padding cannot be written.
    """

    def __init__(self, output: Path, family: ModelFamily, config: EncodeConfig, *, needs_text: bool = True) -> None:
        self.config, self.kinds = config, {} if config.latents_only else family.fields
        self.text = (
            TextEncoders(family, config.text_length, config.dtype, config.device, config.encoders)
            if needs_text
            else None
        )
        self.padding: dict[str, Tensor] = {}
        digest = None
        if config.trim_padding:
            content = self._shared_padding(output / PADDING)
            self.padding = load(content)
            digest = hashlib.sha256(content).hexdigest()
        self.draft = Manifest(
            encoder=encoder_fingerprint(family.folder),
            fields=self.kinds,
            text_length=None if config.latents_only else family.text_tokens(config.text_length),
            padding=digest,
            settings={} if config.latents_only else {"model.text_length": config.text_length},
        )
        self._error = [0.0, 0.0]

    def _shared_padding(self, path: Path) -> bytes:
        """Content of the padding's file. One process writes it for all, because another GPU may round differently."""
        assert self.text is not None
        empty = self.text.encode([""]).fields
        names = [name for name, kind in self.kinds.items() if kind == "tokens"]
        content = save({name: empty[name][0].to(self.config.dtype).cpu().contiguous() for name in names})
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

    def encode(self, captions: Sequence[str], guidance: float | None = None) -> Conditioning:
        """The conditioning of captions, as a run on the cache will have it: with the shared padding if text is trimmed.

        Args:
            captions: B captions.
            guidance: the same for all rows.
        """
        assert self.text is not None
        cond = self.text.encode(captions, guidance)
        fields = {name: tensor.to(self.config.dtype) for name, tensor in cond.fields.items()}
        for name, padding in self.padding.items():
            shared = padding.to(fields[name].device)
            for row, used in zip(fields[name], self.text.token_counts(captions), strict=True):
                length = self.text.kept(used)
                self._error[0] += float((row[length:].float() - shared[length:].float()).square().sum())
                self._error[1] += float(row[length:].float().square().sum())
                row[length:] = shared[length:]
        return replace(cond, fields=fields)

    def samples(
        self,
        latents: Tensor,
        captions: list[str],
        cond: Conditioning | None,
        details: list[dict[str, object]],
        path: Mapping[str, Tensor] | None = None,
    ) -> Iterator[tuple[dict[str, bytes], list[str], bool]]:
        """Each sample: its stored files, the names of its tensors that are not finite, and whether its caption was cut.

        Args:
            latents: [B, C, h, w].
            captions: B captions.
            cond: of the captions, from `encode`. None: of a cache of latents alone.
            details: content of the file `json` of each sample.
            path: the teacher's path, stored unchanged: tensors of B rows by name.
        """
        tokens = [0] * len(captions) if self.text is None else self.text.token_counts(captions)
        for row, (caption, used, detail) in enumerate(zip(captions, tokens, details, strict=True)):
            stored = {"latents": latents[row].to(self.config.dtype)}
            if cond is not None:
                stored |= self._stored_text(cond, row, used)
            stored |= {name: tensor[row] for name, tensor in (path or {}).items()}
            files = {
                "safetensors": save({name: tensor.cpu().contiguous() for name, tensor in stored.items()}),
                "txt": caption.encode(),
                "json": json.dumps(detail).encode(),
            }
            not_finite = [name for name, tensor in stored.items() if not bool(tensor.isfinite().all())]
            yield files, not_finite, used > self.config.text_length

    def _stored_text(self, cond: Conditioning, row: int, used: int) -> dict[str, Tensor]:
        """The fields of one row, without the padding that a run adds again; `used` is the number of tokens of its caption."""
        assert self.text is not None
        lengths = {
            "tokens": self.text.kept(used) if self.padding else None,
            "masked": None if cond.lengths is None else cond.lengths[row],
            "vector": None,
        }
        return {name: cond.fields[name][row][: lengths[kind]] for name, kind in self.kinds.items()}

    @property
    def padding_error(self) -> float | None:
        """||the encoder's padding - shared padding|| / ||the encoder's padding||, over all samples so far; None: nothing is trimmed."""
        return (self._error[0] / self._error[1]) ** 0.5 if self._error[1] else None


def _wait_until_complete(path: Path, content: bytes) -> None:
    """Wait for another process that writes a file of as many bytes as `content`; if it was killed, write `content`."""
    end = time.monotonic() + _PADDING_WAIT
    while path.stat().st_size != len(content):
        if time.monotonic() > end:
            with renamed_at_end(path) as temporary:
                temporary.write_bytes(content)
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
        family: the model whose VAE and text encoders are used.
        config: of the cache.
        rank, world_size: of this process; the processes share the shards.
        progress: shows a progress bar; called with (images, their number), it returns the images.

    Raises:
        UserError: if an image, caption or size cannot be encoded, or the output cannot be written or has other data.
    """
    config.check(family)
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
    writer = CacheWriter(output, family, config, needs_text=not config.latents_only)
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
        mark=lambda items: _mark(items, corpus),
        max_left_out=corpus.config.max_bad_fraction,
        rank=rank,
        world_size=world_size,
        progress=progress,
    )
    return Encoded(manifest, writer.padding_error, job.counts)


def _mark(items: Sequence[int], corpus: Corpus) -> str:
    """A hash of samples and of their numbers, which become keys: an image that is added before them changes these."""
    return f"{hashlib.sha256(json.dumps(list(items)).encode()).hexdigest()} {corpus.mark(items)}"


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
            enough = max(1, math.ceil(100 / len(corpus))) / 100  # for this one; of a few images 1 % is none
            raise BadData(
                f"{error}. Or leave such samples out, with data.max_bad_fraction={enough:g}; what is encoded is kept"
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
    captions = [record.caption for record in records.values()]
    cond = None if writer.text is None else writer.encode(captions)
    samples = writer.samples(latents, captions, cond, details)
    for (item, record), (files, not_finite, is_cut) in zip(records.items(), samples, strict=True):
        if not_finite:
            leave_out(
                BadData(
                    f"data: the {' and '.join(not_finite)} of {record.key!r} are not finite in {writer.config.dtype}. Look at the image "
                    f"and the caption; if many are so, check the model's weights, or encode with --dtype float32"
                )
            )
            continue
        made.samples.append((f"{item:08d}", files, size))  # not the file's name, which may have a dot or a slash
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
            f"text padding is trimmed; the padding in its place differs from the encoder's by {result.padding_error:.1%} "
            f"(without --trim-padding the encoder's is stored)"
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
