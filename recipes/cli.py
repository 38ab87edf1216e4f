"""The `scfm` command: one function a subcommand."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from recipes.data_commands import add_commands
from recipes.ending import end_process, ended
from scfm_core import __version__
from scfm_core.errors import UserError
from scfm_core.train.stop import remember_early

# These commands work for long: the end of the reader of their messages does not end them.
_LONG = ("_train", "_evaluate", "_sample", "_export", "_study", "_encode", "_generate", "_pack", "_index")


def main(argv: list[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse accepts no positional after an option: in `scfm train R.yaml --dry-run train.steps=3` it ends up in `rest`.
    if any(word.startswith("-") or not hasattr(arguments, "overrides") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return ended(lambda: arguments.run(arguments), is_long=arguments.run.__name__ in _LONG)


def command() -> NoReturn:
    """The `scfm` command as a process: run `main` and exit."""
    end_process(main)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scfm", description="Turn a pre-trained flow-matching model into a few-step sampler."
    )
    # The deepspeed launcher passes this to every process; LOCAL_RANK has the same value.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"scfm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_sample(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_report(commands)
    _add_study(commands)
    _add_status(commands)
    _add_checkpoint(commands)
    _add_health(commands)
    _add_job(commands)
    data = commands.add_parser("data", help="make data sets and inspect them")
    add_commands(data.add_subparsers(required=True, metavar="COMMAND"), _command)
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
        "Run a recipe; the same command resumes it.",
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
        "--gpus", type=int, metavar="N", help="with --dry-run: memory of each of N GPUs (default: those of this launch)"
    )
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH",
        help="auto (default): from the newest complete checkpoint in run.dir; never: start over, and move the earlier attempt "
        "to run.dir/previous-N; PATH: from this checkpoint or run",
    )  # fmt: skip
    parser.add_argument(
        "--allow-data-change",
        action="store_true",
        help="continue with other data than the checkpoint's, from their first sample",
    )


def _train(arguments: argparse.Namespace) -> int:
    remember_early()
    from recipes.train import train

    if arguments.gpus is not None and (arguments.gpus < 1 or not arguments.dry_run):
        raise UserError(
            "--gpus N (at least 1) works only with --dry-run; a run uses one GPU for each process of the launcher"
        )
    return train(
        arguments.config,
        arguments.overrides,
        resume=arguments.resume,
        dry_run=arguments.dry_run,
        processes=arguments.gpus,
        data_may_change=arguments.allow_data_change,
    )


def _add_sample(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(commands, "sample", "Make images with a run's weights.", _sample)
    parser.add_argument("run_dir", type=Path)
    _overrides(parser)
    parser.add_argument("--prompt", action="append", default=[], help="prompt of one image; may be repeated")
    parser.add_argument("--prompts", metavar="FILE", help="text file with one prompt on each line")
    parser.add_argument("--steps", type=int, default=3, help="Euler steps (default 3)")
    parser.add_argument("--seed", type=int, help="image i starts from torch.Generator().manual_seed(SEED + i)")
    parser.add_argument(
        "--strength", type=float, help="adapter strength (default: the one that was trained for this step count)"
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
        "--merged",
        type=Path,
        metavar="FOLDER",
        help="write a complete pipeline with merged weights instead of an adapter",
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
        help="another run to compare with; may be repeated",
    )


def _report(arguments: argparse.Namespace) -> None:
    from recipes.report import report

    print(report(arguments.run_dir, arguments.compare))


def _add_study(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(
        commands,
        "study",
        "Compare ways to train over several seeds, in a table and a plot. The same command continues a study.",
        _study,
        epilog="examples:\n  scfm study digits\n  scfm study digits --arms paper step_scaled\n"
        "  scfm study mine.yaml --only $SLURM_ARRAY_TASK_ID     # one run of the study, in an array job",
    )
    parser.add_argument("study", help="a YAML file, or the name of a shipped study")
    _overrides(parser)
    parser.add_argument("--output", "-o", type=Path, metavar="FOLDER", help="default runs/study/NAME")
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="run only these arms")
    parser.add_argument("--only", type=int, metavar="N", help="run only the study's run number N, counted from 0")


def _study(arguments: argparse.Namespace) -> None:
    from recipes.study import run_study

    print(
        run_study(
            arguments.study,
            arguments.output,
            arguments.overrides,
            arms=arguments.arms,
            only=arguments.only,
            execute=main,
        )
    )


def _add_status(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(
        commands, "status", "Show the progress of a run: step, rate, remaining time, starts and their ends.", _status
    )
    parser.add_argument("run_dir", type=Path)


def _status(arguments: argparse.Namespace) -> None:
    from recipes.status import status

    print(status(arguments.run_dir))


def _add_health(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(
        commands,
        "health",
        "Check the machines of a launch (torchrun, slurm/) before a run: GPUs, versions, clocks, disks, network, model, data.",
        _health,
    )
    parser.add_argument("config", help="the run's recipe: a YAML file, or the name of a shipped recipe")
    _overrides(parser)


def _health(arguments: argparse.Namespace) -> None:
    from recipes.health import check_health

    check_health(arguments.config, arguments.overrides)


def _add_job(commands) -> None:  # type: ignore[no-untyped-def]
    group = commands.add_parser("job", help="for slurm/: questions of a batch job about its run")
    actions = group.add_subparsers(required=True, metavar="COMMAND")
    parser = _command(
        actions, "run-dir", "Check a run's configuration, create its folder and print its path.", _job_run_dir
    )
    parser.add_argument("config")
    _overrides(parser)
    parser = _command(actions, "verdict", "Print finished, requeue, cancelled or failed.", _job_verdict)
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


def _add_checkpoint(commands) -> None:  # type: ignore[no-untyped-def]
    group = commands.add_parser("checkpoint", help="inspect, verify and convert checkpoints")
    actions = group.add_subparsers(required=True, metavar="COMMAND")
    for name, text, run in (
        ("inspect", "Describe a checkpoint: engine, step, tensors, norms.", _checkpoint_inspect),
        ("verify", "Verify the hashes of a checkpoint, or of all checkpoints of a run.", _checkpoint_verify),
    ):
        parser = _command(actions, name, text, run)
        parser.add_argument("path", type=Path, help="a run's folder, or one of its checkpoints/step_XXXXXXXX")
    parser = _command(
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


if __name__ == "__main__":
    command()
