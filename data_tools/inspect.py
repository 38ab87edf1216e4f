"""`scfm data inspect`: statistics of a data set. `tables.py` shows them as text, `contact_sheet.py` as a page."""

import itertools
import json
import re
import statistics
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from scfm_core.data.corpus import Corpus
from scfm_core.data.fields import FieldKind
from scfm_core.data.folder import ImageFolder
from scfm_core.data.schema import Size
from scfm_core.data.source import Source
from scfm_core.data.uri import is_remote

_MAX_SHARDS, _MAX_DOWNLOADS = 128, 16
"""Number of shards of a source from which samples are taken: local, and remote or compressed. A terabyte is not
read."""
_MAX_MEASURED = 256
"""Number of cached samples whose stored fields are measured."""
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
# Frequent words that say nothing about the content.
_FUNCTION_WORDS = (
    "a an and are as at be by for from has have in into is it its of on or over that the their there this to under up was "
    "were which while who with"
)


@dataclass(frozen=True, kw_only=True)
class SourceSummary:
    """One source of the recipe."""

    name: str
    format: str
    address: str
    shards: int | None
    """Number of shards; None: a folder of images."""
    samples: int
    bytes: int
    draws: int
    """Number of samples that an epoch takes from it."""
    encoder: str | None = None
    """Of a cache: fingerprint of the encoders."""
    fields: tuple[tuple[str, FieldKind], ...] = ()
    """Of a cache: name and kind of each field of text."""
    text_length: int | None = None
    """Of a cache: number of text tokens; of a masked field, the largest number."""
    padding: Literal["trimmed", "stored"] | None = None
    """Of a cache with fields of tokens: whether their padding was stored or trimmed."""


@dataclass(frozen=True, kw_only=True)
class BucketSummary:
    """The samples of one size."""

    size: Size
    samples: int
    draws: int
    """In the first epoch. The others differ if an epoch is not a whole number of passes."""
    batches: int
    """Number of global batches in the first epoch."""
    waiting: int
    """Samples of the first epoch that wait for a batch of the next epoch."""


@dataclass(frozen=True, kw_only=True)
class CaptionSummary:
    """Captions of the selected samples; lengths in words."""

    count: int
    shortest: int
    median: float
    percentile_95: float
    longest: int
    empty: int
    repeated: int
    """Number of captions that an earlier sample has too, without empty ones."""
    cut: int | None
    """Number of captions of more tokens than `text_length`; None: not counted."""
    text_length: int
    words: tuple[tuple[str, int], ...]
    """The most frequent words, and the number of captions that have them; without articles, prepositions and so on."""


