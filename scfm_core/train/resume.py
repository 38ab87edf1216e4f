"""Whether a checkpoint may be gone on from with the present recipe."""

import json
from pathlib import Path
from typing import Any

from scfm_core.errors import UserError

# What may change between two starts of a run.
_FREE_KEYS = (
    "run.dir",
    "run.device",
    "model.path",  # of these the content's fingerprints are compared
    "data.path",
    "data.num_workers",
    "data.verify",
    "train.steps",
    "train.lr",  # these two change the run, and a line says so
    "train.clip_norm",
    "train.spike_factor",
    "train.max_skips",
    "train.max_rollbacks",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "engine",
    "checkpoint",
    "sample",
    "evaluate",
    "wandb",
)


def refuse_other_recipe(saved: dict[str, Any], current: dict[str, Any], where: Path, *, quiet: bool = False) -> None:
    """A run goes on only with the recipe that it began with; `quiet` does not print what may and does change.

    Raises:
        UserError: with every difference.
    """
    left, right = _flat(json.loads(json.dumps(saved))), _flat(json.loads(json.dumps(current)))
    if left.get("train.lr_schedule") == "cosine" and left.get("train.steps") != right.get("train.steps"):
        raise UserError(
            f"checkpoint {where} decays its learning rate over train.steps={left['train.steps']}; with "
            f"train.steps={right['train.steps']} the rate would jump. Keep train.steps, or start over with --resume never"
        )
    keys = [key for key in sorted({*left, *right}) if left.get(key) != right.get(key)]
    changed = [k for k in keys if not any(k == free or k.startswith(f"{free}.") for free in _FREE_KEYS)]
    if changed:
        lines = "\n".join(f"  {key}: {left.get(key)} there, {right.get(key)} now" for key in changed)
        raise UserError(
            f"checkpoint {where} is of another recipe:\n{lines}\n"
            f"Use another run.dir, put the values back, or start over with --resume never"
        )
    for key in ("train.lr", "train.clip_norm"):
        if key in keys and not quiet:
            print(f"{key} changes here from {left.get(key)} to {right.get(key)}")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
