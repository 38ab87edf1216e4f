"""`scfm data pack`: copies the samples of any recipe, unchanged, into shards of another format."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import chain, count, islice, repeat
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from scfm_core.data.corpus import Corpus
from scfm_core.data.folder import ImageFolder
from scfm_core.data.mds import MdsWriter
from scfm_core.data.members import table_of, write_members
from scfm_core.data.remote import read
from scfm_core.data.schema import MANIFEST, BadData, Manifest, Size
from scfm_core.data.source import PADDING, Shard, Source
from scfm_core.data.uri import is_remote, join
from scfm_core.data.webdataset import TarShard, TarWriter
from scfm_core.errors import UserError
from scfm_core.files import renamed_at_end

Sample = tuple[str, dict[str, bytes], Size | None]
"""Key, fields, and height and width in pixels (None: unknown)."""

_MAX_NAME_BYTES = 100  # of a member's name in a plain header of a tar


def pack(
    corpus: Corpus,
    output: Path,
    *,
    to: Literal["webdataset", "mds"],
    samples_per_shard: int = 1000,
    shard_bytes: int = 1 << 28,
    compression: str | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> Manifest:
    """Write every sample again: its fields byte for byte, in the order of the sources.

    A sample keeps its key. If there are several sources, the key gets the source's name as a prefix. The key of an
    image in a folder is its path without the suffix. In a tar a key is changed if it is used already, too long, or
    would be parsed as another key (a dot in its last part, `..`): unusual characters become `_`, and the sample's
    number is appended.

    Args:
        corpus: the samples.
        output: folder of the shards; appears when it is complete.
        to: the format.
        samples_per_shard: for tars.
        shard_bytes: for MDS: size at which a new shard begins.
        compression: for MDS: algorithm and level as mosaicml-streaming names them (`zstd:7`); None: not compressed.
        progress: shows a progress bar; called with (samples, their number), it returns the samples.

    Returns:
        the manifest.

    Raises:
        UserError: if `output` exists or cannot be written, the paddings or networks of the sources differ, or a sample
            cannot be read or stored in the format.
    """
    _check(output, to, samples_per_shard, shard_bytes, compression)
    draft, padding = _draft(corpus, to)
    samples = progress(_samples(corpus), len(corpus))
    try:
        with renamed_at_end(output) as unfinished:
            if to == "webdataset":
                _write_tars(samples, unfinished, draft, samples_per_shard)
            else:
                _write_mds(samples, unfinished, draft, list(_sample(*corpus.raw(0))[1]), shard_bytes, compression)
            if padding is not None:
                (unfinished / PADDING).write_bytes(padding)
            return Manifest.parse((unfinished / MANIFEST).read_text(encoding="utf-8"), str(unfinished / MANIFEST))
    except OSError as error:
        raise UserError(f"packing into {output} failed: {error}. Fix this and run again") from error


def _check(output: Path, to: str, samples_per_shard: int, shard_bytes: int, compression: str | None) -> None:
    if output.exists():
        raise UserError(f"{output} exists already; choose another folder, or delete it")
    if samples_per_shard < 1 or not 1 <= shard_bytes < 1 << 32:  # MDS has offsets of 32 bits
        raise UserError(
            f"samples per shard must be at least 1 and bytes per shard in 1..2^32-1, got {samples_per_shard} and {shard_bytes}"
        )
    if compression is not None and to == "webdataset":
        raise UserError(
            f"compression {compression!r} is only for mds: tars are not compressed, so that samples can be read by offset"
        )


def _draft(corpus: Corpus, to: Literal["webdataset", "mds"]) -> tuple[Manifest, bytes | None]:
    """The manifest without its shards, and the content of the padding's file."""
    digest, padding = _padding(corpus)
    networks = set(corpus.networks().values())
    if len(networks) > 1:
        raise UserError(
            "the paths of the sources were made by different networks, or the network of some is unknown: pack each source "
            "separately"
        )
    backgrounds = {source.manifest.background for source in corpus.sources if isinstance(source, Source)}
    draft = Manifest(
        format=to,
        encoder=corpus.encoder,
        fields=corpus.fields,
        text_length=corpus.text_length,
        padding=digest,
        network=networks.pop(),
        background=backgrounds.pop() if len(backgrounds) == 1 else None,
        settings=_common_settings(corpus),
    )
    return draft, padding


def _common_settings(corpus: Corpus) -> dict[str, Any]:
    """What all sources agree on."""
    first, *others = [source.manifest.settings if isinstance(source, Source) else {} for source in corpus.sources]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _padding(corpus: Corpus) -> tuple[str | None, bytes | None]:
    """sha256 and content of the padding's file; None if no source has trimmed tokens."""
    found = {
        source.manifest.padding: source
        for source in corpus.sources
        if isinstance(source, Source) and source.manifest.padding is not None
    }
    if len(found) > 1:
        names = ", ".join(source.config.name for source in found.values())
        raise UserError(
            f"data.sources: the trimmed {' and '.join(corpus.paddings)} of {names} has different paddings, and a data set can have only one. Pack each "
            f"source separately, or encode all of them in the same way"
        )
    for digest, source in found.items():
        where = join(source.base, PADDING)
        return digest, read(where, corpus.config.cache.timeout) if is_remote(where) else Path(where).read_bytes()
    return None, None


