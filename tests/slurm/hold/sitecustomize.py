"""On the PYTHONPATH of a job: rank 0 of a training waits after the step that the file $SCFM_HOLD names.

If there is a file $SCFM_HOLD.slow, opening the data takes as many seconds as it says, once: the health check comes first.

The test interferes meanwhile. The rank continues when the file is gone, or when a signal has asked the training to stop, also one
that came before the wait. So what happens at which step depends on no machine's speed.

Packages that transformers and diffusers import wherever they find them, and a training does not need, cost each process more than a second.
"""

import os
import sys

sys.modules |= dict.fromkeys(("scipy", "sklearn", "torchvision", "xformers"))  # None: not installed

if os.environ.get("RANK") == "0" and "SCFM_HOLD" in os.environ:
    import time
    from pathlib import Path
    from typing import Any

    from scfm_core.data.corpus import Corpus
    from scfm_core.progress import beat
    from scfm_core.train.metrics import MetricsFile
    from scfm_core.train.stop import StopRequest

    hold = Path(os.environ["SCFM_HOLD"])
    stops: list[StopRequest] = []
    init, write = StopRequest.__init__, MetricsFile.write

    def init_and_keep(self: StopRequest) -> None:
        init(self)
        stops.append(self)

    StopRequest.__init__ = init_and_keep  # type: ignore[method-assign]

    def write_and_wait(self, row):  # type: ignore[no-untyped-def]
        write(self, row)
        if not hold.exists() or row["step"] < int(hold.read_text()):
            return
        hold.with_suffix(".reached").touch()
        while hold.exists() and not any(stop.signal for stop in stops):
            time.sleep(0.05)

    MetricsFile.write = write_and_wait  # type: ignore[method-assign]

    slow, open_data = hold.with_suffix(".slow"), Corpus.__init__

    def open_slowly(self: Corpus, *arguments: Any, **options: Any) -> None:
        if slow.exists():
            seconds = int(slow.read_text())
            slow.unlink()
            for second in range(seconds):
                time.sleep(1)
                beat(f"second {second} of opening the data")
        open_data(self, *arguments, **options)

    Corpus.__init__ = open_slowly  # type: ignore[method-assign]
