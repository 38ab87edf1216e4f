"""The command line of `scfm export`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from recipes.usage import add_command as add_subcommand
from recipes.usage import add_overrides
from scfm_core.errors import UserError

_FORMATS = ("diffusers", "comfyui", "kohya")
_EXAMPLES = """examples:
  scfm export RUN                                     # one file for every step count; its weight depends on the number of steps
  scfm export RUN --steps 1 4                         # a file for 1 step and one for 4, each at weight 1.0
  scfm export RUN --steps 4 --format comfyui          # with the names of ComfyUI
  scfm export RUN --merged FOLDER --steps 4           # a complete pipeline that needs no adapter
  scfm export RUN --steps 4 --push OWNER/NAME         # upload the files to the hub, with a model card"""


def add_command(commands: Any) -> None:
    """Add `scfm export`."""
    parser = add_subcommand(
        commands,
        "export",
        "Write the trained weights for other tools into RUN_DIR/adapter, with a model card.",
        _export,
        epilog=_EXAMPLES,
    )
    parser.add_argument("run_dir", type=Path)
    add_overrides(parser)
    parser.add_argument(
        "--steps",
        nargs="+",
        default=[],
        metavar="N",
        help="of a step-scaled adapter: fold the strength of an N-step sampler in, one file for each N; with --merged one N",
    )
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        default="diffusers",
        help="names of the tensors: of diffusers (default), of ComfyUI, or of kohya's trainers",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the file (default: train.compute_dtype)")
    parser.add_argument(
        "--base",
        metavar="OWNER/NAME",
        help="hub id of the base model, if model.path is a folder; none: it is not on the hub",
    )
    parser.add_argument(
        "--leave-out",
        metavar="REGEX",
        help="leave out linears whose whole name matches; top-level: those outside the blocks, which some tools refuse",
    )
    parser.add_argument(
        "--merged",
        type=Path,
        metavar="FOLDER",
        help="write a complete pipeline with merged weights in place of an adapter",
    )
    parser.add_argument("--single-file", action="store_true", help="with --merged: only the transformer, in one file")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the export to this repository on the hub")
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is private")


def _export(arguments: argparse.Namespace) -> None:
    from recipes.export import ExportOptions, export

    overrides = [word for word in arguments.steps if "=" in word]  # argparse gives --steps all words that follow
    counts = [number for word in arguments.steps if "=" not in word for number in word.split(",") if number]
    options = ExportOptions(
        steps=tuple(dict.fromkeys(_step_count(word) for word in counts)),
        format=arguments.format,
        dtype=arguments.dtype,
        base=arguments.base,
        leave_out=arguments.leave_out,
        merged=arguments.merged,
        single_file=arguments.single_file,
        push=arguments.push,
        private=arguments.private,
    )
    done = export(arguments.run_dir, [*arguments.overrides, *overrides], options)
    for path in done.files:
        print(path)
    if done.base.id is None and options.base is None:
        print(
            "scfm: note: model.path is a folder of this machine, so the files name no base model. --base OWNER/NAME names it",
            file=sys.stderr,
        )
    if done.address is not None:
        print(done.address)


def _step_count(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise UserError(f"--steps: {word!r} is not a number of steps") from None
