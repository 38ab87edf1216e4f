"""Usage errors: one line of usage, and what the user may have meant."""

import argparse
import difflib
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are two lines: the usage of the subcommand, and what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message; exit code 2."""
        arguments = [action for action in self._actions if not action.option_strings]
        words = [str(action.metavar or action.dest) for action in arguments]
        words = [
            f"[{word} ...]" if action.nargs == "*" else word for word, action in zip(words, arguments, strict=True)
        ]
        required = [f"{action.option_strings[0]} {action.metavar or action.dest.upper()}" for action in self._actions
                    if action.option_strings and action.required]  # fmt: skip
        usage = " ".join([self.prog, *words, *required, "[options]"])
        self.exit(2, f"usage: {usage}    (--help lists the options)\n{self.prog}: error: {message}\n")

    def refuse_words(self, words: list[str], *, takes_overrides: bool) -> NoReturn:
        """The error of words that are neither options nor arguments.

        Args:
            words: what argparse left over.
            takes_overrides: `section.key=value` is allowed here.
        """
        word, *others = words
        name, _, value = word.partition("=")
        options = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        hint = ""
        if near := difflib.get_close_matches(name, options, n=1, cutoff=0.75):
            hint = f"; did you mean {near[0]}?"
        elif takes_overrides and word.startswith("-") and (keys := _keys_like(name)):
            value = value or next((other for other in others if not other.startswith("-")), "...")
            hint = f"; settings have no dashes: {' or '.join(f'{key}={value}' for key in keys)}"
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {hint}")


def _keys_like(option: str) -> list[str]:
    """Keys of the configuration that an option may mean: `--learning-rate`, `--train.lr`."""
    from scfm_core.train.keys import all_keys, nearest_keys

    name = option.lstrip("-").replace("-", "_")
    return [name] if name in all_keys() else nearest_keys("", name.rpartition(".")[2], ())


def add_command(commands: Any, name: str, help: str, run: Any, *, epilog: str | None = None) -> Parser:
    """Add a subcommand.

    Args:
        commands: what `add_subparsers` returned.
        name, help, epilog: of the subcommand.
        run: is called with the parsed arguments.
    """
    parser: Parser = commands.add_parser(
        name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the argument `overrides`: `section.key=value`, any number of times."""
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="change the configuration; values are YAML",
    )
