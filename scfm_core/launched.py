"""Which process of a launch this is, from the variables of torchrun and other launchers. A single process ignores stray ones."""

import os

from scfm_core.errors import UserError


def launched_size() -> int:
    """Number of processes that the launcher started (torchrun, deepspeed, or srun with torchrun's variables)."""
    return _number("WORLD_SIZE", 1, least=1)


def launched_rank() -> int:
    """Rank of this process; 0 without a launch, even if RANK is left over in the environment."""
    size = launched_size()
    rank = _number("RANK", 0) if size > 1 else 0
    if rank >= size:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={size}. Start with torchrun, or unset both variables")
    return rank


def local_rank() -> int:
    """Rank of this process among those of its machine; 0 without a launch."""
    return _number("LOCAL_RANK", 0) if launched_size() > 1 else 0


def local_size() -> int:
    """Number of processes on this machine; 1 without a launch, or if the launcher does not tell."""
    return _number("LOCAL_WORLD_SIZE", 1, least=1) if launched_size() > 1 else 1


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UserError(f"{name}={text} is not a number of at least {least}. Start with torchrun, or unset {name}")
    return int(text)
