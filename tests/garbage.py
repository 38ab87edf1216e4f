"""Python's collections of garbage, which would take a fifth of the time of test_families.py: each trainer asks for one, and a
worker has a million objects, most of them of modules."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

gc.set_threshold(50_000, 20, 100)  # with the defaults test_trainer.py takes 6 % longer

_frozen = 0
"""Number of imported modules whose objects collections leave out."""


@contextmanager
def left_alone() -> Iterator[None]:
    """For imports, which make little garbage. What lives behind them is left out of later collections."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        _freeze()


def freeze_new_modules() -> None:
    """Leave out of later collections what lives now, outside of tests, if many modules are new: libraries are imported when they are used."""
    if len(sys.modules) > _frozen + 100:
        _freeze()


def _freeze() -> None:
    global _frozen
    gc.collect()
    gc.freeze()
    _frozen = len(sys.modules)
