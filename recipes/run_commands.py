"""`scfm play`, `scfm recipes`, `scfm health`, `scfm job`, `scfm checkpoint`: commands around a run."""

import argparse
import sys
from pathlib import Path
from typing import Any

from recipes.usage import add_command, add_overrides


def add_commands(commands: Any) -> None:
    """Add these subcommands to `scfm`."""
    _add_play(commands)
    _add_recipes(commands)
    _add_checkpoint(commands)
    _add_health(commands)
    _add_job(commands)


def _add_play(commands: Any) -> None:
    parser = add_command(
        commands,
        "play",
        "Open a page to play with: prompt, seed, steps, the undistilled model and the teacher beside it. Needs scfm[play].",
        _play,
        epilog="examples:\n  scfm play runs/flux_dev_lora\n  scfm play runs/first runs/second sample.weights=ema_slow\n"
        "  scfm play adapter.safetensors --model black-forest-labs/FLUX.1-dev",
    )
    parser.add_argument(
        "words", nargs="+", metavar="RUN_OR_ADAPTER",
        help="folder of a run, or an adapter that `scfm export` wrote: its file or folder. The page compares several. "
        "section.key=value changes the configuration of the runs",
    )  # fmt: skip
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="base model, a folder or a hub id (default: the one that the run or the adapter names)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1: this machine alone can open the page)",
    )
    parser.add_argument("--port", type=int, help="default 7860, or a free one if that is taken; 0: a free one")


def _play(arguments: argparse.Namespace) -> None:
    from recipes.play_server import play

    play(arguments.words, base=arguments.model, host=arguments.host, port=arguments.port)


def _add_recipes(commands: Any) -> None:
    parser = add_command(
        commands, "recipes", "List the recipes, studies and data recipes that are installed with scfm.", _recipes
    )
    parser.add_argument(
        "--copy", type=Path, metavar="FOLDER", help="copy them to FOLDER/recipes, and the job scripts to FOLDER/slurm"
    )


def _recipes(arguments: argparse.Namespace) -> None:
    from recipes.shipped import copy_files, list_recipes

    if arguments.copy is None:
        print(list_recipes())
    else:
        print(f"{len(copy_files(arguments.copy))} files in {arguments.copy}")


def _add_health(commands: Any) -> None:
    parser = add_command(
        commands,
        "health",
        "Check the machines of a launch (torchrun, slurm/) before a run: GPUs, versions, clocks, disks, network, model, data.",
        _health,
    )
    parser.add_argument("config", help="the run's recipe: a YAML file, or the name of a shipped recipe")
    add_overrides(parser)


def _health(arguments: argparse.Namespace) -> None:
    from recipes.health import check_health

    check_health(arguments.config, arguments.overrides)


def _add_job(commands: Any) -> None:
    group = commands.add_parser("job", help="for slurm/: questions of a batch job about its run")
    actions = group.add_subparsers(required=True, metavar="COMMAND")
    parser = add_command(
        actions, "run-dir", "Check a run's configuration, create its folder and print its path.", _job_run_dir
    )
    parser.add_argument("config")
    add_overrides(parser)
    parser = add_command(actions, "verdict", "Print finished, requeue, cancelled, failed or busy.", _job_verdict)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--exit-code", type=int, required=True)
    parser.add_argument("--cancelled", action="store_true")
    parser.add_argument("--retries", type=int, default=3)


def _job_run_dir(arguments: argparse.Namespace) -> None:
    from recipes.job import make_run_dir

    print(make_run_dir(arguments.config, arguments.overrides))


def _job_verdict(arguments: argparse.Namespace) -> None:
    from recipes.job import verdict

    found, why = verdict(
        arguments.run_dir,
        exit_code=arguments.exit_code,
        cancelled=arguments.cancelled,
        retries=arguments.retries,
    )
    print(why, file=sys.stderr)
    print(found)


def _add_checkpoint(commands: Any) -> None:
    group = commands.add_parser("checkpoint", help="inspect, verify and convert checkpoints")
    actions = group.add_subparsers(required=True, metavar="COMMAND")
    for name, text, run in (
        ("inspect", "Describe a checkpoint: engine, step, tensors, norms.", _checkpoint_inspect),
        ("verify", "Verify the hashes of a checkpoint, or of all checkpoints of a run.", _checkpoint_verify),
    ):
        parser = add_command(actions, name, text, run)
        parser.add_argument("path", type=Path, help="a run's folder, or one of its checkpoints/step_XXXXXXXX")
    parser = add_command(
        actions,
        "convert",
        "Convert a checkpoint to another engine's format, as a new run. Training does not need it: every engine resumes "
        "from every format.",
        _checkpoint_convert,
    )
    parser.add_argument("source", type=Path, help="a run's folder, or one of its checkpoints/step_XXXXXXXX")
    parser.add_argument("target", type=Path, help="folder of the new run")
    parser.add_argument("--to", choices=("dcp", "zero"), required=True, help="PyTorch's format, or DeepSpeed's")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="with --to zero (default 2)")
    parser.add_argument("--ranks", type=int, default=1, help="with --to zero: number of processes (default 1)")


def _checkpoint_inspect(arguments: argparse.Namespace) -> None:
    from recipes.checkpoint import inspect

    print(inspect(arguments.path))


def _checkpoint_verify(arguments: argparse.Namespace) -> None:
    from recipes.checkpoint import verify

    print(verify(arguments.path))


def _checkpoint_convert(arguments: argparse.Namespace) -> None:
    from recipes.checkpoint import convert

    print(convert(arguments.source, arguments.target, arguments.to, arguments.stage, arguments.ranks))
