"""The data recipe: where samples come from, in which sizes and order, and what is borne.

`recipes/data/*.yaml` hold one each; `data=PATH` swaps it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from scfm_core.data.schema import Size
from scfm_core.data.uri import refuse_uri


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data set of a mixture."""

    name: str
    """Its own, in logs and in the randomness of its order: renaming it changes the order."""
    uri: str
    """Folder, `s3://bucket/prefix`, `https://...`; or the shards by braces: `s3://bucket/{00000..00127}.tar`."""
    format: Literal["webdataset", "mds", "folder"] = "webdataset"
    """Tars of webdataset's layout, mosaicml-streaming's shards, or a folder of images with captions."""
    manifest: str | None = None
    """`manifest.json`, if it is not beside the shards (`scfm data index` makes one)."""
    split: str | None = None
    """Subfolder of `uri`."""
    weight: float | None = None
    """Share of the mixture, relative to the other sources'; none: by the number of samples."""
    image: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "bmp", "image")
    """Of images: the field that holds one; the first that a sample has."""
    captions: Mapping[str, float] = field(default_factory=lambda: {"txt": 1.0})
    """Of images: the fields that hold captions, `json.NAME` for a key of a JSON field, and how often each is chosen."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"data.sources: a name is of letters, digits, '_', '-' and '.', got {self.name!r}")
        where = f"data.sources ({self.name})"
        refuse_uri(self.uri, f"{where}: uri")
        if self.manifest is not None:
            refuse_uri(self.manifest, f"{where}: manifest")
        if self.split is not None and not re.fullmatch(r"[\w.-]+", self.split):
            raise ValueError(f"{where}: split is the name of a subfolder, got {self.split!r}")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"{where}: weight must be positive, got {self.weight}; leave a source out to weigh it 0")
        if not self.captions or min(self.captions.values()) < 0 or sum(self.captions.values()) <= 0:
            raise ValueError(f"{where}: captions needs fields with weights, such as {{txt: 1.0}}")
        if not self.image:
            raise ValueError(f"{where}: image needs the name of at least one field, such as [jpg]")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Local copies of remote shards, shared by all processes and jobs of a machine."""

    dir: str = "~/.cache/scfm/shards"
    """A folder on a local disk."""
    limit_gb: float | None = None
    """Size (10^9 bytes) above which the least recently used copies are deleted; none: no limit."""
    timeout: float = 300.0
    """Seconds for one shard, attempts and pauses included."""

    def __post_init__(self) -> None:
        if self.limit_gb is not None and not self.limit_gb > 0:
            raise ValueError(f"data.cache.limit_gb must be positive or none, got {self.limit_gb}")
        if not self.timeout > 0:
            raise ValueError(f"data.cache.timeout must be positive, got {self.timeout}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads. Either `path` (with `format`), for one source on this machine, or `sources`."""

    path: str | None = None
    """Folder of shards with `manifest.json`, or of images with captions."""
    format: Literal["webdataset", "mds", "folder"] = "webdataset"
    """Of `path`: `webdataset` or `mds`: shards; `folder`: images."""
    sources: tuple[SourceConfig, ...] = ()
    """The mixture."""
    resolution: tuple[int, int] = (512, 512)
    """Height and width in pixels; of aspect-ratio buckets the one whose area the others keep to."""
    buckets: Literal["none", "auto"] | tuple[tuple[int, int], ...] = "none"
    """Sizes that a batch may have: `none` (`resolution` alone), `auto` (as many pixels, sides multiples of
    `bucket_step`, at most 2:1), or a list such as [[512, 512], [448, 576]]. A global batch is of one size."""
    bucket_step: int = 64
    """Of `buckets: auto`, in pixels."""
    shuffle: bool = True
    """A new order every epoch; off: the shards' order."""
    shuffle_block: int = 20_000
    """Samples of consecutive shards (themselves shuffled) that are shuffled together: the more, the more shards are
    read at a time."""
    partitions: int = 1
    """Parts of an epoch, each with shards of its own, of which every global batch takes equal shares. With the number of
    machines (or a multiple) here, each machine downloads only its share. Divides the global batch."""
    epoch_size: int | None = None
    """Samples that are called an epoch; none: as many as all sources have."""
    seed: int | None = None
    """Of the order; none: `run.seed`."""
    max_bad_fraction: float = 0.0
    """Share of samples that may be unusable: each is replaced by a neighbour and logged. More than that stops the run."""
    num_workers: int = 2
    """Processes that decode ahead, beside one that downloads ahead; 0 does both in the training process."""
    verify: bool = True
    """Hash every shard when it is first opened (about 1 GB/s)."""
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        self._check_sources()
        if min(self.resolution) < 1:
            raise ValueError(f"data.resolution must be positive, got {self.resolution}")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must be at least 0, got {self.num_workers}")
        for name in ("shuffle_block", "partitions", "bucket_step", "epoch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")
        if not 0 <= self.max_bad_fraction < 1:
            raise ValueError(f"data.max_bad_fraction must be in [0, 1), got {self.max_bad_fraction}")
        if not isinstance(self.buckets, str):
            if not self.buckets or min(min(size) for size in self.buckets) < 1:
                raise ValueError(f"data.buckets needs sizes such as [[512, 512], [448, 576]], got {self.buckets}")
            if len(set(self.buckets)) < len(self.buckets):
                raise ValueError(f"data.buckets names a size twice: {self.buckets}")

    def _check_sources(self) -> None:
        if (self.path is None) == (not self.sources):
            raise ValueError("data needs either path or sources, and not both")
        if self.path is not None:
            if not self.path:
                raise ValueError("data.path is empty; name a folder, e.g. data/flux_512")
            refuse_uri(self.path, "data.path")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(
                f"data.sources has two of one name: {names}; the name enters the order, so give each its own"
            )
        weighed = [source.weight is not None for source in self.sources]
        if any(weighed) and not all(weighed):
            raise ValueError("data.sources: give every source a weight, or none of them")

    def mixture(self) -> tuple[SourceConfig, ...]:
        """The sources; `path` as one of them."""
        if self.path is None:
            return self.sources
        return (SourceConfig(name="data", uri=self.path, format=self.format),)

    def sizes(self) -> tuple[Size, ...]:
        """Every size that a batch may have, in pixels."""
        if self.buckets == "none":
            return (self.resolution,)
        if self.buckets == "auto":
            return aspect_buckets(self.resolution, self.bucket_step)
        return tuple(self.buckets)  # type: ignore[arg-type]


def aspect_buckets(resolution: Size, step: int, max_ratio: float = 2.0) -> tuple[Size, ...]:
    """Sizes of at most the pixels of `resolution`, the longest for each height, sides multiples of `step`.

    The scheme of NovelAI's aspect-ratio bucketing (https://github.com/NovelAI/novelai-aspect-ratio-bucketing).
    """
    area = resolution[0] * resolution[1]
    sizes = {resolution}
    for height in range(step, int((area * max_ratio) ** 0.5) + 1, step):
        width = area // height // step * step
        if width and max(height / width, width / height) <= max_ratio:
            sizes.add((height, width))
    return tuple(sorted(sizes))
