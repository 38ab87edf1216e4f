"""The `scfm` command: one function a subcommand."""

import argparse
import shlex
from pathlib import Path
from typing import Any, NoReturn

from recipes.data_commands import add_commands as add_data_commands
from recipes.ending import end_process, ended
from recipes.export_command import add_command as add_export
from recipes.run_commands import add_commands as add_run_commands
from recipes.usage import Parser, add_command, add_overrides
from scfm_core import __version__
from scfm_core.errors import UserError
from scfm_core.train.stop import remember_early
from scfm_core.wording import count

# These commands work for long: the end of the reader of their messages does not end them.
_LONG = (
    "_train",
    "_evaluate",
    "_sample",
    "_export",
    "_study",
    "_encode",
    "_generate",
    "_pack",
    "_index",
    "_emoji",
    "_play",
)


def main(argv: list[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse accepts no positional after an option: in `scfm train R.yaml --dry-run train.steps=3` it ends up in `rest`.
    takes_overrides = hasattr(arguments, "overrides")
    if unknown := [word for word in rest if word.startswith("-") or not takes_overrides]:
        arguments.parser.refuse_words(rest[rest.index(unknown[0]) :], takes_overrides=takes_overrides)
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return ended(lambda: arguments.run(arguments), is_long=arguments.run.__name__ in _LONG)


def command() -> NoReturn:
    """The `scfm` command as a process: run `main` and exit."""
    end_process(main)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="scfm", description="Turn a pre-trained flow-matching model into a few-step sampler.")
    # The deepspeed launcher passes this to every process; LOCAL_RANK has the same value.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"scfm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_sample(commands)
    _add_evaluate(commands)
    add_export(commands)
    _add_report(commands)
    _add_study(commands)
    _add_status(commands)
    add_run_commands(commands)
    data = commands.add_parser("data", help="make data sets and inspect them")
    data_commands = data.add_subparsers(required=True, metavar="COMMAND")
    add_data_commands(data_commands, add_command)
    _add_emoji(data_commands)
    return parser


def _add_train(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        "Run a recipe; the same command resumes it.",
        _train,
        epilog="examples:\n  scfm train flux_dev_lora.yaml --dry-run\n"
        "  scfm train flux_dev_lora.yaml data=recipes/data/other.yaml train.steps=1500 run.dir=runs/mine",
    )
    parser.add_argument("config", help="a YAML file, or the name of a shipped recipe")
    add_overrides(parser)
    parser.add_argument(
        "--dry-run", action="store_true",
        help="check the configuration, trace a step at its true size, and print memory, compute and on which GPUs it fits",
    )  # fmt: skip
    parser.add_argument(
        "--estimate", action="store_true", help="with --dry-run: by formula alone, in seconds, without the trace"
    )
    parser.add_argument(
        "--show-config", action="store_true", help="print the complete configuration, and where each value comes from"
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
    if arguments.show_config:
        from scfm_core.train.show import show_config

        print(show_config(arguments.config, arguments.overrides))
        return 0
    remember_early()
    from recipes.train import train

    if arguments.gpus is not None and (arguments.gpus < 1 or not arguments.dry_run):
        raise UserError(
            f"--gpus N (at least 1) works only with --dry-run. To train on several GPUs: torchrun --nproc-per-node "
            f"{max(1, arguments.gpus)} --no-python scfm train {arguments.config}"
        )
    if arguments.estimate and not arguments.dry_run:
        raise UserError("--estimate works only with --dry-run")
    return train(
        arguments.config,
        arguments.overrides,
        resume=arguments.resume,
        dry_run=arguments.dry_run,
        by_formula=arguments.estimate,
        processes=arguments.gpus,
        data_may_change=arguments.allow_data_change,
    )


def _add_sample(commands: Any) -> None:
    parser = add_command(
        commands,
        "sample",
        "Make images with a run's weights.",
        _sample,
        epilog="examples:\n  scfm sample runs/mine --steps 3 --prompt 'a red fox in fresh snow'\n"
        "  scfm sample runs/mine --steps 3 --prompts evaluation_metadata.jsonl --per-prompt 4 --layout geneval -o images",
    )
    parser.add_argument("run_dir", type=Path)
    add_overrides(parser)
    parser.add_argument("--prompt", action="append", default=[], help="prompt of one image; may be repeated")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="text file with one prompt on each line, or JSON lines with the key prompt (.jsonl)",
    )
    parser.add_argument("--per-prompt", type=int, default=1, metavar="N", help="images of each prompt (default 1)")
    parser.add_argument(
        "--layout",
        choices=("geneval", "flat"),
        help="many images for another tool: folders as GenEval reads them, or one folder with metadata.jsonl. The same command resumes; the "
        "processes of a launcher or of a Slurm array share the prompts",
    )
    parser.add_argument("--steps", type=int, default=3, help="Euler steps (default 3)")
    parser.add_argument("--seed", type=int, help="image i of all starts from torch.Generator().manual_seed(SEED + i)")
    parser.add_argument(
        "--strength", type=float, help="adapter strength (default: the one that was trained for this step count)"
    )
    parser.add_argument("--output", "-o", type=Path, metavar="FOLDER", help="default RUN_DIR/samples/N_steps[_LAYOUT]")


def _sample(arguments: argparse.Namespace) -> None:
    if prompts := [word for word in arguments.overrides if "=" not in word]:
        raise UserError(
            f"{prompts[0]!r} is not of the form section.key=value. A prompt: --prompt {shlex.quote(prompts[0])}"
        )
    from recipes.sample import sample

    made, folder = sample(
        arguments.run_dir,
        arguments.overrides + ([] if arguments.seed is None else [f"sample.seed={arguments.seed}"]),
        prompts=arguments.prompt,
        prompt_file=arguments.prompts,
        per_prompt=arguments.per_prompt,
        layout=arguments.layout,
        num_steps=arguments.steps,
        strength=arguments.strength,
        output=arguments.output,
    )
    print(f"{count(made, 'image')} in {folder}")


def _add_evaluate(commands: Any) -> None:
    parser = add_command(
        commands,
        "evaluate",
        "Compare student, undistilled base and teacher; writes RUN_DIR/evaluation.json.",
        _evaluate,
    )
    parser.add_argument("run_dir", type=Path)
    add_overrides(parser)


def _evaluate(arguments: argparse.Namespace) -> None:
    from recipes.evaluate import evaluate
    from recipes.figures import format_evaluation

    print(format_evaluation(evaluate(arguments.run_dir, arguments.overrides)))
    print(f"written to {arguments.run_dir / 'evaluation.json'}")


def _add_report(commands: Any) -> None:
    parser = add_command(
        commands, "report", "Write RUN_DIR/report.html: curves, grids, tables, configuration.", _report
    )
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


def _add_study(commands: Any) -> None:
    parser = add_command(
        commands,
        "study",
        "Compare ways to train over several seeds, in a table and a plot. The same command continues a study.",
        _study,
        epilog="examples:\n  scfm study digits\n  scfm study digits --arms paper step_scaled\n"
        "  scfm study mine.yaml --only $SLURM_ARRAY_TASK_ID     # one run of the study, in an array job",
    )
    parser.add_argument("study", help="a YAML file, or the name of a shipped study")
    add_overrides(parser)
    parser.add_argument("--output", "-o", type=Path, metavar="FOLDER", help="default runs/study/NAME")
    parser.add_argument(
        "--arms", nargs="+", default=[], metavar="ARM", help="run only these arms, and those from which they start"
    )
    parser.add_argument("--only", type=int, metavar="N", help="run only the study's run number N, counted from 0")
    parser.add_argument(
        "--equal-passes",
        metavar="ARM",
        help="give the other arms as many passes of the network as this one, instead of their train.steps; "
        "default folder runs/study/NAME_equal_passes",
    )


def _study(arguments: argparse.Namespace) -> None:
    from recipes.study import run_study

    print(
        run_study(
            arguments.study,
            arguments.output,
            [*arguments.overrides, *(word for word in arguments.arms if "=" in word)],
            arms=[word for word in arguments.arms if "=" not in word],
            only=arguments.only,
            execute=main,
            equal_passes=arguments.equal_passes,
        )
    )


def _add_emoji(commands: Any) -> None:
    parser = add_command(
        commands,
        "emoji",
        "Make the benchmark with rich prompts: images, a tiny model, its teacher. The same command continues.",
        _emoji,
        epilog="examples:\n  scfm data emoji\n  scfm data emoji --only-assets           # without the teacher, which trains for some 40 minutes\n"
        "  scfm data emoji -o runs/long train.steps=40000",
    )
    parser.add_argument(
        "--output", "-o", type=Path, metavar="FOLDER", default=Path("runs/emoji"), help="default runs/emoji"
    )
    parser.add_argument("--only-assets", action="store_true", help="stop before the training of the teacher")
    parser.add_argument(
        "--font",
        type=Path,
        metavar="FILE",
        help="NotoColorEmoji.ttf (default: that of the package fonts-noto-color-emoji)",
    )
    add_overrides(parser)


def _emoji(arguments: argparse.Namespace) -> None:
    from recipes.emoji import make

    make(
        arguments.output,
        arguments.overrides,
        font=arguments.font,
        execute=main,
        only_assets=arguments.only_assets,
    )


def _add_status(commands: Any) -> None:
    parser = add_command(
        commands, "status", "Show the progress of a run: step, rate, remaining time, starts and their ends.", _status
    )
    parser.add_argument("run_dir", type=Path)


def _status(arguments: argparse.Namespace) -> None:
    from recipes.status import status

    print(status(arguments.run_dir))


if __name__ == "__main__":
    command()
