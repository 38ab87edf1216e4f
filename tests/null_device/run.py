"""Run a Python script on the null device: `python tests/null_device/run.py [--card h100] [--cards N] [--memory GIB] SCRIPT [ARGUMENT ...]`."""

import argparse
import os
import sys

from null_driver import environment, why_unavailable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--card", choices=("a100", "h100"), default="a100")
    parser.add_argument("--cards", type=int, default=1, help="number of GPUs")
    parser.add_argument("--memory", type=float, help="GiB of a GPU, if not its own")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a script, or -m MODULE, and its arguments")
    options = parser.parse_args()
    reason = why_unavailable()
    if reason is not None:
        sys.exit(reason)
    values = environment(card=options.card, cards=options.cards, memory=options.memory)
    os.execve(sys.executable, [sys.executable, *options.command], values)


if __name__ == "__main__":
    main()
