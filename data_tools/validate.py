"""`scfm data validate`: every shard hashed, every sample decoded, everything that is wrong listed."""

import contextlib
import copy
import hashlib
import multiprocessing
import signal
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from scfm_core.data.corpus import Corpus
from scfm_core.data.folder import ImageFolder
from scfm_core.data.mds import MdsShard
from scfm_core.data.recipe import SourceConfig
from scfm_core.data.source import Shard, json_value
from scfm_core.errors import UserError

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Of a cached sample's latents, text and pooled."""

_FOLDER_PART = 256
"""Images of a folder that are one piece of work, as the samples of a shard are."""


@dataclass(frozen=True)
class Problem:
    """One shard or sample that cannot be used as it is."""

    source: str
    """Name in the recipe."""
    shard: str
    """Its path or address; of a folder of images the folder."""
    key: str | None
    """Of the sample; none: it is the whole shard."""
    reason: str


def validate(
    corpus: Corpus,
    *,
    decode: bool = True,
    processes: int = 1,
    progress: Progress = lambda items, total: items,
) -> list[Problem]:
    """Look at every shard and sample.

    A shard is held against its manifest (bytes, sha256, number of samples); a sample must have its fields, captions that
    can be read, an image or tensors that can be decoded, finite ones, of the shapes of the others of its size and the
    manifest's text length; its key must be its own within the source. An empty caption is none of these problems.

    Args:
        corpus: opened with any `data.max_bad_fraction` but 0, which refuses to open where a local shard is missing.
        decode: off: fields, captions and keys alone, without decoding images and tensors.
        processes: how many share the shards; 1: this one alone.
        progress: wraps the shards to show a bar; called with (shards, their number).

    Returns:
        all problems, in the recipe's order. Whatever a decoder raises, and a shard that is missing or cannot be reached,
        is one of them.

    Raises:
        UserError: if a process is killed.
    """
    # A shard is hashed here, whatever the recipe says and whatever was hashed before; so not once more by its samples.
    corpus = copy.copy(corpus)
    corpus.config = replace(corpus.config, verify=False)
    work = list(_pieces(corpus))
    findings: list[_Finding] = []
    if processes == 1:
        findings.extend(_look(corpus, piece, decode) for piece in progress(work, len(work)))
    else:
        # fork: the children have the corpus without a copy, and the shards that one hashed.
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(processes, context, _start, (corpus, decode))
        try:
            futures = [pool.submit(_look_in_child, piece) for piece in work]
            findings.extend(future.result() for future in progress(as_completed(futures), len(futures)))
        except BrokenProcessPool as error:
            raise UserError(
                "data: a process that validates was killed, perhaps for want of memory; try fewer processes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
        findings.sort(key=lambda finding: finding.piece.first)  # of equally frequent shapes the first is the usual one
    places = [(place, problem) for finding in findings for place, problem in finding.problems]
    places += _other_shapes(corpus, findings)
    places += _used_twice(corpus, findings)
    return [problem for _, problem in sorted(places, key=lambda item: item[0])]


def format_problems(problems: list[Problem]) -> str:
    """All problems as text, a line each below a line for their shard."""
    if not problems:
        return "no problem found"
    by_shard: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        by_shard[problem.source, problem.shard].append(problem)
    shards = sum(problem.key is None for problem in problems)
    samples = len({(problem.source, problem.shard, problem.key) for problem in problems if problem.key is not None})
    lines = [f"{_count(shards, 'shard')} and {_count(samples, 'sample')} cannot be used as they are"]
    for (source, shard), listed in by_shard.items():
        lines.append(f"{source}: {printable(shard)}")
        for problem in listed:
            name = "" if problem.key is None else f"{printable(problem.key)}: "
            lines.append(f"  {name}{printable(problem.reason)}")
    return "\n".join(lines)


def printable(text: str) -> str:
    """Without what would steer a terminal or break the line: keys, captions and messages hold what a stranger wrote."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


@dataclass(frozen=True)
class _Piece:
    """A shard, or a part of a folder."""

    source: int
    shard: int | None
    """Its number in the manifest; none: images of a folder."""
    first: int
    """Number of the first of its samples in the corpus."""
    samples: int


@dataclass
class _Finding:
    """What was seen in one piece; travels between processes, so it is small where nothing is wrong."""

    piece: _Piece
    problems: list[tuple[int, Problem]] = field(default_factory=list)
    """With the sample's number, for the order."""
    shapes: dict[Shapes, array] = field(default_factory=dict)  # type: ignore[type-arg]
    """Of caches: which samples are of which shapes."""
    keys: array = field(default_factory=lambda: array("Q"))  # type: ignore[type-arg]
    """Eight bytes of the hash of every key."""
    items: array = field(default_factory=lambda: array("q"))  # type: ignore[type-arg]
    """The samples whose keys these are."""


_child: tuple[Corpus, bool] | None = None


def _start(corpus: Corpus, decode: bool) -> None:
    global _child
    _child = corpus, decode
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer


def _look_in_child(piece: _Piece) -> _Finding:
    assert _child is not None
    return _look(_child[0], piece, _child[1])


def _pieces(corpus: Corpus) -> Iterator[_Piece]:
    first = 0
    for number, source in enumerate(corpus.sources):
        if isinstance(source, ImageFolder):
            for at in range(0, len(source), _FOLDER_PART):
                yield _Piece(number, None, first + at, min(_FOLDER_PART, len(source) - at))
            first += len(source)
        else:
            for shard, entry in enumerate(source.manifest.shards):
                yield _Piece(number, shard, first, entry.samples)
                first += entry.samples


def _look(corpus: Corpus, piece: _Piece, decode: bool) -> _Finding:
    source, name, finding = corpus.sources[piece.source], corpus.configs[piece.source].name, _Finding(piece)
    items = range(piece.first, piece.first + piece.samples)
    if isinstance(source, ImageFolder):  # its captions were read when it was opened
        for item in items if decode else ():
            try:
                corpus.record(item)
            except Exception as error:
                finding.problems.append((item, _problem(corpus, item, _reason(error, str(source.folder), None))))
        return finding
    assert piece.shard is not None
    where = source.address(piece.shard)
    try:
        shard = source.open(piece.shard, check=True)
    except Exception as error:  # of a foreign index, anything
        finding.problems.append((piece.first, Problem(name, where, None, _reason(error, where, None))))
        return finding
    with contextlib.closing(shard):
        for at, item in enumerate(items):
            key = f"{at:06d}"
            try:
                key = shard.key(at)
                # Without that column of MDS the key is the place in the shard.
                if not isinstance(shard, MdsShard) or shard.read(at, "__key__") is not None:
                    finding.keys.append(
                        int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:8], "little")
                    )
                    finding.items.append(item)
                _look_at(corpus, item, shard, at, source.config, decode, finding)
            except Exception as error:  # a decoder may raise anything; in training it would end the run
                finding.problems.append((item, Problem(name, where, key, _reason(error, where, key))))
    return finding


