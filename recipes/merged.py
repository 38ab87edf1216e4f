"""The trained weights merged into a model that needs no adapter."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from recipes import advice
from recipes.base_model import BaseModel
from recipes.card import Card, write_card
from recipes.header import Contents, file_name, header
from scfm_core.files import permit_reading, renamed_at_end
from scfm_core.models.adapters import merge
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.weights import component_config, save_pipeline, save_tensors
from scfm_core.scfm.method import sampling_strength
from scfm_core.train.checkpoint import Checkpoint
from scfm_core.train.config import RunConfig


def save_merged(
    folder: Path,
    config: RunConfig,
    checkpoint: Checkpoint,
    family: ModelFamily,
    base: BaseModel,
    contents: Contents,
    card: Card,
    *,
    single_file: bool,
) -> Path:
    """Write a complete pipeline into `folder`, or one file with its transformer; with a card.

    One file needs the memory of the whole transformer. A pipeline is written tensor by tensor.

    Args:
        folder: it does not exist yet.
        config, checkpoint, family, base: the run, and its model.
        contents: the step count whose strength is merged, and the dtype.
        card: without files.
        single_file: write only the transformer.

    Returns:
        the path of what was written.
    """
    dtype: torch.dtype = getattr(torch, contents.dtype)
    weights = _merged_weights(
        config, checkpoint, family, sampling_strength(config.method.step_gain, contents.folded or 1)
    )
    card = replace(card, files=((file_name(config, base, contents) if single_file else "", contents),), is_merged=True)
    if single_file:
        name, _ = card.files[0]
        metadata = header(config, family, base, checkpoint, contents, is_adapter=False)
        with renamed_at_end(folder) as temporary:
            save_tensors(temporary / name, {key: weight.to(dtype) for key, weight in weights}, metadata)
            write_card(temporary, card)
            permit_reading(temporary)
        return folder / name
    save_pipeline(
        family.folder,
        folder,
        weights,
        dtype,
        _fixed_shift(config, family, contents.folded or config.sample.steps[-1]),
        has_learned_guidance=config.method.distil_guidance,
        describe=lambda temporary: write_card(temporary, card),
    )
    return folder


def _fixed_shift(config: RunConfig, family: ModelFamily, num_steps: int) -> float | None:
    """The fixed shift of a merged pipeline's scheduler. None: its own scheduler samples as we do, with a dynamic shift."""
    scheduler = component_config(family.folder, "scheduler", "scheduler_config.json")
    has_our_grid = scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler" and not scheduler.get("shift_terminal")
    if config.sample.shift == "dynamic" and has_our_grid and scheduler.get("use_dynamic_shifting"):
        return None
    return advice.shift(config, family, num_steps)


def _merged_weights(
    config: RunConfig, checkpoint: Checkpoint, family: ModelFamily, strength: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of the exported network by name. Only one is in memory at a time."""
    reader, role = checkpoint.reader, config.sample.weights
    if config.train.weights == "full":
        for name, weight in family.read_weights():  # also buffers, which the run does not train
            yield name, reader.tensor(f"{role}.{name}") if name in checkpoint.state["shapes"] else weight
        return
    scale = strength * config.lora.alpha / config.lora.rank
    for name, weight in family.read_weights():
        module = name.removesuffix(".weight")
        if f"{role}.{module}.lora_A.weight" in reader.shapes and name.endswith(".weight"):
            down, up = (reader.tensor(f"{role}.{module}.lora_{side}.weight") for side in "AB")
            yield name, merge(weight.to(getattr(torch, config.train.compute_dtype)), down, up, scale)
        else:
            yield name, weight
