"""The `scfm` command: one function a subcommand."""

import argparse
import os
import sys
from pathlib import Path

from scfm_core import __version__
from scfm_core.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Parse and run; a UserError becomes one message and exit code 2, everything else keeps its traceback."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no further positional after an option: `scfm train R.yaml --dry-run train.steps=3` ends here.
    if any(word.startswith("-") or not hasattr(arguments, "overrides") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    try:
        return int(arguments.run(arguments) or 0)
    except UserError as error:
        if os.environ.get("SCFM_TRACEBACK"):
            raise
        print(f"scfm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scfm: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scfm", description="Turn a pre-trained flow-matching model into a few-step sampler."
    )
    parser.add_argument("--version", action="version", version=f"scfm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_sample(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_report(commands)
    data = commands.add_parser("data", help="make data sets").add_subparsers(required=True, metavar="COMMAND")
    _add_encode(data)
    return parser


def _command(commands, name: str, help: str, run, *, epilog: str | None = None) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change the configuration; values are YAML"
    )


def _add_train(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(
        commands,
        "train",
        "Run a recipe; the same command again goes on where it stopped.",
        _train,
        epilog="examples:\n  scfm train flux_dev_lora.yaml --dry-run\n"
        "  scfm train flux_dev_lora.yaml data=recipes/data/other.yaml train.steps=1500 run.dir=runs/mine",
    )
    parser.add_argument("config", help="a YAML file, or the name of a shipped recipe")
    _overrides(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check the configuration and print size, memory and compute"
    )
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH",
        help="auto (default): from the newest complete checkpoint in run.dir; never: start over, the earlier attempt is "
        "moved aside; PATH: from that checkpoint or run",
    )  # fmt: skip


def _train(arguments: argparse.Namespace) -> int:
    from recipes.train import train

    return train(arguments.config, arguments.overrides, resume=arguments.resume, dry_run=arguments.dry_run)


def _add_sample(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(commands, "sample", "Make images with a run's weights.", _sample)
    parser.add_argument("run_dir", type=Path)
    _overrides(parser)
    parser.add_argument("--prompt", action="append", default=[], help="text of one image; may be repeated")
    parser.add_argument("--prompts", metavar="FILE", help="text file with one prompt a line")
    parser.add_argument("--steps", type=int, default=3, help="Euler steps (default 3)")
    parser.add_argument("--seed", type=int, help="image i starts from torch.Generator().manual_seed(SEED + i)")
    parser.add_argument(
        "--strength", type=float, help="adapter strength; by default what the run was trained for at this step count"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default RUN_DIR/samples/N_steps")


def _sample(arguments: argparse.Namespace) -> None:
    from recipes.sample import sample

    paths = sample(
        arguments.run_dir,
        arguments.overrides + ([] if arguments.seed is None else [f"sample.seed={arguments.seed}"]),
        prompts=arguments.prompt,
        prompt_file=arguments.prompts,
        num_steps=arguments.steps,
        strength=arguments.strength,
        output=arguments.output,
    )
    print(f"{len(paths)} images in {paths[0].parent}")


def _add_evaluate(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(
        commands,
        "evaluate",
        "Compare student, undistilled base and teacher; writes RUN_DIR/evaluation.json.",
        _evaluate,
    )
    parser.add_argument("run_dir", type=Path)
    _overrides(parser)


def _evaluate(arguments: argparse.Namespace) -> None:
    from recipes.evaluate import evaluate, format_evaluation

    print(format_evaluation(evaluate(arguments.run_dir, arguments.overrides)))
    print(f"written to {arguments.run_dir / 'evaluation.json'}")


def _add_export(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(commands, "export", "Write the trained weights in diffusers' formats.", _export)
    parser.add_argument("run_dir", type=Path)
    _overrides(parser)
    parser.add_argument(
        "--merged", type=Path, metavar="FOLDER", help="a complete pipeline with merged weights, not an adapter"
    )
    parser.add_argument("--steps", type=int, help="with --merged of a step-scaled adapter: the step count to merge for")


def _export(arguments: argparse.Namespace) -> None:
    from recipes.export import export

    print(export(arguments.run_dir, arguments.overrides, merged=arguments.merged, num_steps=arguments.steps))


def _add_report(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(commands, "report", "Write RUN_DIR/report.html: curves, grids, tables, configuration.", _report)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument(
        "--compare",
        type=Path,
        action="append",
        default=[],
        metavar="RUN_DIR",
        help="another run to set beside it; may be repeated",
    )


def _report(arguments: argparse.Namespace) -> None:
    from recipes.report import report

    print(report(arguments.run_dir, arguments.compare))


def _add_encode(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(
        commands, "encode", "Encode a folder of images with captions into shards of latents and embeddings.", _encode
    )
    parser.add_argument(
        "images", type=Path, help="folder of images; captions in same-named .txt files or metadata.jsonl"
    )
    parser.add_argument("output", type=Path, help="folder of the shards")
    parser.add_argument("--model", required=True, help="hub id or local folder whose VAE, CLIP and T5 encode")
    parser.add_argument(
        "--resolution",
        type=int,
        nargs=2,
        default=(512, 512),
        metavar=("HEIGHT", "WIDTH"),
        help="pixels (default 512 512)",
    )
    parser.add_argument("--text-length", type=int, default=256, help="T5 tokens (default 256)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of encoders and stored tensors"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cpu")
    parser.add_argument("--batch-size", type=int, default=16, help="images a forward")
    parser.add_argument("--samples-per-shard", type=int, default=1000)


def _encode(arguments: argparse.Namespace) -> None:
    import torch

    from data_tools.encode import encode_folder
    from scfm_core.models.flux import Flux
    from scfm_core.train.build import resolve_device
    from scfm_core.train.metrics import progress_bar

    def with_bar(batches, total):  # type: ignore[no-untyped-def]
        with progress_bar("encode", total, unit="batch") as bar:
            for batch in batches:
                yield batch
                bar.update()

    manifest = encode_folder(
        arguments.images,
        arguments.output,
        Flux(arguments.model),
        resolution=tuple(arguments.resolution),
        text_length=arguments.text_length,
        dtype=getattr(torch, arguments.dtype),
        device=resolve_device(arguments.device),
        batch_size=arguments.batch_size,
        samples_per_shard=arguments.samples_per_shard,
        progress=with_bar,
    )
    total = sum(shard.bytes for shard in manifest.shards)
    print(f"{manifest.samples} samples in {len(manifest.shards)} shards, {total / 1e6:,.1f} MB, in {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
