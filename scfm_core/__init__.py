"""scfm: turns a pre-trained flow-matching model into a few-step sampler by shortcut self-distillation."""

import importlib
from typing import Any

__version__ = "0.3.0"
__all__ = ("load", "with_steps")


def __getattr__(name: str) -> Any:
    """The functions of `scfm_core.api`, which is imported with torch when the first of them is used."""
    if name in __all__:
        return getattr(importlib.import_module("scfm_core.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
