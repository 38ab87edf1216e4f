"""`scfm data inspect` and `scfm data validate`: commands that examine data sets."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.data_options import add_buckets, add_resolution, add_source, bar_of, open_corpus
from scfm_core.files import check_writable

if TYPE_CHECKING:
    from torch import Tensor


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Options of `scfm data inspect`."""
    add_source(parser)
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
    add_resolution(parser)
    add_buckets(parser)
    parser.add_argument("--device", default="auto", help="of the VAE: auto, cuda, cpu")
    parser.add_argument("--samples", type=int, default=2000, help="number of captions to read (default 2000)")
    parser.add_argument("--count", type=int, default=48, help="number of samples on the contact sheet (default 48)")
    parser.add_argument("--batch-size", type=int, default=16, help="global batch size of the run (default 16)")


def inspect(arguments: argparse.Namespace) -> None:
    """`scfm data inspect`."""
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


def add_validate(parser: argparse.ArgumentParser) -> None:
    """Options of `scfm data validate`."""
    add_source(parser)
    parser.add_argument("--no-decode", action="store_true", help="check only hashes, counts and fields")
    parser.add_argument(
        "--processes", type=int, default=1, help="number of processes that share the shards (default 1)"
    )


def validate(arguments: argparse.Namespace) -> int:
    """`scfm data validate`."""
    from data_tools.validate import format_problems, printable, validate

    # With 0 the corpus would not open if a shard is missing or truncated, and finding those is the purpose.
    corpus = open_corpus(arguments.source, arguments.overrides, max_bad_fraction=0.5)
    problems = validate(
        corpus, decode=not arguments.no_decode, processes=arguments.processes, progress=bar_of("validate")
    )
    for note in corpus.notes:
        print(printable(f"left out: {note}"))
    print(format_problems(problems) if problems else f"all {len(corpus)} samples are valid")
    return 1 if problems else 0
