"""Bytes of a run's checkpoints, and of the free disk that it needs."""

import math
from collections.abc import Collection
from pathlib import Path

from scfm_core.train.config import RunConfig
from scfm_core.train.memory import shares

# Measured with torch 2.10 and DeepSpeed 0.19, bytes: what a tensor costs besides its elements.
_ITEM = 1577  # in a .distcp file, for each rank that has a part of it
_ITEM_METADATA = 236  # in .metadata
_ZERO_TENSOR = 600  # in the one file of model states of ZeRO-1 and 2
_ZERO_3_TENSOR = 900  # in each rank's file of model states of ZeRO-3
_ZERO_RANK = 8000  # in each rank's file of optimizer states
_OTHER_FILES = 1e9
"""Assumed bytes of pictures, logs, metrics and adapter."""


def checkpoint_bytes(config: RunConfig, shapes: Collection[tuple[int, ...]], world: int) -> dict[str, float]:
    """Bytes of a checkpoint by kind of file.

    Args:
        config: the run.
        shapes: of the student's tensors; a fake score has the same.
        world: number of processes.
    """
    trained = float(sum(math.prod(shape) for shape in shapes))
    share = shares(config, world)

    def items(groups: int) -> int:
        """Parts of tensors in a distributed checkpoint; replicas write one copy together."""
        rows = [
            max(1, math.prod(shape) if config.engine.name == "deepspeed" else (shape or (1,))[0]) for shape in shapes
        ]
        return groups * sum(min(share.weights, number) for number in rows)

    roles = 1 + config.method.has_matching
    fake = ", fake score" if roles > 1 else ""
    if config.engine.name == "fsdp2":
        groups = 2 + 3 * roles
        return {
            f"dcp/*.distcp (student, EMAs, Adam{fake})": 4 * groups * trained + _ITEM * items(groups),
            "dcp/.metadata": float(_ITEM_METADATA * items(groups)),
        }
    is_3 = share.weights > 1 or config.engine.zero_stage == 3
    model = world * _ZERO_3_TENSOR * len(shapes) if is_3 else 4 * trained + _ZERO_TENSOR * len(shapes)
    model *= roles
    return {
        "*optim_states.pt (masters, Adam)": 12 * roles * trained + world * _ZERO_RANK,
        "*model_states.pt" + ("" if is_3 else f" (student{fake})"): float(model),
        "dcp/*.distcp (EMAs)": 8 * trained + _ITEM * items(2),
        "dcp/.metadata": float(_ITEM_METADATA * items(2)),
    }


def disk_bytes(config: RunConfig, checkpoint: float) -> float:
    """Bytes in `run.dir` at their most: `checkpoint.keep` checkpoints, the one that is being written, and the other files.

    Args:
        config: the run.
        checkpoint: bytes of one.
    """
    return (config.checkpoint.keep + 1) * checkpoint + _OTHER_FILES


def present_bytes(run_dir: Path) -> int:
    """Bytes of the checkpoints that a run already has; what is deleted meanwhile does not count."""
    total = 0
    for path in (run_dir / "checkpoints").rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total