def _look_at(
    corpus: Corpus, item: int, shard: Shard, at: int, config: SourceConfig, decode: bool, finding: _Finding
) -> None:
    """One sample; raises what is wrong with it."""
    has = shard.fields(at)
    if corpus.is_cached:
        if not {"safetensors", "txt"} <= set(has):
            raise ValueError(f"needs safetensors and txt, but has {', '.join(has)}")
        (shard.read(at, "txt") or b"").decode()
    else:
        if not any(name in has for name in config.image):
            raise ValueError(f"has no {' or '.join(config.image)}, but {', '.join(has)}")
        _check_captions(shard, at, config)
    if not decode:
        return
    record = corpus.record(item)
    if record.latents is not None and record.text is not None and record.pooled is not None:
        for name, tensor in (("latents", record.latents), ("text", record.text), ("pooled", record.pooled)):
            if not tensor.is_floating_point():
                raise ValueError(f"{name} is of {tensor.dtype}, which is no floating point")
            bad = int((~tensor.float().isfinite()).sum())
            if bad:
                raise ValueError(f"{name} has {bad} of {tensor.numel()} values that are not finite")
        shapes = tuple(record.latents.shape), tuple(record.text.shape), tuple(record.pooled.shape)
        finding.shapes.setdefault(shapes, array("q")).append(item)