@dataclass(frozen=True, kw_only=True)
class StoredSummary:
    """Size of cached samples."""

    count: int
    bytes: tuple[tuple[str, float], ...]
    """Name and mean bytes of the latents and of each field."""
    tokens: tuple[tuple[str, float, int], ...]
    """Of each field that is stored without padding: name, median number of tokens, and number of samples that have `text_length`
    tokens: longer captions were cut."""
    text_length: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of `summarise`."""

    sources: tuple[SourceSummary, ...]
    buckets: tuple[BucketSummary, ...]
    """Only the sizes that samples have."""
    unused_sizes: int
    """Number of sizes that no sample has."""
    global_batch_size: int
    captions: CaptionSummary
    stored: StoredSummary | None
    """None: the sources are images."""
    sampled: tuple[tuple[int, ...], ...]
    """The numbers of the selected samples of each source."""
    unreadable: tuple[str, ...]
    """One line for each selected sample that could not be read."""
    pictures: tuple[tuple[str, int], ...]
    """Of images: what training changes in the selected ones and may surprise, and in how many."""
    left_out: tuple[str, ...]
    """What was left out of folders of images, one line for each kind."""

    @property
    def samples(self) -> int:
        """Number of samples of all sources."""
        return sum(source.samples for source in self.sources)

    @property
    def bytes(self) -> int:
        """Bytes of all sources."""
        return sum(source.bytes for source in self.sources)

    @property
    def epoch(self) -> int:
        """Number of samples in an epoch."""
        return sum(source.draws for source in self.sources)

    @property
    def warnings(self) -> list[str]:
        """What may be a mistake, one line each."""
        lines = [
            f"{bucket.size[0]} x {bucket.size[1]} has {bucket.samples} samples, fewer than the {self.global_batch_size} of a "
            f"global batch: some samples occur more than once in a batch"
            for bucket in self.buckets
            if bucket.samples < self.global_batch_size
        ]
        if self.captions.empty:
            lines.append(f"empty captions: {self.captions.empty} of {self.captions.count} that were read")
        lines += [
            f"{what}: {count} of the {self.captions.count} images that were read" for what, count in self.pictures
        ]
        if self.captions.cut:
            lines.append(
                f"captions of more than {self.captions.text_length} tokens, which are cut: {self.captions.cut} of "
                f"{self.captions.count} that were read"
            )
        lines += [f"left out: {line}" for line in self.left_out]
        if self.unreadable:
            lines.append(f"unreadable samples: {len(self.unreadable)}, the first: {self.unreadable[0]}")
        return lines


def summarise(
    corpus: Corpus,
    *,
    sample: int = 2000,
    seed: int = 0,
    global_batch_size: int = 16,
    count_tokens: Callable[[Sequence[str]], list[int]] | None = None,
    text_length: int = 256,
) -> Summary:
    """Statistics of a data set; captions and stored bytes from selected samples.

    Args:
        corpus: any. If it was opened with `data.max_bad_fraction` above 0, local shards may be missing.
        sample: number of captions to read, evenly spread over the samples of the sources. At most 128 shards of a
            source are opened, at most 16 if they are remote.
        seed: of the selection.
        global_batch_size: of the planned run.
        count_tokens: gives the number of tokens of each caption; None: they are not counted.
        text_length: more tokens are cut.

    Raises:
        UserError: if `data.partitions` does not divide the batch.
    """
    order = corpus.order(global_batch_size, seed)
    sources = tuple(_source(corpus, number, part.draws) for number, part in enumerate(order.sources))
    buckets = _buckets(corpus, order.counts_before(1).tolist(), global_batch_size)
    random = np.random.default_rng(seed)
    sampled = tuple(
        tuple(
            part.start + at
            for at in _choose(corpus.sources[number], round(sample * part.samples / len(corpus)), random)
        )
        for number, part in enumerate(order.sources)
    )
    items = [item for items in sampled for item in items]
    texts, unreadable = _read(items, corpus.caption)
    pictures: Counter[str] = Counter()
    if not corpus.is_cached:
        notes, invalid = _read(list(texts), corpus.picture_notes)
        pictures.update(note for of_image in notes.values() for note in of_image)
        unreadable += invalid
    captions = _captions(list(texts.values()), count_tokens, text_length)
    return Summary(
        sources=sources,
        buckets=buckets,
        unused_sizes=len(corpus.sizes) - len(buckets),
        global_batch_size=global_batch_size,
        captions=captions,
        stored=_stored(corpus, items) if corpus.is_cached else None,
        sampled=sampled,
        unreadable=tuple(unreadable),
        pictures=tuple(pictures.items()),
        left_out=tuple(corpus.notes),
    )


def _buckets(corpus: Corpus, draws: list[int], global_batch_size: int) -> tuple[BucketSummary, ...]:
    """The sizes that samples have; `draws` is the number of samples of each size in the first epoch."""
    samples = np.bincount(corpus.buckets, minlength=len(corpus.sizes)).tolist()
    return tuple(
        BucketSummary(
            size=size,
            samples=samples[number],
            draws=draws[number],
            batches=draws[number] // global_batch_size,
            waiting=draws[number] % global_batch_size,
        )
        for number, size in enumerate(corpus.sizes)
        if samples[number]
    )


def _source(corpus: Corpus, number: int, draws: int) -> SourceSummary:
    source, config = corpus.sources[number], corpus.configs[number]
    address = config.uri if config.split is None else f"{config.uri.rstrip('/')}/{config.split}"
    if isinstance(source, ImageFolder):
        size = sum(path.stat().st_size for path in source.paths if path.exists())
        return SourceSummary(
            name=config.name,
            format="folder",
            address=address,
            shards=None,
            samples=len(source),
            bytes=size,
            draws=draws,
        )
    manifest = source.manifest
    padding: Literal["trimmed", "stored"] | None = None
    if "tokens" in manifest.fields.values():
        padding = "stored" if manifest.padding is None else "trimmed"
    return SourceSummary(
        name=config.name,
        format=manifest.format,
        address=address,
        shards=len(manifest.shards),
        samples=manifest.samples,
        bytes=sum(entry.bytes for entry in manifest.shards),
        draws=draws,
        encoder=manifest.encoder,
        fields=tuple(manifest.fields.items()),
        text_length=manifest.text_length,
        padding=padding,
    )


def _spread(length: int, count: int, random: np.random.Generator) -> list[int]:
    """`count` of `length` places, evenly spread: one in each of `count` equal parts."""
    if count >= length:
        return list(range(length))
    edges = np.linspace(0, length, count + 1).astype(int)
    return [int(random.integers(first, last)) for first, last in itertools.pairwise(edges.tolist())]


def _choose(source: Source | ImageFolder, count: int, random: np.random.Generator) -> list[int]:
    """Places of `count` samples of a source, at least one, in a limited number of shards."""
    count = max(1, count)
    if isinstance(source, ImageFolder):
        return _spread(len(source), count, random)
    entries = source.manifest.shards
    needs_cache = is_remote(source.base) or (source.index is not None and source.index.compressed(0) is not None)
    shards = _spread(len(entries), min(count, _MAX_DOWNLOADS if needs_cache else _MAX_SHARDS), random)
    starts = np.cumsum([0, *(entry.samples for entry in entries)])
    places = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
    return [int(places[at]) for at in _spread(len(places), count, random)]


def _read(items: list[int], read: Callable[[int], Any]) -> tuple[dict[int, Any], list[str]]:
    """What `read` returns for each sample, and a line for each sample for which it fails."""
    values, unreadable = {}, []
    for item in items:
        try:
            values[item] = read(item)
        except Exception as error:  # any: `validate` is the tool that judges
            unreadable.append(str(error).removeprefix("data: "))
    return values, unreadable


def _captions(
    captions: list[str], count_tokens: Callable[[Sequence[str]], list[int]] | None, text_length: int
) -> CaptionSummary:
    lengths = [len(caption.split()) for caption in captions] or [0]
    filled = [caption for caption in captions if caption.strip()]
    excluded = set(_FUNCTION_WORDS.split())
    words = Counter(word for caption in filled for word in {*_WORD.findall(caption.lower())} - excluded)
    words = Counter({word: count for word, count in words.items() if count > 1}) or words
    cut = None
    if count_tokens is not None:
        cut = sum(count > text_length for count in count_tokens(captions)) if captions else 0
    return CaptionSummary(
        count=len(captions),
        shortest=min(lengths),
        median=statistics.median(lengths),
        percentile_95=round(float(np.percentile(lengths, 95)), 1),
        longest=max(lengths),
        empty=len(captions) - len(filled),
        repeated=len(filled) - len(set(filled)),
        cut=cut,
        text_length=text_length,
        words=tuple(sorted(words.items(), key=lambda item: (-item[1], item[0]))[:24]),
    )


def _stored(corpus: Corpus, items: list[int]) -> StoredSummary | None:
    """Reads only the headers (https://github.com/huggingface/safetensors#format), not the tensors."""
    sizes: dict[str, list[int]] = {name: [] for name in ("latents", *corpus.fields)}
    tokens: dict[str, list[int]] = {}
    for item in items[:: -(-len(items) // _MAX_MEASURED)]:
        try:
            shard, at, source = corpus.raw(item)
            content = (shard.read(at, "safetensors") if shard is not None else None) or b""
            header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
            extents = {name: header[name]["data_offsets"] for name in sizes}
            lengths = {name: header[name]["shape"][0] for name in _unpadded(corpus, source)}
        except Exception:  # counted as unreadable already; `scfm data validate` gives the reason
            continue
        for name, (first, last) in extents.items():
            sizes[name].append(last - first)
        for name, length in lengths.items():
            tokens.setdefault(name, []).append(length)
    if not sizes["latents"]:
        return None
    return StoredSummary(
        count=len(sizes["latents"]),
        bytes=tuple((name, statistics.fmean(values)) for name, values in sizes.items()),
        tokens=tuple(
            (name, statistics.median(values), sum(value == corpus.text_length for value in values))
            for name, values in tokens.items()
        ),
        text_length=corpus.text_length or 0,
    )


def _unpadded(corpus: Corpus, source: Source | ImageFolder) -> list[str]:
    """The fields of tokens that a source stores without padding."""
    is_trimmed = isinstance(source, Source) and source.padding is not None
    return [name for name, kind in corpus.fields.items() if kind == "masked" or (kind == "tokens" and is_trimmed)]
