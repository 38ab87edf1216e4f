"""`scfm data inspect`: statistics of a data set. `contact_sheet.py` shows it as a page."""

import itertools
import json
import re
import statistics
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_tools.validate import printable
from scfm_core.data.corpus import Corpus
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
    text_length: int | None = None
    """Of a cache: number of T5 tokens."""
    padding: Literal["trimmed", "stored"] | None = None
    """Of a cache: whether the padding of the texts was stored or trimmed."""


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
    words: tuple[tuple[str, int], ...]
    """The most frequent words, and the number of captions that have them; without articles, prepositions and so on."""


@dataclass(frozen=True, kw_only=True)
class StoredSummary:
    """Size of cached samples."""

    count: int
    bytes: tuple[tuple[str, float], ...]
    """Name and mean bytes of each tensor."""
    tokens: float
    """Median number of stored T5 tokens."""
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
        if self.unreadable:
            lines.append(f"unreadable samples: {len(self.unreadable)}, the first: {self.unreadable[0]}")
        return lines


def summarise(corpus: Corpus, *, sample: int = 2000, seed: int = 0, global_batch_size: int = 16) -> Summary:
    """Statistics of a data set; captions and stored bytes from selected samples.

    Args:
        corpus: any. If it was opened with `data.max_bad_fraction` above 0, local shards may be missing.
        sample: number of captions to read, evenly spread over the samples of the sources. At most 128 shards of a
            source are opened, at most 16 if they are remote.
        seed: of the selection.
        global_batch_size: of the planned run.

    Raises:
        UserError: if `data.partitions` does not divide the batch.
    """
    order = corpus.order(global_batch_size, seed)
    sources = tuple(_source(corpus, number, part.draws) for number, part in enumerate(order.sources))
    draws = order.counts_before(1).tolist()
    samples = np.bincount(corpus.buckets, minlength=len(corpus.sizes)).tolist()
    buckets = tuple(
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
    random = np.random.default_rng(seed)
    sampled = tuple(
        tuple(
            part.start + at
            for at in _choose(corpus.sources[number], round(sample * part.samples / len(corpus)), random)
        )
        for number, part in enumerate(order.sources)
    )
    captions, unreadable = _captions(corpus, [item for items in sampled for item in items])
    return Summary(
        sources=sources,
        buckets=buckets,
        unused_sizes=len(corpus.sizes) - len(buckets),
        global_batch_size=global_batch_size,
        captions=captions,
        stored=_stored(corpus, [item for items in sampled for item in items]) if corpus.is_cached else None,
        sampled=sampled,
        unreadable=unreadable,
    )


def format_summary(summary: Summary) -> str:
    """The summary as text for a terminal."""
    parts = [
        f"{summary.samples:,} samples, {bytes_text(summary.bytes)}, {summary.epoch:,} per epoch",
        _table(source_rows(summary)),
        _table(bucket_rows(summary)),
    ]
    if summary.unused_sizes:
        parts[-1] += f"\nsizes without a sample: {summary.unused_sizes}"
    parts.append(_table(caption_rows(summary)))
    if summary.captions.words:
        parts[-1] += "\nmost frequent: " + ", ".join(f"{word} {count}" for word, count in summary.captions.words)
    if summary.stored:
        parts.append(_table(stored_rows(summary.stored)))
    parts += [f"warning: {line}" for line in summary.warnings]
    return "\n".join(printable(line) for line in "\n\n".join(parts).split("\n"))


def source_rows(summary: Summary) -> list[list[str]]:
    """The table of sources; its first row is the header."""
    rows = [["source", "content", "address", "shards", "samples", "bytes", "per sample", "share of epoch"]]
    for source in summary.sources:
        content = f"images ({source.format})"
        if source.encoder is not None:
            content = (
                f"cache {source.encoder[:12]} ({source.format}), {source.text_length} tokens, padding {source.padding}"
            )
        rows.append(
            [
                source.name,
                content,
                source.address,
                "-" if source.shards is None else f"{source.shards:,}",
                f"{source.samples:,}",
                bytes_text(source.bytes),
                bytes_text(source.bytes / max(1, source.samples)),
                f"{source.draws / summary.epoch:.1%}",
            ]
        )
    return rows


def bucket_rows(summary: Summary) -> list[list[str]]:
    """The table of sizes; its first row is the header."""
    rows = [["height x width", "samples", "share of epoch", f"batches of {summary.global_batch_size}", "carried over"]]
    rows += [
        [
            f"{bucket.size[0]} x {bucket.size[1]}",
            f"{bucket.samples:,}",
            f"{bucket.draws / summary.epoch:.1%}",
            f"{bucket.batches:,}",
            f"{bucket.waiting:,}",
        ]
        for bucket in summary.buckets
    ]
    return rows


def caption_rows(summary: Summary) -> list[list[str]]:
    """The table of captions; its first row is the header."""
    captions = summary.captions
    seen = max(1, captions.count)
    return [
        ["captions", f"{captions.count:,} of {summary.samples:,}"],
        ["words, shortest", f"{captions.shortest}"],
        ["words, median", f"{captions.median:g}"],
        ["words, 95 % have at most", f"{captions.percentile_95:g}"],
        ["words, longest", f"{captions.longest}"],
        ["empty", f"{captions.empty:,} ({captions.empty / seen:.1%})"],
        ["repeat an earlier one", f"{captions.repeated:,} ({captions.repeated / seen:.1%})"],
    ]


def stored_rows(stored: StoredSummary) -> list[list[str]]:
    """The table of stored tensors; its first row is the header."""
    rows = [["stored per sample", f"mean of {stored.count:,}"]]
    rows += [[name, bytes_text(size)] for name, size in stored.bytes]
    rows.append(["T5 tokens, median", f"{stored.tokens:g} of {stored.text_length}"])
    return rows


def bytes_text(count: float) -> str:
    """A number of bytes as text, such as `1.2 MB`, with powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    words = [
        column for column in range(len(rows[0])) if rows[0][column] in ("source", "content", "address") or column == 0
    ]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if c in words else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _source(corpus: Corpus, number: int, draws: int) -> SourceSummary:
    source, config = corpus.sources[number], corpus.configs[number]
    address = config.uri if config.split is None else f"{config.uri.rstrip('/')}/{config.split}"
    if isinstance(source, ImageFolder):
        size = sum(path.stat().st_size for path in source.paths)
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
    if manifest.encoder is not None:
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


def _captions(corpus: Corpus, items: list[int]) -> tuple[CaptionSummary, tuple[str, ...]]:
    captions, unreadable = [], []
    for item in items:
        try:
            captions.append(corpus.caption(item))
        except Exception as error:  # any: `validate` is the tool that judges
            unreadable.append(str(error).removeprefix("data: "))
    lengths = [len(caption.split()) for caption in captions] or [0]
    filled = [caption for caption in captions if caption.strip()]
    excluded = set(_FUNCTION_WORDS.split())
    words = Counter(word for caption in filled for word in {*_WORD.findall(caption.lower())} - excluded)
    words = Counter({word: count for word, count in words.items() if count > 1}) or words
    summary = CaptionSummary(
        count=len(captions),
        shortest=min(lengths),
        median=statistics.median(lengths),
        percentile_95=round(float(np.percentile(lengths, 95)), 1),
        longest=max(lengths),
        empty=len(captions) - len(filled),
        repeated=len(filled) - len(set(filled)),
        words=tuple(sorted(words.items(), key=lambda item: (-item[1], item[0]))[:24]),
    )
    return summary, tuple(unreadable)


def _stored(corpus: Corpus, items: list[int]) -> StoredSummary | None:
    """Reads only the headers (https://github.com/huggingface/safetensors#format), not the tensors."""
    sizes: dict[str, list[int]] = {"latents": [], "text": [], "pooled": []}
    tokens = []
    for item in items[:: -(-len(items) // _MAX_MEASURED)]:
        try:
            shard, at, _ = corpus.raw(item)
            content = (shard.read(at, "safetensors") if shard is not None else None) or b""
            header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
            for name, values in sizes.items():
                first, last = header[name]["data_offsets"]
                values.append(last - first)
            tokens.append(header["text"]["shape"][0])
        except Exception:  # counted as unreadable already; `scfm data validate` gives the reason
            continue
    if not tokens:
        return None
    means = tuple((name, statistics.fmean(values)) for name, values in sizes.items())
    return StoredSummary(
        count=len(tokens), bytes=means, tokens=statistics.median(tokens), text_length=corpus.text_length or 0
    )
