"""`scfm data`: commands that make and examine data sets."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfm_core.errors import UserError
from scfm_core.files import check_writable
from scfm_core.wording import count

if TYPE_CHECKING:
    from torch import Tensor

    from data_tools.encode import EncodeConfig
    from scfm_core.data.corpus import Corpus

Command = Callable[..., argparse.ArgumentParser]


def add_commands(group: Any, command: Command) -> None:
    """Add the subcommands of `scfm data` to `group`; `command(group, name, help, run)` makes a parser."""
    _add_generate(command(group, "generate", "Sample the teacher for prompts, and store the latents.", _generate))
    _add_encode(command(group, "encode", "Encode images with captions into shards of latents and embeddings.", _encode))
    _add_pack(command(group, "pack", "Copy samples, byte for byte, into shards of another format.", _pack))
    _add_index(command(group, "index", "Make the manifest for shards of other tools.", _index))
    _add_inspect(command(group, "inspect", "Print statistics of a data set, and show samples.", _inspect))
    _add_validate(command(group, "validate", "Hash and decode everything; list every invalid sample.", _validate))


def _add_source(parser: argparse.ArgumentParser) -> None:
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


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub id or local folder whose VAE and text encoders encode")
    parser.add_argument(
        "--text-length", type=int, default=256, help="tokens of a caption, as model.text_length (default 256)"
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--keep-padding",
        action="store_true",
        help="the default: store the encoder's output at padding tokens too, if the network sees them, as diffusers' pipeline does",
    )
    text.add_argument(
        "--trim-padding",
        action="store_true",
        help="store text up to the end of the caption, which is a quarter of the size for captions of 60 tokens; the padding is then the "
        "output for an empty caption, which is not the text of diffusers' pipeline",
    )
    text.add_argument(
        "--latents-only",
        action="store_true",
        help="store no text: training encodes the captions, with the text encoders on every GPU",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of encoders and stored tensors"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cpu")
    parser.add_argument("--batch-size", type=int, default=16, help="images in a forward pass (default 16)")
    parser.add_argument("--samples-per-shard", type=int, help="at most; default 1000, fewer for less than 8000 samples")
    _add_resolution(parser)


def _add_resolution(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resolution", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels (default 512 512, or the recipe's)"
    )


def _add_buckets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--buckets", choices=("none", "auto"), help="aspect-ratio buckets (default: the recipe's, or none)"
    )


def _cache_config(arguments: argparse.Namespace, samples: int) -> "EncodeConfig":
    """The options; `samples` is the number of samples of the job."""
    import torch

    from data_tools.encode import EncodeConfig
    from scfm_core.train.device import resolve_device

    return EncodeConfig(
        text_length=arguments.text_length,
        trim_padding=arguments.trim_padding,
        latents_only=arguments.latents_only,
        dtype=getattr(torch, arguments.dtype),
        device=resolve_device(arguments.device),
        batch_size=arguments.batch_size,
        # At least eight shards, so that several processes can share a small data set.
        samples_per_shard=arguments.samples_per_shard or min(1000, max(arguments.batch_size, -(-samples // 8))),
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


def _bar(name: str, unit: str = "shard") -> Callable[[Iterable[Any], int], Iterator[Any]]:
    from scfm_core.train.metrics import progress_bar

    def with_bar(items: Iterable[Any], total: int) -> Iterator[Any]:
        with progress_bar(name, total, unit=unit) as bar:
            for item in items:
                yield item
                bar.update()

    return with_bar


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", help="text file with one prompt per line")
    parser.add_argument("--output", "-o", type=Path, required=True, help="folder of the shards")
    _add_cache_options(parser)
    parser.add_argument(
        "--adapter",
        nargs=2,
        action="append",
        default=[],
        metavar=("FILE", "WEIGHT"),
        help="a LoRA that is fused into the model, as model.adapters of the training; may be given several times",
    )
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
    from scfm_core.models.fused_base import FusedAdapter
    from scfm_core.train.prompts import read_prompts

    try:
        adapters = [FusedAdapter(path=path, weight=float(weight)) for path, weight in arguments.adapter]
    except ValueError as error:
        raise UserError(f"--adapter needs a file and a number: {error}") from None
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
        open_family(arguments.model, adapters=adapters),
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
        ),
        rank=rank,
        world_size=world_size,
        progress=_bar("generate", unit="sample"),
    )
    print(format_result(result, arguments.output))


def _add_pack(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
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
        progress=_bar("pack", unit="sample"),
    )
    print(format_result(Encoded(manifest, None, {}), arguments.output, corpus.notes))


def _add_index(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
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
        progress=_bar("index"),
    )
    sizes = count(len(manifest.sizes), "size")
    print(f"{count(manifest.samples, 'sample')} in {count(len(manifest.shards), 'shard')}, of {sizes}: {output}")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a contact sheet")
    parser.add_argument(
        "--model",
        help="hub id or local folder: of images, its tokenizer counts the captions that will be cut; of a cache, its VAE decodes the "
        "latents for the contact sheet",
    )
    parser.add_argument(
        "--text-length",
        type=int,
        default=256,
        help="of images: tokens of a caption, as model.text_length (default 256)",
    )
    _add_resolution(parser)
    _add_buckets(parser)
    parser.add_argument("--device", default="auto", help="of the VAE: auto, cuda, cpu")
    parser.add_argument("--samples", type=int, default=2000, help="number of captions to read (default 2000)")
    parser.add_argument("--count", type=int, default=48, help="number of samples on the contact sheet (default 48)")
    parser.add_argument("--batch-size", type=int, default=16, help="global batch size of the run (default 16)")


def _inspect(arguments: argparse.Namespace) -> None:
    from data_tools.contact_sheet import write_contact_sheet
    from data_tools.inspect import summarise
    from data_tools.tables import format_summary

    if arguments.html is not None:
        check_writable(arguments.html.parent, "--html", "Choose another folder")
    # Above 0: unusable samples are what it tells.
    corpus = open_corpus(
        arguments.source,
        arguments.overrides,
        resolution=arguments.resolution,
        buckets=arguments.buckets,
        max_bad_fraction=0.5,
    )
    is_counted = arguments.model and not corpus.is_cached
    summary = summarise(
        corpus,
        sample=arguments.samples,
        global_batch_size=arguments.batch_size,
        count_tokens=_token_counter(arguments.model) if is_counted else None,
        text_length=arguments.text_length,
    )
    print(format_summary(summary))
    if arguments.html is not None:
        decode = _decoder(arguments.model, arguments.device) if arguments.model and corpus.is_cached else None
        print(write_contact_sheet(corpus, summary, arguments.html, decode=decode, count=arguments.count))


def _token_counter(model: str) -> "Callable[[Sequence[str]], list[int]]":
    from scfm_core.models.encoders import load_tokenizer
    from scfm_core.models.families import open_family

    family = open_family(model)
    tokenizer = load_tokenizer(family)
    return lambda captions: family.count_tokens(tokenizer, captions)


def _decoder(model: str, device: str) -> "Callable[[Tensor], Tensor]":
    import torch

    from scfm_core.models.encoders import Autoencoder
    from scfm_core.models.families import open_family
    from scfm_core.train.device import resolve_device

    target = resolve_device(device)
    vae = Autoencoder(open_family(model), torch.bfloat16 if target.type == "cuda" else torch.float32, target)
    return lambda latents: vae.decode(latents).cpu()


def _add_validate(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--no-decode", action="store_true", help="check only hashes, counts and fields")
    parser.add_argument(
        "--processes", type=int, default=1, help="number of processes that share the shards (default 1)"
    )


def _validate(arguments: argparse.Namespace) -> int:
    from data_tools.validate import format_problems, printable, validate

    # With 0 the corpus would not open if a shard is missing or truncated, and finding those is the purpose.
    corpus = open_corpus(arguments.source, arguments.overrides, max_bad_fraction=0.5)
    problems = validate(
        corpus, decode=not arguments.no_decode, processes=arguments.processes, progress=_bar("validate")
    )
    for note in corpus.notes:
        print(printable(f"left out: {note}"))
    print(format_problems(problems) if problems else f"all {len(corpus)} samples are valid")
    return 1 if problems else 0


def _add_encode(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--output", "-o", type=Path, required=True, help="folder of the shards")
    _add_cache_options(parser)
    _add_buckets(parser)


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
        progress=_bar("encode", unit="image"),
    )
    print(format_result(result, arguments.output, corpus.notes))
