"""`scfm data`: its commands, and those that make data sets."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.data_checks import add_inspect, add_validate, inspect, validate
from recipes.data_options import add_buckets, add_resolution, add_source, bar_of, open_corpus
from scfm_core.errors import UserError
from scfm_core.files import check_writable
from scfm_core.wording import count

if TYPE_CHECKING:
    from data_tools.encode import EncodeConfig

Command = Callable[..., argparse.ArgumentParser]
_PACKINGS = ("bfloat16", "float8", "int8", "nf4")
"""The values of `scfm_core.models.quantised.Base`, whose module would take seconds to import."""


def add_commands(group: Any, command: Command) -> None:
    """Add the subcommands of `scfm data` to `group`; `command(group, name, help, run)` makes a parser."""
    _add_generate(command(group, "generate", "Sample the teacher for prompts, and store the latents.", _generate))
    _add_encode(command(group, "encode", "Encode images with captions into shards of latents and embeddings.", _encode))
    _add_pack(command(group, "pack", "Copy samples, byte for byte, into shards of another format.", _pack))
    _add_index(command(group, "index", "Make the manifest for shards of other tools.", _index))
    add_inspect(command(group, "inspect", "Print statistics of a data set, and show samples.", inspect))
    add_validate(command(group, "validate", "Hash and decode everything; list every invalid sample.", validate))


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub id or local folder whose VAE and text encoders encode")
    parser.add_argument(
        "--text-length", type=int, default=256, help="tokens of a caption, as model.text_length (default 256)"
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--trim-padding",
        action="store_true",
        help="store text up to the end of the caption, which is a quarter of the size for captions of 60 tokens; the padding is then the "
        "output for an empty caption, which is not the text of diffusers' pipeline. Without it the encoder's output at padding tokens is "
        "stored too, if the network sees them",
    )
    text.add_argument(
        "--latents-only",
        action="store_true",
        help="store no text: training encodes the captions, with the text encoders on every GPU",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of encoders and stored tensors"
    )
    parser.add_argument(
        "--encoders",
        choices=_PACKINGS,
        default="bfloat16",
        help="how text encoders of more than a gigabyte are stored, as model.encoders; bfloat16: in --dtype",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cpu")
    parser.add_argument("--batch-size", type=int, default=16, help="images in a forward pass (default 16)")
    parser.add_argument("--samples-per-shard", type=int, help="at most; default 1000, fewer for less than 8000 samples")
    add_resolution(parser)


def _cache_config(arguments: argparse.Namespace, samples: int) -> "EncodeConfig":
    """The options; `samples` is the number of samples of the job."""
    import torch

    from data_tools.encode import EncodeConfig
    from data_tools.job import shard_size_of
    from scfm_core.train.device import resolve_device

    # At least eight shards, so that several processes can share a small data set. A job that was begun keeps its size, also if the
    # number of images or the batch size is another now.
    shard_size = shard_size_of(arguments.output) or min(1000, max(arguments.batch_size, -(-samples // 8)))
    return EncodeConfig(
        text_length=arguments.text_length,
        trim_padding=arguments.trim_padding,
        latents_only=arguments.latents_only,
        dtype=getattr(torch, arguments.dtype),
        encoders=arguments.encoders,
        device=resolve_device(arguments.device),
        batch_size=arguments.batch_size,
        samples_per_shard=shard_size if arguments.samples_per_shard is None else arguments.samples_per_shard,
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", help="text file with one prompt per line")
    parser.add_argument("--output", "-o", type=Path, required=True, help="folder of the shards")
    _add_cache_options(parser)
    parser.add_argument(
        "--base",
        choices=_PACKINGS,
        default="bfloat16",
        help="how the network's blocks are stored while they sample, as model.base; bfloat16: in --dtype",
    )
    parser.add_argument("--adapter", action="append", metavar="FILE=WEIGHT", help="fuse a LoRA, as model.adapters")
    parser.add_argument("--buckets", choices=("none", "auto"), default="none", help="auto: all aspect ratios in turn")
    parser.add_argument("--per-prompt", type=int, default=1, help="number of samples of each prompt (default 1)")
    parser.add_argument(
        "--trajectories", action="store_true", help="store the teacher's paths too, for method.trajectory_fraction"
    )
    parser.add_argument("--steps", type=int, help="of the sampler (default 32; with --trajectories 24)")
    parser.add_argument(
        "--intervals", type=int, help="intervals of a stored path, a divisor of --steps (default: one for each step)"
    )
    parser.add_argument(
        "--solver",
        choices=("euler", "adams-bashforth"),
        help="of stored paths: euler, as in sampling images (default), or adams-bashforth, of second order, for --steps 12",
    )
    parser.add_argument("--shift", default="3.25", help="timestep shift, or dynamic (default 3.25)")
    parser.add_argument("--guidance", type=float, default=3.5, help="default 3.5")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")


def _generate(arguments: argparse.Namespace) -> None:
    from data_tools.encode import format_result
    from data_tools.generate import SamplerConfig, generate
    from data_tools.job import processes
    from scfm_core.data.recipe import DataConfig
    from scfm_core.models.families import open_family
    from scfm_core.models.fused_base import parse_adapter
    from scfm_core.train.prompts import read_prompts

    try:
        shift = arguments.shift if arguments.shift == "dynamic" else float(arguments.shift)
    except ValueError:
        raise UserError(f"--shift must be a number or dynamic, got {arguments.shift!r}") from None
    resolution = tuple(arguments.resolution or (512, 512))
    sizes = DataConfig(path="unused", resolution=resolution, buckets=arguments.buckets).sizes()
    rank, world_size = processes()
    for name in ("intervals", "solver"):
        if getattr(arguments, name) is not None and not arguments.trajectories:
            raise UserError(f"--{name} is for stored paths: add --trajectories, or remove --{name}")
    steps = arguments.steps if arguments.steps is not None else 24 if arguments.trajectories else 32
    intervals = arguments.intervals if arguments.intervals is not None else steps
    prompts = read_prompts(arguments.prompts, "prompts")
    result = generate(
        prompts,
        arguments.output,
        open_family(arguments.model, adapters=[parse_adapter(text) for text in arguments.adapter or ()]),
        _cache_config(arguments, len(prompts) * arguments.per_prompt),
        SamplerConfig(
            sizes=sizes,
            per_prompt=arguments.per_prompt,
            num_steps=steps,
            shift=shift,
            guidance=arguments.guidance,
            seed=arguments.seed,
            intervals=intervals if arguments.trajectories else None,
            second_order=arguments.solver == "adams-bashforth",
            base=arguments.base,
        ),
        rank=rank,
        world_size=world_size,
        progress=bar_of("generate", unit="sample"),
    )
    print(format_result(result, arguments.output))


def _add_pack(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--output", "-o", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--to", choices=("webdataset", "mds"), required=True)
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="for tars (default 1000)")
    parser.add_argument(
        "--shard-mb", type=float, default=256, help="for MDS, size of a shard in 10^6 bytes (default 256)"
    )
    parser.add_argument("--compression", help="for MDS, as mosaicml-streaming names it, for example zstd:7")


def _pack(arguments: argparse.Namespace) -> None:
    from data_tools.encode import Encoded, format_result
    from data_tools.pack import pack

    corpus = open_corpus(arguments.source, arguments.overrides)
    manifest = pack(
        corpus,
        arguments.output,
        to=arguments.to,
        samples_per_shard=arguments.samples_per_shard,
        shard_bytes=int(arguments.shard_mb * 1e6),
        compression=arguments.compression,
        progress=bar_of("pack", unit="sample"),
    )
    print(format_result(Encoded(manifest, None, {}), arguments.output, corpus.notes))


def _add_index(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument(
        "--output",
        "-o",
        type=Path,
        metavar="FILE",
        help="of the manifest (default: manifest.json beside the shards; required for remote shards)",
    )
    parser.add_argument("--threads", type=int, default=4, help="number of shards that are read at a time (default 4)")


def _index(arguments: argparse.Namespace) -> None:
    from data_tools.index import default_output, index
    from scfm_core.train.parse import load_data_config

    config = load_data_config(arguments.source, arguments.overrides, {})
    [source, *others] = config.mixture()
    if others:
        raise UserError(f"{arguments.source} has several sources; index each source separately")
    output = arguments.output or default_output(source)
    check_writable(output.parent, "the manifest", "Choose another place with --output FILE")
    manifest = index(
        source,
        output,
        timeout=config.cache.timeout,
        threads=arguments.threads,
        max_bad_fraction=config.max_bad_fraction,
        progress=bar_of("index"),
    )
    sizes = count(len(manifest.sizes), "size")
    print(f"{count(manifest.samples, 'sample')} in {count(len(manifest.shards), 'shard')}, of {sizes}: {output}")


def _add_encode(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--output", "-o", type=Path, required=True, help="folder of the shards")
    _add_cache_options(parser)
    add_buckets(parser)


def _encode(arguments: argparse.Namespace) -> None:
    from data_tools.encode import encode, format_result
    from data_tools.job import processes
    from scfm_core.models.families import open_family

    rank, world_size = processes()
    corpus = open_corpus(
        arguments.source, arguments.overrides, resolution=arguments.resolution, buckets=arguments.buckets
    )
    result = encode(
        corpus,
        arguments.output,
        open_family(arguments.model),
        _cache_config(arguments, len(corpus)),
        rank=rank,
        world_size=world_size,
        progress=bar_of("encode", unit="image"),
    )
    print(format_result(result, arguments.output, corpus.notes))
