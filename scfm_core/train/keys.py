"""The keys of a configuration: names, types, and the key that a user may have meant."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from scfm_core.train.config import RunConfig

# What other trainers call it -> the key here.
_OTHER_NAMES = {
    "learning_rate": "train.lr",
    "lr_scheduler": "train.lr_schedule",
    "lr_warmup_steps": "train.warmup_steps",
    "max_train_steps": "train.steps",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "iterations": "train.steps",
    "epochs": "train.steps",
    "num_train_epochs": "train.steps",
    "batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "max_grad_norm": "train.clip_norm",
    "grad_clip": "train.clip_norm",
    "mixed_precision": "train.compute_dtype",
    "dtype": "train.compute_dtype",
    "gradient_checkpointing": "train.activation_checkpointing",
    "network_dim": "lora.rank",
    "network_alpha": "lora.alpha",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "target_modules": "lora.targets",
    "ema_decay": "ema.slow",
    "pretrained_model_name_or_path": "model.path",
    "model_name": "model.path",
    "output_dir": "run.dir",
    "dataset": "data.path",
    "data_dir": "data.path",
    "train_data_dir": "data.path",
    "checkpointing_steps": "checkpoint.every",
    "save_every": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "checkpoints_total_limit": "checkpoint.keep",
    "validation_prompt": "sample.prompts",
    "validation_prompts": "sample.prompts",
    "prompt": "sample.prompts",
    "num_inference_steps": "sample.steps",
    "guidance_scale": "sample.guidance",
    "report_to": "wandb.mode",
}


def dataclass_in(annotation: Any) -> Any:
    """The dataclass in `X`, `X | None` or `tuple[X, ...]`, or None."""
    several = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is tuple
    options = typing.get_args(annotation) if several else (annotation,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


@functools.cache
def hints_of(cls: Any) -> dict[str, Any]:
    """Name and type of each key of a section."""
    return typing.get_type_hints(cls)


@functools.cache
def all_keys() -> tuple[str, ...]:
    """Dotted names of all keys, with those of nested sections: `method.step_gain`, `method.step_gain.gamma`."""

    def below(cls: Any, prefix: str) -> Iterator[str]:
        for name, annotation in hints_of(cls).items():
            yield f"{prefix}{name}"
            nested = dataclass_in(annotation)
            if nested is not None and typing.get_origin(annotation) is not tuple:
                yield from below(nested, f"{prefix}{name}.")

    return tuple(below(RunConfig, ""))


def nearest_keys(prefix: str, name: str, siblings: Sequence[str]) -> list[str]:
    """The keys that an unknown key may mean, best first; none if no key is similar.

    Args:
        prefix: of its section, as `train.`; empty at the top.
        name: the unknown key.
        siblings: the known keys of its section.
    """
    known = [key for key in all_keys() if "." in key]
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    if name in _OTHER_NAMES:
        return [_OTHER_NAMES[name], *elsewhere]
    if elsewhere:
        return elsewhere
    if near := difflib.get_close_matches(name, siblings, n=1):
        return [prefix + near[0]]
    last_parts = {key.rpartition(".")[2]: key for key in known} | _OTHER_NAMES
    return [last_parts[near] for near in difflib.get_close_matches(name, last_parts, n=1, cutoff=0.75)]
