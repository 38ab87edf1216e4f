"""torchrun without its traceback: it ends with the exit code of the rank that failed first.

    python -m recipes.launch --standalone --nproc-per-node 2 -m recipes.cli train RECIPE.yaml

The options are torchrun's. The ranks have printed what is wrong, in one message; torchrun would add some 40 lines. After a
signal the ranks have as long as they need to save: torchrun would kill them after 30 s.
"""

import logging
import signal
import sys
from types import FrameType

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from scfm_core.files import permit_open_files

_GRACE = 24 * 3600
"""Seconds to save after a signal. Kubernetes or Slurm, which sent it, kills everything when its own time is over."""
_MOST_FILES = 1 << 17
"""The launcher of the first node has two connections to each rank, a rank one to each other rank, and the loader its shards."""


def main(argv: list[str] | None = None) -> int:
    """Start the ranks and wait for them; returns the exit code."""
    logging.disable(logging.ERROR)  # "Sending process ... closing signal SIGTERM", "failed (exitcode: 2) ..."
    wait_after_signals()
    permit_open_files(_MOST_FILES)
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name  # it could not say anything itself
        memory = ". Most often the memory is full (`dmesg` tells)" if name == "SIGKILL" else ""
        print(f"scfm: error: rank {rank} was ended by {name}{memory}. Start it again", file=sys.stderr)
        return 128 - failure.exitcode
    except api.SignalException as error:
        return 128 + error.sigval
    return 0


def wait_after_signals() -> None:
    """Let torchrun wait for the ranks after a signal. After a rank's failure it still kills the others in 30 s."""
    close, handle = api.PContext.close, api._terminate_process_handler
    stopped: list[int] = []

    def noted(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        handle(number, frame)

    def patient(self: api.PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        close(self, death_sig, _GRACE if stopped else timeout)

    api._terminate_process_handler = noted  # type: ignore[assignment]
    api.PContext.close = patient  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
