"""All samples of a recipe by number, whatever shards they lie in."""

import bisect
import hashlib
import json
import mmap
import os
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from scfm_core.data.cache import ShardCache
from scfm_core.data.folder import ImageFolder, load_image
from scfm_core.data.order import Order, SourceOrder, choose
from scfm_core.data.recipe import DataConfig, SourceConfig
from scfm_core.data.schema import PATH, BadData, Manifest, Record, Size
from scfm_core.data.source import Shard, Source, json_value, open_source
from scfm_core.data.uri import is_remote
from scfm_core.errors import UserError

_OF_DECODERS = (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError)
"""What bytes that are no text, JSON or tensors make of decoders; RecursionError is a RuntimeError."""

_CHECKED = -1
"""In the table of shards; 0 is not yet, else the process that is fetching or hashing it."""

_MOST_OPEN = 64
"""Shards a process keeps open: each holds a descriptor and some megabytes of offsets."""


class Corpus:
    """Random access to the samples of a recipe; the order is `order`'s business.

    Args:
        config: the recipe.
        with_paths: read the teacher's paths, which cached samples then must have; off: they are not carried along.

    Raises:
        UserError: if a source cannot be opened, or the sources do not go together.
    """

    def __init__(self, config: DataConfig, *, with_paths: bool = False) -> None:
        self.config, self.sizes, self.with_paths = config, config.sizes(), with_paths
        self.configs = config.mixture()
        cache = self._cache()
        self.sources: list[Source | ImageFolder] = []
        for source in self.configs:
            if source.format == "folder":
                self.sources.append(ImageFolder(Path(_folder(source))))
            else:
                self.sources.append(open_source(source, cache, config.cache.timeout))
        if config.max_bad_fraction == 0:
            for opened in self._of_shards():
                opened.check_present()
        counts = [_shard_counts(source) for source in self.sources]
        self._shard_source = [number for number, sizes in enumerate(counts) for _ in sizes]
        self._shard_place = [place for sizes in counts for place in range(len(sizes))]
        sizes = np.concatenate([np.asarray(part, np.int64) for part in counts])
        self._shard_start: list[int] = (np.cumsum(sizes) - sizes).tolist()
        self._length = int(sizes.sum())
        self._counts = counts
        self.encoder, self.text_length = self._encoder()
        if with_paths and not self.is_cached:
            raise UserError(
                "data: method.trajectory_fraction > 0 needs stored paths of the teacher, but the sources are images. Make "
                "paths of their captions with `scfm data generate --trajectories`, or set method.trajectory_steps=24, which "
                "takes them within the training"
            )
        self.buckets = np.concatenate([self._buckets_of(number) for number in range(len(self.sources))])
        self.fingerprint = self._fingerprint()
        # Shared with the processes forked from this one: each shard is hashed once by all of them.
        self._checked = np.frombuffer(mmap.mmap(-1, 4 * max(1, len(self._shard_start))), np.int32)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._bad: dict[int, str] = {}

    def __len__(self) -> int:
        return self._length

    @property
    def is_cached(self) -> bool:
        """Whether the samples are latents and embeddings, not images."""
        return self.encoder is not None

    def order(self, global_batch_size: int, seed: int) -> Order:
        """The stream of global batches.

        Args:
            global_batch_size: of the run.
            seed: used if the recipe names none.

        Raises:
            UserError: if the partitions do not divide the batch.
        """
        config = self.config
        if global_batch_size % config.partitions:
            raise UserError(
                f"data.partitions {config.partitions} does not divide train.global_batch_size {global_batch_size}, of which "
                f"each partition gives an equal share. Change one of them"
            )
        sources, start = [], 0
        for source, shards, draws in zip(self.configs, self._counts, self._draws(), strict=True):
            sources.append(SourceOrder(source.name, start, tuple(shards), draws))
            start += sum(shards)
        return Order(
            sources,
            self.buckets,
            global_batch_size,
            seed if config.seed is None else config.seed,
            shuffle=config.shuffle,
            block=config.shuffle_block,
            partitions=config.partitions,
        )

    def first_items(self) -> dict[str, int]:
        """The first sample of each source, by the source's name."""
        shards = zip(self._shard_source, self._shard_place, self._shard_start, strict=True)
        return {self.configs[source].name: start for source, place, start in shards if place == 0}

    def networks(self) -> dict[str, str | None]:
        """Fingerprint of the network that took each source's stored paths, by the source's name; None: not told."""
        sources = zip(self.configs, self.sources, strict=True)
        return {
            config.name: source.manifest.network if isinstance(source, Source) else None for config, source in sources
        }

    def shard_of(self, item: int) -> int:
        """Number of the shard that holds a sample."""
        return bisect.bisect_right(self._shard_start, item) - 1

    def shard_bytes(self, shard: int) -> int:
        """Its size in the cache; 0 for images of a folder."""
        source = self.sources[self._shard_source[shard]]
        return source.manifest.shards[self._shard_place[shard]].bytes if isinstance(source, Source) else 0

    def make_ready(self, shard: int) -> None:
        """Fetch and hash a shard ahead of its use; safe in threads. Errors as `record`."""
        source = self.sources[self._shard_source[shard]]
        if isinstance(source, Source):
            self._open_anew(source, shard).close()

    @property
    def paddings(self) -> list[Tensor | None]:
        """What fills up the trimmed texts of each source, [L, D]."""
        return [source.padding if isinstance(source, Source) else None for source in self.sources]

    def record(self, item: int, sample_id: int = 0, *, padded: bool = True) -> Record:
        """A sample.

        Args:
            item: its number.
            sample_id: its place in the stream, which decides between several captions.
            padded: fill up a trimmed text; off: leave that to whoever has `paddings`.

        Raises:
            BadData: if its content is unusable; the message names shard and key.
            UserError: if its shard cannot be had.
        """
        number, place, at = self._locate(item)
        source = self.sources[number]
        size = self.sizes[self.buckets[item]]
        if isinstance(source, ImageFolder):
            return source.load(at, size)
        shard = self._opened(place)
        try:
            if self.is_cached:
                record = _cached_record(shard, at, number, source.padding, self.with_paths)
                return _filled_up(record, source.padding) if padded else record
            return self._image_record(shard, at, source.config, size, sample_id)
        except BadData:
            raise
        except _OF_DECODERS as error:
            raise BadData(
                f"data: sample {shard.key(at)!r} of shard {shard.name} cannot be decoded ({error!r})"
            ) from error

    def caption(self, item: int) -> str:
        """The caption of a sample (of several, that of `sample_id` 0), without decoding the rest."""
        number, place, at = self._locate(item)
        source = self.sources[number]
        if isinstance(source, ImageFolder):
            return source.caption(at)
        return self._caption(self._opened(place), at, source.config, 0)

    def raw(self, item: int) -> tuple[Shard | None, int, Source | ImageFolder]:
        """The open shard of a sample, its place there, and its source."""
        number, place, at = self._locate(item)
        source = self.sources[number]
        return (None if isinstance(source, ImageFolder) else self._opened(place)), at, source

    def items_of(self, size: Size) -> NDArray[np.int64]:
        """The samples of one size, in the sources' order."""
        return np.flatnonzero(self.buckets == (self.sizes.index(size) if size in self.sizes else -1))

    def _locate(self, item: int) -> tuple[int, int, int]:
        """Source, shard and place in the shard."""
        if not 0 <= item < self._length:
            raise IndexError(item)
        shard = self.shard_of(item)
        return self._shard_source[shard], shard, item - self._shard_start[shard]

    def _opened(self, shard: int) -> Shard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if shard in self._bad:
            raise BadData(self._bad[shard])
        source = self.sources[self._shard_source[shard]]
        assert isinstance(source, Source)
        try:
            opened = self._open_anew(source, shard)
        except BadData as error:
            self._bad[shard] = str(error)  # quarantined: it is not read again
            raise
        self._open[shard] = opened
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)[1].close()
        return opened

    def _open_anew(self, source: Source, shard: int) -> Shard:
        check = self._claim(shard)
        try:
            opened = source.open(self._shard_place[shard], check=check and self.config.verify)
        except BaseException:
            if check:
                self._checked[shard] = 0
            raise
        self._checked[shard] = _CHECKED
        return opened

    def _claim(self, shard: int) -> bool:
        """Whether this process is to fetch and hash a shard; if another is at it, wait for it."""
        own, end = os.getpid(), time.monotonic() + self.config.cache.timeout
        while (holder := int(self._checked[shard])) not in (0, own, _CHECKED) and time.monotonic() < end:
            if not _is_alive(holder):
                break
            time.sleep(0.002)
        if holder == _CHECKED:
            return False
        self._checked[shard] = own
        return True

    def _image_record(self, shard: Shard, at: int, source: SourceConfig, size: Size, sample_id: int) -> Record:
        content = next((found for name in source.image if (found := shard.read(at, name)) is not None), None)
        key = shard.key(at)
        if content is None:
            raise BadData(
                f"data: sample {key!r} of shard {shard.name} has no {' or '.join(source.image)}, but "
                f"{', '.join(shard.fields(at))}. Name the right field with `image:` of the source"
            )
        image = load_image(content, *size, name=f"sample {key!r} of shard {shard.name}")
        return Record(key=key, caption=self._caption(shard, at, source, sample_id), image=image)

    def _caption(self, shard: Shard, at: int, source: SourceConfig, sample_id: int) -> str:
        names = list(source.captions)
        if len(names) > 1:
            weights = list(source.captions.values())
            seed = self.config.seed or 0
            names.insert(0, names.pop(choose(weights, seed, source.name, shard.key(at), sample_id)))
        for name in names:  # the chosen one; the others where a sample has it not
            field, *path = name.split(".")
            content = shard.read(at, field)
            if content is None:
                continue
            try:
                value = json_value(content, path) if path else content.decode()
            except _OF_DECODERS as error:
                raise BadData(
                    f"data: sample {shard.key(at)!r} of shard {shard.name} has a {field} that cannot be decoded ({error!r})"
                ) from error
            if isinstance(value, str):
                return value
        raise BadData(
            f"data: sample {shard.key(at)!r} of shard {shard.name} has no caption in {', '.join(names)}, but the fields "
            f"{', '.join(shard.fields(at))}. Name the right one with `captions:` of the source"
        )

    def _cache(self) -> ShardCache | None:
        config = self.config.cache
        if not any(is_remote(source.uri) or source.format == "mds" for source in self.configs):
            return None
        limit = None if config.limit_gb is None else int(config.limit_gb * 1e9)
        cache = ShardCache(Path(config.dir).expanduser(), limit, config.timeout)
        cache.sweep()
        return cache

    def _of_shards(self) -> list[Source]:
        return [source for source in self.sources if isinstance(source, Source)]

    def _encoder(self) -> tuple[str | None, int | None]:
        """Of cached sources: by whom, and with how many T5 tokens."""
        kinds = {
            (source.manifest.encoder, source.manifest.text_length) if isinstance(source, Source) else (None, None)
            for source in self.sources
        }
        if len(kinds) > 1:
            described = ", ".join(
                f"{config.name}: {_kind(source)}" for config, source in zip(self.configs, self.sources, strict=True)
            )
            raise UserError(
                f"data.sources: all must be images, or cached by one model at one text length, but there are {described}. "
                f"Encode them alike with `scfm data encode`"
            )
        return kinds.pop()

    def _buckets_of(self, number: int) -> NDArray[np.int16]:
        """The size of every sample of a source, as a number into `sizes`."""
        source, config = self.sources[number], self.configs[number]
        if isinstance(source, ImageFolder):
            if len(self.sizes) == 1:
                return np.zeros(len(source), np.int16)
            strict = self.config.max_bad_fraction == 0
            return np.array([nearest_size(size, self.sizes) for size in source.sizes(strict=strict)], np.int16)
        if not self.is_cached and len(self.sizes) == 1:
            return np.zeros(source.manifest.samples, np.int16)
        if any(entry.samples and not entry.sizes for entry in source.manifest.shards):
            raise UserError(
                f"data.sources ({config.name}): nobody has measured its images, so they cannot be sorted into data.buckets. "
                f"Run `scfm data index {config.uri!r}`"
            )
        if self.is_cached:
            self._refuse_other_sizes(source.manifest, config)
        places = {size: nearest_size(size, self.sizes) for size in source.manifest.sizes}
        runs = [(places[height, width], count) for e in source.manifest.shards for height, width, count in e.sizes]
        return np.repeat(np.array([run[0] for run in runs], np.int16), [run[1] for run in runs])

    def _refuse_other_sizes(self, manifest: Manifest, config: SourceConfig) -> None:
        others = sorted(manifest.sizes - set(self.sizes))
        if others:
            raise UserError(
                f"data.sources ({config.name}): the cache {config.uri} was encoded with data.resolution "
                f"{' and '.join(map(str, sorted(manifest.sizes)[:4]))}, this run asks for "
                f"{' and '.join(map(str, self.sizes[:4]))}. Set data.resolution or data.buckets to match, or encode again"
            )

    def _draws(self) -> list[int]:
        """Samples that an epoch takes from each source."""
        lengths = [sum(shards) for shards in self._counts]
        size = self.config.epoch_size or sum(lengths)
        weights = [float(n) if c.weight is None else c.weight for n, c in zip(lengths, self.configs, strict=True)]
        ends = [round(size * sum(weights[: i + 1]) / sum(weights)) for i in range(len(weights))]
        draws = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        for draw, config in zip(draws, self.configs, strict=True):
            if draw < 1:
                raise UserError(
                    f"data.sources ({config.name}): its weight gives it less than one of the {size} samples of an epoch. "
                    f"Raise its weight or data.epoch_size, or leave it out"
                )
        return draws

    def _fingerprint(self) -> str:
        """Identity of the content, wherever it lies."""
        digest = hashlib.sha256()
        for config, source in zip(self.configs, self.sources, strict=True):
            if isinstance(source, ImageFolder):
                content = source.fingerprint
            else:
                content = json.dumps([[e.sha256, e.samples, e.bytes] for e in source.manifest.shards])
            digest.update(f"{config.name}:{content}\n".encode())
        return digest.hexdigest()