def _check_captions(shard: Shard, at: int, config: SourceConfig) -> None:
    """All of them: which one is taken is drawn anew each time."""
    found = False
    for name in config.captions:
        of, *path = name.split(".")
        content = shard.read(at, of)
        if content is not None:
            try:
                found |= isinstance(json_value(content, path) if path else content.decode(), str)
            except ValueError as error:
                raise ValueError(f"has a caption ({name}) that cannot be read ({error})") from error
    if not found:
        raise ValueError(f"has no caption in {', '.join(config.captions)}, but {', '.join(shard.fields(at))}")


def _other_shapes(corpus: Corpus, findings: list[_Finding]) -> Iterator[tuple[int, Problem]]:
    """Cached samples that are not of the shapes that most are of: of latents those of their size, of texts all."""
    latents: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
    texts: Counter[tuple[int, ...]] = Counter()
    pooled: Counter[tuple[int, ...]] = Counter()
    groups = [group for finding in findings for group in finding.shapes.items()]
    for shapes, items in groups:
        for bucket, count in Counter(corpus.buckets[np.asarray(items)].tolist()).items():
            latents[bucket][shapes[0]] += count * (len(shapes[0]) == 3)
        texts[shapes[1]] += len(items) * (len(shapes[1]) == 2 and shapes[1][0] == corpus.text_length)
        pooled[shapes[2]] += len(items) * (len(shapes[2]) == 1)
    for shapes, items in groups:
        for item in items:
            bucket = int(corpus.buckets[item])
            wrong = [
                *_differs(
                    "latents", shapes[0], latents[bucket], "[C, h, w]", "{} x {} pixels".format(*corpus.sizes[bucket])
                ),
                *_differs("text", shapes[1], texts, f"[{corpus.text_length}, D]", f"{corpus.text_length} tokens"),
                *_differs("pooled", shapes[2], pooled, "[P]", "samples"),
            ]
            if wrong:
                yield item, _problem(corpus, item, "; ".join(wrong))


def _differs(name: str, shape: tuple[int, ...], counts: Counter[tuple[int, ...]], rule: str, of: str) -> Iterator[str]:
    [(usual, count)] = counts.most_common(1)
    if not count:
        yield f"{name} has the shape {list(shape)}, not {rule}"
    elif shape != usual:
        yield f"{name} has the shape {list(shape)}, most of {of} have {list(usual)}"


def _used_twice(corpus: Corpus, findings: list[_Finding]) -> Iterator[tuple[int, Problem]]:
    for number in range(len(corpus.sources)):
        of_source = [finding for finding in findings if finding.piece.source == number and finding.keys]
        if not of_source:
            continue
        hashes = np.concatenate([np.asarray(finding.keys) for finding in of_source])
        items = np.concatenate([np.asarray(finding.items) for finding in of_source])
        _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        first: dict[str, str] = {}
        for item in sorted(items[counts[inverse] > 1].tolist()):
            problem = _problem(corpus, item, "")
            assert problem.key is not None
            if problem.key in first:
                yield item, replace(problem, reason=f"has the key of a sample of {first[problem.key]}")
            else:
                first[problem.key] = problem.shard


def _problem(corpus: Corpus, item: int, reason: str) -> Problem:
    """Of a sample that is known by its number."""
    shard, at, source = corpus.raw(item)
    name = next(config.name for config, opened in zip(corpus.configs, corpus.sources, strict=True) if opened is source)
    if isinstance(source, ImageFolder):
        key = source.paths[at].relative_to(source.folder).as_posix()
        return Problem(name, str(source.folder), key, reason)
    assert shard is not None
    return Problem(name, shard.name, shard.key(at), reason)


def _reason(error: Exception, where: str, key: str | None) -> str:
    """What is wrong, without what the problem says already."""
    text = str(error) if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: {error}"
    text = text.removeprefix("data: ").removeprefix(f"sample {key!r} of ").removeprefix(f"shard {where} ")
    return text or type(error).__name__


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")
