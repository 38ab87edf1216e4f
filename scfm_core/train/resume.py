"""Whether a checkpoint may be gone on from with the present recipe."""

import json
import re
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
    "data.cache",
    "data.max_bad_fraction",
    "train.steps",
    "train.lr",  # these two change the run, and a line says so
    "train.clip_norm",
    "train.spike_factor",
    "train.max_skips",
    "train.max_rollbacks",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "kernels",
    "engine",
    "checkpoint",
    "sample",
    "evaluate",
    "wandb",
)


# Of a source: where it lies. The fingerprint says whether it is still the same.
_FREE_SOURCE_KEY = re.compile(r"data\.sources\.\d+\.(uri|manifest|split)")


def refuse_other_recipe(
    saved: dict[str, Any],
    current: dict[str, Any],
    where: Path,
    *,
    data_may_change: bool = False,
    quiet: bool = False,
) -> list[str]:
    """A run goes on only with the recipe that it began with.

    Args:
        saved, current: configurations as plain values.
        where: the checkpoint, for messages.
        data_may_change: bear other data.
        quiet: do not print what may and does change.

    Returns:
        the differences in the data, a line each; empty unless they may be.

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
    changed = [key for key in keys if not _is_free(key)]
    lines = {key: f"{key}: {left.get(key)} there, {right.get(key)} now" for key in changed}
    data = [key for key in changed if key.startswith("data.")]
    refused = [key for key in changed if not (data_may_change and key in data)]
    if refused:
        rules = ""
        if "train.global_batch_size" in refused:
            rules += (
                "\nThe number of processes and train.micro_batch_size may change, train.global_batch_size may not: it is "
                "what a step is, and where the data stand"
            )
        if data:
            rules += "\nTo go on with other data, start with --allow-data-change: its order begins at its start"
        raise UserError(
            f"checkpoint {where} is of another recipe:\n  "
            + "\n  ".join(lines[key] for key in refused)
            + f"\nUse another run.dir, put the values back, or start over with --resume never{rules}"
        )
    for key in ("train.lr", "train.clip_norm"):
        if key in keys and not quiet:
            print(f"{key} changes here from {left.get(key)} to {right.get(key)}")
    return [lines[key] for key in data]


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS) or bool(
        _FREE_SOURCE_KEY.fullmatch(key)
    )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys; the members of a list of sections by their numbers."""
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        tree = {str(number): item for number, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}."))
    return flat
