"""The data recipe: where samples come from, their sizes and order, and how many invalid ones are tolerated.

Each file of `recipes/data/*.yaml` has one; `data=PATH` selects it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from scfm_core.data.mds import INDEX
from scfm_core.data.schema import JOB, MANIFEST, Size
from scfm_core.data.uri import is_remote, join, refuse_uri

Format = Literal["webdataset", "mds", "folder"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data set of a mixture."""

    name: str
    """A unique name, for logs. It is part of the random key of the order: another name changes the order."""
    uri: str
    """Folder, `s3://bucket/prefix`, `https://...`; or the shards, with braces: `s3://bucket/{00000..00127}.tar`."""
    format: Literal["auto", "webdataset", "mds", "folder"] = "auto"
    """Tars in webdataset's layout, shards of mosaicml-streaming, or a folder of images with captions. `auto`: what the folder
    contains; tars, if it is an address."""
    manifest: str | None = None
    """Path or address of `manifest.json`, if it is not beside the shards (`scfm data index` makes one)."""
    split: str | None = None
    """Subfolder of `uri`."""
    weight: float | None = None
    """Share of the mixture, relative to the weights of the other sources. none: in proportion to the number of
    samples."""
    image: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "bmp", "image")
    """Of images: names of the field that has the image. The first one that a sample has is used."""
    captions: Mapping[str, float] = field(default_factory=lambda: {"txt": 1.0})
    """Of images: the fields that have captions (`json.NAME` for a key of a JSON field), and how often each is
    chosen."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"data.sources: a name may have letters, digits, '_', '-' and '.', got {self.name!r}")
        where = f"data.sources ({self.name})"
        refuse_uri(self.uri, f"{where}: uri")
        if self.manifest is not None:
            refuse_uri(self.manifest, f"{where}: manifest")
        if self.split is not None and not re.fullmatch(r"[\w.-]+", self.split):
            raise ValueError(f"{where}: split is the name of a subfolder, got {self.split!r}")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"{where}: weight must be positive, got {self.weight}; to exclude a source, delete it")
        if not self.captions or min(self.captions.values()) < 0 or sum(self.captions.values()) <= 0:
            raise ValueError(f"{where}: captions needs fields with weights, for example {{txt: 1.0}}")
        if not self.image:
            raise ValueError(f"{where}: image needs the name of at least one field, for example [jpg]")

    def with_format(self) -> "SourceConfig":
        """The source, with its format in place of `auto`. It looks at the folder, but asks no network."""
        if self.format != "auto":
            return self
        place = self.uri if self.split is None else join(self.uri, self.split)
        return replace(self, format="webdataset" if is_remote(place) else format_of(Path(place).expanduser()))


def format_of(path: Path) -> Format:
    """Format of a data set on this machine: `mds` with an `index.json`, `folder` for one without tars, manifest and unfinished job."""
    if (path / INDEX).is_file():
        return "mds"
    has_shards = (path / MANIFEST).is_file() or (path / JOB).is_dir() or any(path.glob("*.tar"))
    return "folder" if path.is_dir() and not has_shards else "webdataset"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The cache: local copies of remote shards, shared by all processes and jobs of a machine."""

    dir: str | None = None
    """A folder on a local disk. none: in a batch job the first of SLURM_TMPDIR, LOCAL_SCRATCH and TMPDIR that is on a local disk,
    else `~/.cache/scfm/shards`."""
    limit_gb: float | None = None
    """Size of the cache in 10^9 bytes. Above it the least recently used copies are deleted. none: no limit."""
    timeout: float = 300.0
    """Seconds for one shard, to download it or to read it again after an error that may pass, with all pauses."""

    def __post_init__(self) -> None:
        if self.limit_gb is not None and not self.limit_gb > 0:
            raise ValueError(f"data.cache.limit_gb must be positive or none, got {self.limit_gb}")
        if not self.timeout > 0:
            raise ValueError(f"data.cache.timeout must be positive, got {self.timeout}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run: either `path` (with `format`), for one source on this machine, or `sources`."""

    path: str | None = None
    """Folder of shards with `manifest.json`, or of images with captions."""
    format: Literal["auto", "webdataset", "mds", "folder"] = "auto"
    """Format of `path`: `webdataset` and `mds` are shards; `folder` is a folder of images; `auto`: what the folder contains."""
    sources: tuple[SourceConfig, ...] = ()
    """Several data sets, mixed by weight."""
    resolution: tuple[int, int] = (512, 512)
    """Height and width in pixels. With aspect-ratio buckets: the one whose area no other exceeds."""
    buckets: Literal["none", "auto"] | tuple[tuple[int, int], ...] = "none"
    """Sizes that a batch may have: `none` (only `resolution`), `auto` (at most as many pixels as `resolution`, sides
    are multiples of `bucket_step`, at most 2:1), or a list such as [[512, 512], [448, 576]]. A global batch has one
    size."""
    bucket_step: int = 64
    """With `buckets: auto`: the sides of all sizes are multiples of it, in pixels."""
    shuffle: bool = True
    """A new order in every epoch. false: always the order of the shards."""
    shuffle_block: int = 20_000
    """Number of samples that are shuffled together, after the shards were shuffled. A larger block reads more shards at
    a time."""
    partitions: int = 1
    """Parts of an epoch, each with its own shards. Every global batch takes equal shares of all parts. Set it to the number
    of machines or a multiple of it: each machine then downloads only its share. It must divide the global batch."""
    epoch_size: int | None = None
    """Samples of an epoch. none: the number of samples of all sources."""
    seed: int | None = None
    """Seed of the order. none: `run.seed`."""
    max_bad_fraction: float = 0.0
    """Tolerated share of invalid samples. Each is replaced by another sample and logged. A larger share stops the
    run."""
    num_workers: int = 2
    """Processes that decode batches ahead of the training; one more process downloads shards ahead. 0: the training
    process does both itself."""
    verify: bool = True
    """Hash every shard before its first use on a machine, and again if the file has changed, and compare with the manifest (about
    1 GB/s). Data sets below 1 GB are hashed at every start. false: only the sizes are compared."""
    background: str = "white"
    """Of images: the colour behind transparent ones, `white`, `black` or six hexadecimal digits such as '#808080' (in YAML with
    quotes)."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Local copies of remote shards."""

    def __post_init__(self) -> None:
        self._check_sources()
        if not re.fullmatch(r"white|black|#[0-9a-fA-F]{6}", self.background):
            raise ValueError(
                f"data.background must be white, black or a colour such as '#808080', got {self.background!r}"
            )
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
            raise ValueError(
                "data needs either data.path or data.sources" + (", not both: set data.path=none" if self.path else "")
            )
        if self.path is not None:
            if not self.path:
                raise ValueError("data.path is empty; name a folder, e.g. data/images_512")
            refuse_uri(self.path, "data.path")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(
                f"data.sources has two sources of one name: {names}; the order depends on the names, so they must be unique"
            )
        weighed = [source.weight is not None for source in self.sources]
        if any(weighed) and not all(weighed):
            raise ValueError("data.sources: give every source a weight, or none of them")

    def mixture(self) -> tuple[SourceConfig, ...]:
        """The sources, each with its format; `path` becomes one."""
        if self.path is None:
            return tuple(source.with_format() for source in self.sources)
        return (SourceConfig(name="data", uri=self.path, format=self.format).with_format(),)

    def sizes(self) -> tuple[Size, ...]:
        """Every size that a batch may have: height and width in pixels."""
        if self.buckets == "none":
            return (self.resolution,)
        if self.buckets == "auto":
            return aspect_buckets(self.resolution, self.bucket_step)
        return tuple(self.buckets)  # type: ignore[arg-type]


def aspect_buckets(resolution: Size, step: int) -> tuple[Size, ...]:
    """Aspect-ratio buckets up to 1:2 and 2:1: for each height the largest width, with at most the area of `resolution`.

    Args:
        resolution: height and width in pixels; also one of the buckets.
        step: all sides are multiples of it, in pixels.

    The scheme of NovelAI's aspect-ratio bucketing (https://github.com/NovelAI/novelai-aspect-ratio-bucketing).
    """
    area = resolution[0] * resolution[1]
    sizes = {resolution}
    for height in range(step, int((2 * area) ** 0.5) + 1, step):
        width = area // height // step * step
        if width and max(height / width, width / height) <= 2:
            sizes.add((height, width))
    return tuple(sorted(sizes))
