"""What the commands of `scfm data` share: options, the data set that they name, a progress bar."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scfm_core.data.corpus import Corpus


def add_source(parser: argparse.ArgumentParser) -> None:
    """The data set, and changes of its recipe."""
    parser.add_argument(
        "source",
        help="folder of images (captions in .txt files of the same names, in metadata.jsonl or metadata.csv) or of shards; addresses of "
        "shards ('s3://bucket/{000..127}.tar'); or a data recipe (.yaml)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="data.key=value",
        help="change the recipe, for example data.max_bad_fraction=0.01",
    )


def add_resolution(parser: argparse.ArgumentParser) -> None:
    """`--resolution`."""
    parser.add_argument(
        "--resolution", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels (default 512 512, or the recipe's)"
    )


def add_buckets(parser: argparse.ArgumentParser) -> None:
    """`--buckets`."""
    parser.add_argument(
        "--buckets", choices=("none", "auto"), help="aspect-ratio buckets (default: the recipe's, or none)"
    )


def open_corpus(source: str, overrides: list[str], **changes: Any) -> "Corpus":
    """Open a folder, shards, or a data recipe. A cache without a recipe has the sizes of its manifest.

    Args:
        source: as on the command line.
        overrides: `data.key=value`.
        changes: values for keys of the recipe; None keeps the value of the recipe.

    Raises:
        UserError: if it cannot be opened.
    """
    from scfm_core.data.corpus import Corpus
    from scfm_core.data.source import open_source
    from scfm_core.train.parse import load_data_config

    changes = {key: value for key, value in changes.items() if value is not None}
    config = load_data_config(source, overrides, changes)
    named = {word.partition("=")[0].removeprefix("data.") for word in overrides} | changes.keys()
    has_sizes = bool(named & {"resolution", "buckets"})
    [first, *_] = config.mixture()
    if not source.endswith((".yaml", ".yml")) and not has_sizes and first.format != "folder":
        manifest = open_source(first, None, config.cache.timeout).manifest
        if manifest.encoder is not None:
            sizes = tuple(sorted(manifest.sizes))
            config = dataclasses.replace(config, resolution=sizes[-1], buckets=sizes)
    return Corpus(config)


def bar_of(name: str, unit: str = "shard") -> Callable[[Iterable[Any], int], Iterator[Any]]:
    """A progress bar for a job of the data tools."""
    from scfm_core.train.metrics import progress_bar

    def with_bar(items: Iterable[Any], total: int) -> Iterator[Any]:
        with progress_bar(name, total, unit=unit) as bar:
            for item in items:
                yield item
                bar.update()

    return with_bar
