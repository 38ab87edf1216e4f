"""Whether a run may resume from a checkpoint with its current recipe."""

import json
import re
from pathlib import Path
from typing import Any

from scfm_core.errors import UserError

# Keys that may change between two starts of a run.
_FREE_KEYS = (
    "run.dir",
    "run.device",
    "model.path",  # for this and the data the fingerprints of the content are compared
    "model.offload_blocks",
    "data.path",
    "data.format",
    "data.num_workers",
    "data.verify",
    "data.cache",
    "data.max_bad_fraction",
    "lora.init",  # the weights of a run that resumes come from its checkpoint
    "lora.start",
    "train.steps",
    "train.lr",  # a change of these two affects the result: it is printed
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


# Location and format of a source, and of a fused adapter; the fingerprints show whether their content is the same.
_FREE_MEMBER_KEY = re.compile(r"data\.sources\.\d+\.(uri|manifest|split|format)|model\.adapters\.\d+\.path")


def check_same_recipe(
    saved: dict[str, Any],
    current: dict[str, Any],
    where: Path,
    *,
    data_may_change: bool = False,
    quiet: bool = False,
) -> list[str]:
    """Compare the recipe of a checkpoint with the current one: a run can only resume with the same recipe.

    Args:
        saved, current: configurations as plain values.
        where: the checkpoint, for messages.
        data_may_change: accept differences in the data.
        quiet: do not print changes of learning rate and clipping.

    Returns:
        the accepted differences in the data, one line each.

    Raises:
        UserError: it lists every difference that is not accepted.
    """
    left, right = _flat_json(saved), _flat_json(current)
    if left.get("train.lr_schedule") == "cosine" and left.get("train.steps") != right.get("train.steps"):
        raise UserError(
            f"the learning rate of checkpoint {where} decays over train.steps={left['train.steps']}; with "
            f"train.steps={right['train.steps']} it would jump. Keep train.steps, or start over with --resume never"
        )
    keys = list(changed_keys(saved, current))
    changed = [key for key in keys if not _is_free(key)]
    lines = {key: f"{key}: {left.get(key)} in the checkpoint, {right.get(key)} now" for key in changed}
    data = [key for key in changed if key.startswith("data.")]
    refused = [key for key in changed if not (data_may_change and key in data)]
    if refused:
        rules = ""
        if "train.global_batch_size" in refused:
            rules += (
                "\nThe number of processes and train.micro_batch_size may change, train.global_batch_size may not: it defines "
                "a step and the position in the data"
            )
        if "method.matching_fraction" in refused and 0 in (
            left["method.matching_fraction"],
            right["method.matching_fraction"],
        ):
            has = "no" if left["method.matching_fraction"] == 0 else "a"
            rules += (
                f"\nThis checkpoint has {has} fake score. To train its adapters on with other rows, start another run with "
                f"lora.start={where.parent.parent}"
            )
        if data:
            rules += "\nTo continue with other data, from their first sample, start with --allow-data-change"
        raise UserError(
            f"checkpoint {where} has another recipe:\n  "
            + "\n  ".join(lines[key] for key in refused)
            + f"\nUse another run.dir, restore these values, or start over with --resume never{rules}"
        )
    for key in ("train.lr", "train.clip_norm"):
        if key in keys and not quiet:
            print(f"{key} changes from {left.get(key)} to {right.get(key)}")
    return [lines[key] for key in data]


def changed_keys(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> value in `saved` and in `current`, for each value that differs; None where a configuration lacks the key."""
    left, right = _flat_json(saved), _flat_json(current)
    return {key: (left.get(key), right.get(key)) for key in sorted({*left, *right}) if left.get(key) != right.get(key)}


def _flat_json(config: dict[str, Any]) -> dict[str, Any]:
    return _flat(json.loads(json.dumps(config)))


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS) or bool(
        _FREE_MEMBER_KEY.fullmatch(key)
    )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; members of a list of sections are named by their numbers."""
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        tree = {str(number): item for number, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}."))
    return flat