def _samples(corpus: Corpus) -> Iterator[Sample]:
    """All samples in order."""
    items = count()
    for config, source in zip(corpus.configs, corpus.sources, strict=True):
        prefix = f"{config.name}/" if len(corpus.sources) > 1 else ""
        for size in _sizes(source):
            key, fields = _sample(*corpus.raw(next(items)))
            yield prefix + key, fields, size


def _sizes(source: Source | ImageFolder) -> Iterable[Size | None]:
    """The size of every sample of a source; None if the manifest does not have it."""
    if isinstance(source, ImageFolder):
        return ((height, width) for height, width in source.sizes().tolist())
    return chain.from_iterable(
        chain.from_iterable(repeat((height, width), samples) for height, width, samples in entry.sizes)
        if entry.sizes
        else repeat(None, entry.samples)
        for entry in source.manifest.shards
    )


def _sample(shard: Shard | None, at: int, source: Source | ImageFolder) -> tuple[str, dict[str, bytes]]:
    """Key and fields of a sample, from the result of `Corpus.raw`."""
    if isinstance(source, ImageFolder):
        path, key = source.paths[at], PurePosixPath(source.key(at)).with_suffix("").as_posix()
        return key, {path.suffix[1:].lower(): path.read_bytes(), "txt": source.caption(at).encode()}
    assert shard is not None
    return shard.key(at), {name: value for name in shard.fields(at) if (value := shard.read(at, name)) is not None}


def _write_tars(samples: Iterable[Sample], folder: Path, draft: Manifest, samples_per_shard: int) -> None:
    """Write tars of `samples_per_shard` samples, and their manifest."""
    folder.mkdir()
    entries, rest, tables = [], iter(samples), {}
    for number in count():
        part = islice(rest, samples_per_shard)
        first = next(part, None)
        if first is None:
            break
        path = folder / f"shard-{number:06d}.tar"
        written: dict[str, list[str]] = {}
        with TarWriter(path) as writer:
            for item, (key, fields, size) in enumerate(chain([first], part), number * samples_per_shard):
                name = _tar_key(key, item, fields, written)
                writer.write(name, fields, size)
                written[name] = sorted(fields)
        _read_back(path, written)
        entries.append(writer.entry)
        tables[str(writer.entry.sha256)] = table_of(path)
    write_members(folder / MANIFEST, tables)
    replace(draft, shards=tuple(entries)).write(folder / MANIFEST)


def _tar_key(key: str, item: int, fields: Mapping[str, bytes], taken: Mapping[str, Any]) -> str:
    """`key`, or a similar one if readers of tars would parse it differently, or this tar has it already."""
    longest = max(fields, key=len, default="")
    room = _MAX_NAME_BYTES - len(f".{longest}".encode())
    if room < 20:
        raise UserError(f"sample {key!r}: the name of its field {longest!r} is too long for a tar. Pack into mds")
    parts = key.split("/")
    # In the last part of a member's name the field begins after the first dot. Keys may repeat: MDS shards of other
    # tools number their samples from 0 in every shard.
    plain = key.isprintable() and "." not in parts[-1] and "" not in parts and ".." not in parts
    if plain and len(key.encode()) <= room and key not in taken:
        return key
    stem, end = re.sub(r"[^\w-]", "_", key, flags=re.ASCII), f"-{item:08d}"
    while (name := stem[: room - len(end)] + end) in taken:
        end += "_"
    return name


def _read_back(path: Path, written: Mapping[str, list[str]]) -> None:
    """Raise if a reader of the tar finds other samples than were written."""
    try:
        with closing(TarShard(path.open("rb"), path.name)) as shard:
            found = {shard.key(at): sorted(shard.fields(at)) for at in range(len(shard))}
    except BadData as error:
        raise UserError(f"the samples cannot be stored in tars, because readers would refuse them: {error}") from error
    for key, fields in written.items():
        if found.get(key) != fields:
            raise UserError(
                f"sample {key!r} cannot be stored in a tar: of its fields {', '.join(fields)} a reader would find "
                f"{', '.join(found.get(key, [])) or 'none'}. Names of fields in a tar have lower-case letters and digits; pack "
                f"into mds"
            )


def _write_mds(
    samples: Iterable[Sample],
    folder: Path,
    draft: Manifest,
    names: list[str],
    shard_bytes: int,
    compression: str | None,
) -> None:
    """Write MDS with the columns `names`, and its manifest."""
    try:
        writer = MdsWriter(folder, names, draft, shard_bytes=shard_bytes, compression=compression)
    except UserError:
        raise
    except ValueError as error:  # from mosaicml-streaming
        raise UserError(
            f"mosaicml-streaming does not know the compression {compression!r} ({error}); an example is zstd:7"
        ) from error
    with writer:
        for key, fields, size in samples:
            if set(fields) != set(names):
                raise UserError(
                    f"sample {key!r} has the fields {', '.join(sorted(fields))}, the first sample {', '.join(sorted(names))}; in "
                    f"mds all samples must have the same fields. Pack into webdataset"
                )
            try:
                writer.write(key, fields, size)
            except UnicodeError as error:
                raise UserError(f"sample {key!r} has text that is not UTF-8 ({error}). Pack into webdataset") from error
