"""How an `scfm` command ends: its message and its exit code. It imports no torch."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from scfm_core.errors import PeerLost, UserError
from scfm_core.files import is_disk_failure
from scfm_core.launched import launched_rank, launched_size
from scfm_core.output import prepare_streams, surviving_output
from scfm_core.user import provide_user

_MORE_MEMORY = (
    "Lower the batch size (train.micro_batch_size, evaluate.batch_size, --batch-size), or store frozen weights in int8 or nf4 (model.base, "
    "model.encoders; of a sampler sample.base). `scfm train RECIPE --dry-run` says what fits. SCFM_TRACEBACK=1 shows where it was"
)


def ended(run: Callable[[], Any], *, is_long: bool) -> int:
    """Run a command; a mistake of the user, a bad disk and a lost rank become one message, any other exception a traceback.

    Args:
        run: returns the exit code, or None for 0.
        is_long: the command goes on if nobody reads its standard output any more.
    """
    prepare_streams()
    try:
        with surviving_output(*(("stdout", "stderr") if is_long else ("stderr",))):
            provide_user()
            return int(run() or 0)
    except UserError as error:
        if os.environ.get("SCFM_TRACEBACK"):
            raise
        if not error.agreed:
            _say(f"{_rank_prefix()}{error}")
        elif not _has_peers() or launched_rank() == 0:
            _say(str(error))
        else:
            time.sleep(1)  # the launcher stops all ranks when one ends: let rank 0 print first
        _clear_frames(error)
        return error.exit_code
    except PeerLost as error:
        _say(f"{_rank_prefix()}{error}. Start the job again")
        _clear_frames(error)
        return error.exit_code
    except BrokenPipeError:  # `scfm ... | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        with surviving_output("stderr"):
            print("scfm: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("SCFM_TRACEBACK"):
            raise
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            _say(f"{_rank_prefix()}{str(error).splitlines()[0]} {_MORE_MEMORY}")
            _clear_frames(error)
            return 1
        if not is_disk_failure(error):
            raise
        _say(f"{_rank_prefix()}{error}. Mend this, or choose another folder, and run again")
        _clear_frames(error)
        return 2


def end_process(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with its code."""
    try:
        code = main()
    except Exception:
        if not _has_peers():
            raise
        traceback.print_exc()
        code = 1
    if code == PeerLost.exit_code or (_has_peers() and 0 < code < 128):
        # Nothing is left to save, and the normal exit of the interpreter or of NCCL may wait for the other processes.
        with surviving_output("stdout", "stderr"):  # it flushes both
            pass
        os._exit(code)
    sys.exit(code)


def _say(message: str) -> None:
    with surviving_output("stderr"):
        print(f"scfm: error: {message}", file=sys.stderr)


def _has_peers() -> bool:
    try:
        return launched_size() > 1 and launched_rank() >= 0
    except UserError:  # invalid variables, which the command reports
        return False


def _rank_prefix() -> str:
    return f"rank {launched_rank()}: " if _has_peers() else ""


def _clear_frames(error: BaseException | None) -> None:
    """Free the objects in the traceback's frames: a process group that exists at the interpreter's exit aborts it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
