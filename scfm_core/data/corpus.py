"""All samples of a recipe, numbered from 0 over all sources and shards."""

import bisect
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scfm_core.data.buckets import BUCKETS_VERSION, buckets_of, nearest_sizes
from scfm_core.data.cache import ShardCache, cache_folder, warn_of_network
from scfm_core.data.decode import DECODING_ERRORS, cached_record, image_content, image_record, pad_tokens, read_caption
from scfm_core.data.fields import FieldKind
from scfm_core.data.folder import ImageFolder
from scfm_core.data.image import picture_notes
from scfm_core.data.machine import Arrays, MachineFiles
from scfm_core.data.open_shards import OpenShards
from scfm_core.data.order import LARGE, Order, SourceOrder
from scfm_core.data.reading import retried
from scfm_core.data.recipe import DataConfig, SourceConfig
from scfm_core.data.schema import BadData, Manifest, Record, Size
from scfm_core.data.source import Shard, Source, open_source
from scfm_core.data.uri import is_remote
from scfm_core.errors import UserError
from scfm_core.launched import launched_rank


class Corpus:
    """Random access to the samples of a recipe, by number. Their order is decided in `order.py`.

    Args:
        config: the recipe.
        with_paths: read the teacher's paths, which every cached sample must then have. Off: they are skipped.

    Raises:
        UserError: if a source cannot be opened, or the sources cannot be mixed.
    """

    def __init__(self, config: DataConfig, *, with_paths: bool = False) -> None:
        self.config, self.sizes, self.with_paths = config, config.sizes(), with_paths
        self.configs = config.mixture()
        cache = self._make_cache()
        self._files = MachineFiles(cache_folder(config.cache.dir), config.cache.timeout)
        self.sources: list[Source | ImageFolder] = []
        for source in self.configs:
            if source.format == "folder":
                folder, timeout = _local_folder(source), config.cache.timeout
                self.sources.append(ImageFolder(folder, strict=config.max_bad_fraction == 0, timeout=timeout))
            else:
                self.sources.append(open_source(source, cache, config.cache.timeout, self._files))
        if config.max_bad_fraction == 0:
            for opened in self.sources:
                if isinstance(opened, Source):
                    opened.check_present()
        # A folder of images counts as one shard.
        counts = [_shard_counts(source) for source in self.sources]
        self._shard_source = [number for number, samples in enumerate(counts) for _ in samples]
        self._shard_place = [place for samples in counts for place in range(len(samples))]
        lengths = np.concatenate([np.asarray(samples, np.int64) for samples in counts])
        self._shard_start: list[int] = (np.cumsum(lengths) - lengths).tolist()
        self._length = int(lengths.sum())
        self._counts = counts
        self.encoder, self.text_length, self.fields = self._encoder()
        if with_paths and not self.is_cached:
            raise UserError(
                "data: method.trajectory_fraction > 0 needs stored paths of the teacher, but the sources are images. Make "
                "paths of their captions with `scfm data generate --trajectories`, or set method.trajectory_steps=24, which "
                "takes them within the training"
            )
        self.buckets = self._open_buckets()
        """The size of every sample as a number into `sizes`, int16 [samples]."""
        self.fingerprint = self._fingerprint()
        self._open_shards = OpenShards(
            [
                (self.sources[source], place)
                for source, place in zip(self._shard_source, self._shard_place, strict=True)
            ],
            config.cache.timeout,
            None if cache is None else cache.limit,
        )

    def __len__(self) -> int:
        return self._length

    @property
    def is_cached(self) -> bool:
        """Whether the samples are latents and embeddings; otherwise they are images."""
        return self.encoder is not None

    def order(self, global_batch_size: int, seed: int) -> Order:
        """The stream of global batches.

        Args:
            global_batch_size: of the run.
            seed: used if the recipe has none.

        Raises:
            UserError: if `data.partitions` does not divide the batch.
        """
        config = self.config
        if global_batch_size % config.partitions:
            raise UserError(
                f"data.partitions {config.partitions} does not divide train.global_batch_size {global_batch_size}: each "
                f"partition gives an equal share of the batch. Change one of them"
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
            files=self._files,
        )

    @property
    def notes(self) -> list[str]:
        """What was left out of folders of images, one line for each kind, with its number."""
        return [note for source in self.sources if isinstance(source, ImageFolder) for note in source.notes]

    def picture_notes(self, item: int) -> Sequence[str]:
        """What is changed in an image and may surprise, as in `Picture.notes`; it is decoded only if it has an alpha channel.

        Raises:
            BadData, UserError: as `record`.
        """
        number, shard_number, at = self._locate(item)
        source, size = self.sources[number], self.sizes[self.buckets[item]]
        if isinstance(source, ImageFolder):
            return source.picture_notes(at, size)
        shard = self._open(shard_number)
        return picture_notes(image_content(shard, at, source.config), size, shard.key(at))

    def first_items(self) -> dict[str, int]:
        """The first sample of each source, by the source's name."""
        shards = zip(self._shard_source, self._shard_place, self._shard_start, strict=True)
        return {self.configs[source].name: start for source, place, start in shards if place == 0}

    def networks(self) -> dict[str, str | None]:
        """Fingerprint of the network whose paths each source stores, by the source's name; None: unknown."""
        sources = zip(self.configs, self.sources, strict=True)
        return {
            config.name: source.manifest.network if isinstance(source, Source) else None for config, source in sources
        }

    def shard_of(self, item: int) -> int:
        """Number of the shard that holds a sample."""
        return bisect.bisect_right(self._shard_start, item) - 1

    def shards_of(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the shards that hold samples."""
        return np.searchsorted(self._shard_start, items, side="right") - 1

    @property
    def num_shards(self) -> int:
        """Number of shards of all sources."""
        return len(self._shard_start)

    def shard_bytes(self, shard: int) -> int:
        """Bytes of a shard's copy in the cache; 0 if it is read in place."""
        source = self.sources[self._shard_source[shard]]
        return source.bytes_of_copy(self._shard_place[shard]) if isinstance(source, Source) else 0

    def mark_used(self, shard: int) -> None:
        """Mark the copy of a shard in the cache, if there is one, as the most recently used one."""
        source = self.sources[self._shard_source[shard]]
        if isinstance(source, Source):
            source.mark_used(self._shard_place[shard])

    def prefetch(self, shard: int) -> None:
        """Download and hash a shard before it is needed; safe in threads. Raises as `record`."""
        source = self.sources[self._shard_source[shard]]
        if isinstance(source, Source) and (self.config.verify or self.shard_bytes(shard)):
            self._open_shards.prefetch(shard, verify=self.config.verify)

    @property
    def paddings(self) -> dict[str, list[Tensor | None]]:
        """Of each field of tokens, the padding of each source, [L, ...]; None: its tokens are not trimmed."""
        found = [source.padding if isinstance(source, Source) else None for source in self.sources]
        names = [name for name, kind in self.fields.items() if kind == "tokens"]
        return {name: [None if padding is None else padding[name] for padding in found] for name in names}

    def record(self, item: int, sample_id: int = 0, *, padded: bool = True) -> Record:
        """A sample.

        Args:
            item: its number, from 0.
            sample_id: its place in the stream, which chooses one of several captions.
            padded: pad trimmed tokens. Off: the caller does it, with `paddings`.

        Raises:
            BadData: if its content is invalid; the message names shard and key.
            UserError: if its shard is unavailable.
            IndexError: if there is no such number.
        """
        number, shard_number, at = self._locate(item)
        source = self.sources[number]
        size = self.sizes[self.buckets[item]]
        if isinstance(source, ImageFolder):
            folder, seconds = source, self.config.cache.timeout
            return retried(lambda: folder.load(at, size, self.config.background), lambda: folder.key(at), seconds)
        shard = self._open(shard_number)
        try:
            if self.is_cached:
                record = cached_record(
                    shard, at, number, self.fields, self.text_length, source.padding, self.with_paths
                )
                return pad_tokens(record, source.padding) if padded else record
            return image_record(
                shard, at, source.config, size, self.config.seed or 0, sample_id, self.config.background
            )
        except UserError:  # BadData, or the shard is unavailable
            raise
        except DECODING_ERRORS as error:
            raise BadData(
                f"data: sample {shard.key(at)!r} of shard {shard.name} cannot be decoded ({error!r})"
            ) from error

    def caption(self, item: int) -> str:
        """The caption of a sample, without decoding the rest; of several captions that of `sample_id` 0."""
        number, shard_number, at = self._locate(item)
        source = self.sources[number]
        if isinstance(source, ImageFolder):
            return source.caption(at)
        return read_caption(self._open(shard_number), at, source.config, self.config.seed or 0, 0)

    def mark(self, items: Iterable[int]) -> str:
        """Hash of the content of samples: names, captions and images of a folder, else their shards and places."""
        digest = hashlib.sha256()
        for item in items:
            number, shard, at = self._locate(item)
            source = self.sources[number]
            if isinstance(source, ImageFolder):
                digest.update(source.marks[at])
            else:
                entry = source.shards.file(self._shard_place[shard])
                digest.update(f"{entry.name}:{entry.bytes}:{entry.sha256}:{at}\n".encode())
        return digest.hexdigest()

    def raw(self, item: int) -> tuple[Shard | None, int, Source | ImageFolder]:
        """The open shard of a sample (None: a folder of images), the sample's place in it, and its source."""
        number, shard_number, at = self._locate(item)
        source = self.sources[number]
        return (None if isinstance(source, ImageFolder) else self._open(shard_number)), at, source

    def items_of(self, size: Size) -> NDArray[np.int64]:
        """The numbers of the samples of one size, in the order of the sources: int64 [samples]."""
        return np.flatnonzero(self.buckets == (self.sizes.index(size) if size in self.sizes else -1))

    def _locate(self, item: int) -> tuple[int, int, int]:
        """Number of its source, of its shard, and its place in the shard."""
        if not 0 <= item < self._length:
            raise IndexError(item)
        shard = self.shard_of(item)
        return self._shard_source[shard], shard, item - self._shard_start[shard]

    def _open(self, shard: int) -> Shard:
        return self._open_shards.shard(shard, verify=self.config.verify)

    def _make_cache(self) -> ShardCache | None:
        config = self.config.cache
        if not any(is_remote(source.uri) or source.format == "mds" for source in self.configs):
            return None
        limit = None if config.limit_gb is None else int(config.limit_gb * 1e9)
        folder = cache_folder(config.dir)
        if config.dir is None and launched_rank() == 0:
            warn_of_network(folder)
        cache = ShardCache(folder, limit, config.timeout)
        cache.sweep()
        return cache

    def _encoder(self) -> tuple[str | None, int | None, dict[str, FieldKind]]:
        """Of cached sources: fingerprint of the encoders, number of text tokens, and fields; the same for all sources."""
        manifests = [source.manifest if isinstance(source, Source) else Manifest() for source in self.sources]
        first = manifests[0]
        facts = (first.encoder, first.text_length, dict(first.fields))
        if any((other.encoder, other.text_length, dict(other.fields)) != facts for other in manifests):
            described = ", ".join(
                f"{config.name}: {_describe(manifest)}"
                for config, manifest in zip(self.configs, manifests, strict=True)
            )
            raise UserError(
                f"data.sources: all must be images, or cached by one model at one text length, but they are "
                f"{described}. Encode all of them in the same way with `scfm data encode`"
            )
        return facts

    def _open_buckets(self) -> NDArray[np.int16]:
        """The size of every sample, as a number into `sizes`; of a large corpus in a file that the machine shares."""
        for config, source in zip(self.configs, self.sources, strict=True):
            if isinstance(source, Source):
                self._check_sizes(source, config)

        def make() -> NDArray[np.int16]:
            parts = [self._buckets_of(source) for source in self.sources]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        if len(self.sizes) == 1 or self._length < LARGE:
            return make()
        keys = [source.fingerprint if isinstance(source, ImageFolder) else source.shards.key for source in self.sources]
        key = hashlib.sha256(repr((BUCKETS_VERSION, self.sizes, keys)).encode()).hexdigest()[:32]
        self._bucket_file = self._files.get("buckets", key, lambda _: Arrays({"buckets": make()}))
        return self._bucket_file["buckets"]

    def _buckets_of(self, source: Source | ImageFolder) -> NDArray[np.int16]:
        if len(self.sizes) == 1:
            return np.zeros(sum(_shard_counts(source)), np.int16)
        if isinstance(source, ImageFolder):
            return nearest_sizes(source.sizes(strict=self.config.max_bad_fraction == 0), self.sizes)
        return buckets_of(source.shards, self.sizes)

    def _check_sizes(self, source: Source, config: SourceConfig) -> None:
        if not self.is_cached and len(self.sizes) == 1:
            return
        if not source.shards.has_sizes:
            raise UserError(
                f"data.sources ({config.name}): its manifest does not have the sizes of the images, which data.buckets needs. "
                f"Run `scfm data index {config.uri!r}`"
            )
        if self.is_cached and (sizes := source.manifest.sizes) - set(self.sizes):
            raise UserError(
                f"data.sources ({config.name}): the cache {config.uri} was encoded with data.resolution "
                f"{' and '.join(map(str, sorted(sizes)[:4]))}, this run asks for "
                f"{' and '.join(map(str, self.sizes[:4]))}. Set {_setting_of(sizes)}, or encode again"
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
        """Hash of names and contents of the sources; the same wherever they are stored."""
        digest = hashlib.sha256()
        for config, source in zip(self.configs, self.sources, strict=True):
            if isinstance(source, ImageFolder):
                content = source.fingerprint
            else:
                content = json.dumps([[e.sha256, e.samples, e.bytes] for e in source.shards.files()])
            digest.update(f"{config.name}:{content}\n".encode())
        return digest.hexdigest()


def _setting_of(sizes: Collection[Size]) -> str:
    """The setting for these sizes, as on a command line."""
    if len(sizes) == 1:
        return "data.resolution=" + ",".join(map(str, *sizes))
    return "data.buckets=[" + ",".join(f"[{height},{width}]" for height, width in sorted(sizes)) + "]"


def _shard_counts(source: Source | ImageFolder) -> list[int]:
    """Number of samples in each shard."""
    if isinstance(source, ImageFolder):
        return [len(source)]
    counts: list[int] = source.shards.samples.tolist()
    return counts


def _local_folder(config: SourceConfig) -> Path:
    if is_remote(config.uri):
        raise UserError(
            f"data.sources ({config.name}): format folder is for this machine's files. Pack {config.uri} into shards "
            f"with `scfm data encode` or webdataset's own tools"
        )
    path = Path(config.uri).expanduser()
    return path / config.split if config.split else path


def _describe(manifest: Manifest) -> str:
    if manifest.encoder is None:
        return "images"
    fields = ", ".join(f"{name} ({kind})" for name, kind in manifest.fields.items())
    return f"cached by {manifest.encoder[:12]}, {manifest.text_length} tokens, {fields or 'latents alone'}"
