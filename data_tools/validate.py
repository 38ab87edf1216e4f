"""`scfm data validate`: hashes every shard, decodes every sample, and lists everything that is wrong."""

import contextlib
import copy
import hashlib
import multiprocessing
import signal
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load

from scfm_core.data.corpus import Corpus
from scfm_core.data.decode import caption_of, no_image
from scfm_core.data.folder import ImageFolder
from scfm_core.data.mds import MdsShard
from scfm_core.data.recipe import SourceConfig
from scfm_core.data.source import Shard
from scfm_core.data.text import decode_text
from scfm_core.errors import UserError

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
Shape = tuple[int, ...]
Shapes = tuple[tuple[str, Shape], ...]
"""The shapes of a cached sample's latents and fields, by name."""

_FOLDER_PART = 256
"""Number of images of a folder in one piece of work. For shards a piece is one shard."""


@dataclass(frozen=True)
class Problem:
    """One invalid shard or sample."""

    source: str
    """Name of the source in the recipe."""
    shard: str
    """Path or address of the shard; for a folder of images, the folder."""
    key: str | None
    """Of the sample. None: the whole shard is invalid."""
    reason: str


def validate(
    corpus: Corpus,
    *,
    decode: bool = True,
    processes: int = 1,
    progress: Progress = lambda items, total: items,
) -> list[Problem]:
    """Check every shard and sample.

    A shard must agree with its manifest (bytes, sha256, number of samples). A sample must have its fields, captions
    that can be read, and an image or tensors that can be decoded. Tensors must be finite. Latents must have the same
    shape as those of most samples of their size, and each field as that of most samples: tokens with the manifest's text length,
    masked tokens with no more than it. A key must be unique in its source. An empty caption is valid.

    Args:
        corpus: opened with `data.max_bad_fraction` above 0, because with 0 it does not open if a local shard is
            missing.
        decode: False: check only fields, captions and keys, without decoding images and tensors.
        processes: that share the shards; 1: only this process.
        progress: shows a progress bar; called with (shards, their number), it returns the shards.

    Returns:
        all problems, in the order of the recipe. Any error of a decoder is a problem, and so is a shard that is missing
        or unavailable.

    Raises:
        UserError: if a process is killed.
    """
    # `_check_piece` always hashes a shard. With `verify=False` reading its samples does not hash it a second time.
    corpus = copy.copy(corpus)
    corpus.config = replace(corpus.config, verify=False)
    pieces = list(_pieces(corpus))
    findings: list[_Finding] = []
    if processes == 1:
        findings.extend(_check_piece(corpus, piece, decode) for piece in progress(pieces, len(pieces)))
    else:
        # Forked, so that the children share the corpus and its table of verified shards.
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(processes, context, _initialize_child, (corpus, decode))
        try:
            futures = [pool.submit(_check_in_child, piece) for piece in pieces]
            findings.extend(future.result() for future in progress(as_completed(futures), len(futures)))
        except BrokenProcessPool as error:
            raise UserError(
                "data: a process of the validation was killed, perhaps because memory ran out; try fewer processes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
        # In order: if two shapes are equally frequent, the first one counts as the usual one.
        findings.sort(key=lambda finding: finding.piece.first)
    found = [(item, problem) for finding in findings for item, problem in finding.problems]
    found += _unusual_shapes(corpus, findings)
    found += _duplicate_keys(corpus, findings)
    return [problem for _, problem in sorted(found, key=lambda pair: pair[0])]


def format_problems(problems: list[Problem]) -> str:
    """All problems as text: a line for each shard, and below it a line for each of its problems."""
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
    """Escape control characters: keys, captions and messages contain untrusted text, which could control a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


@dataclass(frozen=True)
class _Piece:
    """A shard, or a part of a folder."""

    source: int
    shard: int | None
    """Its number in the manifest. None: images of a folder."""
    first: int
    """Number of its first sample in the corpus."""
    samples: int


@dataclass
class _Finding:
    """The result of one piece. It is sent between processes, so it is small if nothing is wrong."""

    piece: _Piece
    problems: list[tuple[int, Problem]] = field(default_factory=list)
    """With the number of the sample, which gives the order."""
    shapes: dict[Shapes, array] = field(default_factory=dict)  # type: ignore[type-arg]
    """Of caches: the samples of each shape."""
    keys: array = field(default_factory=lambda: array("Q"))  # type: ignore[type-arg]
    """Eight bytes of the hash of each key."""
    items: array = field(default_factory=lambda: array("q"))  # type: ignore[type-arg]
    """The samples of `keys`."""


_child: tuple[Corpus, bool] | None = None


def _initialize_child(corpus: Corpus, decode: bool) -> None:
    global _child
    _child = corpus, decode
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C


def _check_in_child(piece: _Piece) -> _Finding:
    assert _child is not None
    return _check_piece(_child[0], piece, _child[1])


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


def _check_piece(corpus: Corpus, piece: _Piece, decode: bool) -> _Finding:
    source, name, finding = corpus.sources[piece.source], corpus.configs[piece.source].name, _Finding(piece)
    items = range(piece.first, piece.first + piece.samples)
    if isinstance(source, ImageFolder):
        for item in items:
            try:
                corpus.caption(item)
                if decode:
                    corpus.record(item)
            except Exception as error:
                finding.problems.append((item, _problem(corpus, item, _reason(error, str(source.folder), None))))
        return finding
    assert piece.shard is not None
    where = source.address(piece.shard)
    try:
        shard = source.open(piece.shard, check=True, again=True)
    except Exception as error:  # any: the index may be of another tool
        finding.problems.append((piece.first, Problem(name, where, None, _reason(error, where, None))))
        return finding
    with contextlib.closing(shard):
        for at, item in enumerate(items):
            key = f"{at:06d}"
            try:
                key = shard.key(at)
                # Without the column `__key__` an MDS sample has its number as its key, which is not unique.
                if not isinstance(shard, MdsShard) or shard.read(at, "__key__") is not None:
                    finding.keys.append(
                        int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:8], "little")
                    )
                    finding.items.append(item)
                _check_sample(corpus, item, shard, at, source.config, decode, finding)
            except Exception as error:  # any: decoders raise many errors, and each would end a training run
                finding.problems.append((item, Problem(name, where, key, _reason(error, where, key))))
    return finding


def _check_sample(
    corpus: Corpus, item: int, shard: Shard, at: int, config: SourceConfig, decode: bool, finding: _Finding
) -> None:
    """Check one sample; raises any error if it is invalid."""
    fields = shard.fields(at)
    if corpus.is_cached:
        if not {"safetensors", "txt"} <= set(fields):
            raise ValueError(f"needs safetensors and txt, but has {', '.join(fields)}")
        decode_text(shard.read(at, "txt") or b"", "its caption")
    else:
        if not any(name in fields for name in config.image):
            raise ValueError(no_image(fields, config))
        _check_captions(shard, at, config)
    if not decode:
        return
    record = corpus.record(item)
    if record.latents is not None:
        stored = load(shard.read(at, "safetensors") or b"")  # with the teacher's path, if there is one
        for name, tensor in stored.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{name} has the dtype {tensor.dtype}, which is not floating point")
            bad = int((~tensor.float().isfinite()).sum())
            if bad:
                raise ValueError(f"{name} has {bad} of {tensor.numel()} values that are not finite")
        tensors = {"latents": record.latents, **record.fields}
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
        finding.shapes.setdefault(shapes, array("q")).append(item)


def _check_captions(shard: Shard, at: int, config: SourceConfig) -> None:
    """Check all captions, because training may choose any of them."""
    captions = [caption_of(shard, at, name) for name in config.captions]
    if all(caption is None for caption in captions):
        raise ValueError(f"has no caption in {', '.join(config.captions)}, but {', '.join(shard.fields(at))}")


def _unusual_shapes(corpus: Corpus, findings: list[_Finding]) -> Iterator[tuple[int, Problem]]:
    """Cached samples with unusual shapes: latents are compared with those of the same size, each field with that of all samples."""
    usual: dict[tuple[str, int], Counter[Shape]] = defaultdict(Counter)
    """How often each valid shape occurs, by name and bucket. A field has one group, the bucket -1."""
    groups = [group for finding in findings for group in finding.shapes.items()]
    for shapes, items in groups:
        for name, shape in shapes:
            compared = _compared(corpus, name, shape)
            for bucket, count in _buckets(corpus, name, items).items():
                usual[name, bucket][compared or ()] += count * (compared is not None)
    for shapes, items in groups:
        for item in items:
            wrong = []
            for name, shape in shapes:
                bucket = -1 if name != "latents" else int(corpus.buckets[item])
                [(most, count)] = usual[name, bucket].most_common(1)
                compared = _compared(corpus, name, shape)
                if compared is None:
                    wrong.append(f"{name} has the shape {list(shape)}, not {_rule(corpus, name)}")
                elif compared != most:
                    group = "samples" if bucket < 0 else "{} x {} pixels".format(*corpus.sizes[bucket])
                    wrong.append(
                        f"{name} has the shape {list(shape)}, most of {group} have {_shown(corpus, name, most)}"
                    )
            if wrong:
                yield item, _problem(corpus, item, "; ".join(wrong))


def _buckets(corpus: Corpus, name: str, items: Sequence[int]) -> Counter[int]:
    """In which groups samples are compared, and how many in each."""
    if name != "latents":
        return Counter({-1: len(items)})
    return Counter(corpus.buckets[np.asarray(items)].tolist())


def _compared(corpus: Corpus, name: str, shape: Shape) -> Shape | None:
    """The part of a shape in which samples must agree; None: the shape is invalid for the kind of tensor."""
    kind, length = corpus.fields.get(name), corpus.text_length or 0
    if kind == "masked":
        return shape[1:] if len(shape) > 1 and shape[0] <= length else None
    if kind == "tokens":
        return shape if len(shape) > 1 and shape[0] == length else None
    return shape if len(shape) == (1 if kind == "vector" else 3) else None


def _rule(corpus: Corpus, name: str) -> str:
    kind = corpus.fields.get(name)
    texts = {
        "tokens": f"[{corpus.text_length}, ...]",
        "masked": f"[at most {corpus.text_length}, ...]",
        "vector": "[D]",
    }
    return "[C, h, w]" if kind is None else texts[kind]


def _shown(corpus: Corpus, name: str, shape: Shape) -> str:
    return f"[n, {str(list(shape))[1:]}" if corpus.fields.get(name) == "masked" else str(list(shape))


def _duplicate_keys(corpus: Corpus, findings: list[_Finding]) -> Iterator[tuple[int, Problem]]:
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
    """The problem of the sample with this number."""
    shard, at, source = corpus.raw(item)
    name = next(config.name for config, opened in zip(corpus.configs, corpus.sources, strict=True) if opened is source)
    if isinstance(source, ImageFolder):
        return Problem(name, str(source.folder), source.key(at), reason)
    assert shard is not None
    return Problem(name, shard.name, shard.key(at), reason)


def _reason(error: Exception, where: str, key: str | None) -> str:
    """The message of an error, without the names that `Problem` has in other fields."""
    text = str(error) if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: {error}"
    text = text.replace(f" of sample {key!r} of shard {where}", "")
    text = text.removeprefix("data: ").removeprefix(f"sample {key!r} of ").removeprefix(f"shard {where} ")
    return text or type(error).__name__


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")
