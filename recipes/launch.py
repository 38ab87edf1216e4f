"""torchrun without its traceback: it ends with the exit code of the rank that failed first.

    python -m recipes.launch --standalone --nproc-per-node 2 -m recipes.cli train RECIPE.yaml

The options are torchrun's. The ranks have printed what is wrong, in one message; torchrun would add some 40 lines.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(argv: list[str] | None = None) -> int:
    """Start the ranks and wait for them; returns the exit code."""
    logging.disable(logging.ERROR)  # "Sending process ... closing signal SIGTERM", "failed (exitcode: 2) ..."
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
