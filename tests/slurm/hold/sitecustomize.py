"""On the PYTHONPATH of a job: rank 0 of a training waits after the step that the file $SCFM_HOLD names.

If there is a file $SCFM_HOLD.slow, opening the data takes as many seconds as it says, once: the health check comes first.

The test interferes meanwhile. The rank continues when the file is gone, or when a signal comes that the training handles. So what
happens at which step depends on no machine's speed.

Packages that transformers and diffusers import wherever they find them, and a training does not need, cost each process more than a second.
"""

import os
import sys

sys.modules |= dict.fromkeys(("scipy", "sklearn", "torchvision", "xformers"))  # None: not installed

if os.environ.get("RANK") == "0" and "SCFM_HOLD" in os.environ:
    import select
    import signal
    import socket
    import time
    from pathlib import Path
    from typing import Any

    from scfm_core.data.corpus import Corpus
    from scfm_core.progress import beat
    from scfm_core.train.metrics import MetricsFile

    hold = Path(os.environ["SCFM_HOLD"])
    signals, sender = socket.socketpair()
    sender.setblocking(False)
    write = MetricsFile.write

    def write_and_wait(self, row):  # type: ignore[no-untyped-def]
        write(self, row)
        if not hold.exists() or row["step"] < int(hold.read_text()):
            return
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        hold.with_suffix(".reached").touch()
        while hold.exists() and not select.select([signals], [], [], 0.05)[0]:
            pass

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