def _is_alive(process: int) -> bool:
    try:
        # The third field of `stat`: a killed child is a zombie until its parent looks.
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1] != "Z"
    except OSError:
        return False


def nearest_size(size: Size, sizes: tuple[Size, ...]) -> int:
    """Which of `sizes` has the aspect ratio nearest to that of `size` (in logarithms); of equal ones the nearest area."""
    if size in sizes:
        return sizes.index(size)
    ratio, area = np.log(size[0] / size[1]), np.log(size[0] * size[1])
    return min(
        range(len(sizes)),
        key=lambda i: (
            round(abs(float(np.log(sizes[i][0] / sizes[i][1]) - ratio)), 6),
            abs(float(np.log(sizes[i][0] * sizes[i][1]) - area)),
        ),
    )


def _cached_record(shard: Shard, at: int, source: int, padding: Tensor | None, with_path: bool) -> Record:
    """With the text as it is stored."""
    content, caption = shard.read(at, "safetensors"), shard.read(at, "txt")
    key = shard.key(at)
    if content is None or caption is None:
        raise BadData(
            f"data: sample {key!r} of shard {shard.name} needs safetensors and txt, but has {', '.join(shard.fields(at))}"
        )
    tensors: dict[str, Tensor] = load(content)
    text = tensors["text"]
    if padding is not None and (len(text) > len(padding) or text.shape[1:] != padding.shape[1:]):
        raise ValueError(f"its text of {tuple(text.shape)} does not fit the padding of {tuple(padding.shape)}")
    if with_path and (missing := [name for name in PATH if name not in tensors]):
        raise BadData(
            f"data: sample {key!r} of shard {shard.name} has no {' and '.join(missing)}: the teacher's paths are stored by "
            f"`scfm data generate --trajectories`"
        )
    return Record(
        key=key,
        caption=caption.decode(),
        path={name: tensors[name] for name in PATH} if with_path else None,
        latents=tensors["latents"],
        text=text,
        pooled=tensors["pooled"],
        padding=None if padding is None else source,
    )


def _filled_up(record: Record, padding: Tensor | None) -> Record:
    if padding is None or record.text is None:
        return record
    text = torch.cat([record.text, padding[len(record.text) :].to(record.text.dtype)])
    return replace(record, text=text, padding=None)


def _shard_counts(source: Source | ImageFolder) -> list[int]:
    if isinstance(source, ImageFolder):
        return [len(source)]
    return [entry.samples for entry in source.manifest.shards]


def _folder(config: SourceConfig) -> str:
    if is_remote(config.uri):
        raise UserError(
            f"data.sources ({config.name}): format folder is for this machine's files. Pack {config.uri} into shards "
            f"with `scfm data encode` or webdataset's own tools"
        )
    path = Path(config.uri).expanduser()
    return str(path / config.split if config.split else path)


def _kind(source: Source | ImageFolder) -> str:
    if isinstance(source, ImageFolder) or source.manifest.encoder is None:
        return "images"
    return f"cached by {source.manifest.encoder[:12]}, {source.manifest.text_length} tokens"
