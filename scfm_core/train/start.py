"""The weights that adapters start from, if these are not the initial ones: another run's, or those of a file (`lora.start`)."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scfm_core.distributed.reader import Reader
from scfm_core.distributed.world import World
from scfm_core.errors import UserError, agreed_error
from scfm_core.filling import Fill
from scfm_core.models.fused_base import adapter_file, read_adapter
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.weights import adapter_metadata
from scfm_core.train.checkpoint import find_checkpoint, load_checkpoint, verify_checkpoint
from scfm_core.train.config import RunConfig
from scfm_core.train.run_dir import MANIFEST
from scfm_core.wording import count


def find_start(given: str, world: World) -> Path:
    """What `lora.start` means: a checkpoint, or a file.

    Args:
        given: a run's folder, whose newest intact checkpoint is found; a checkpoint; a safetensors file, or the folder of one.
        world: the processes, each of which calls this; rank 0 looks.

    Returns:
        a verified checkpoint's folder, or the file; the same on every rank.

    Raises:
        UserError: on every rank, if there is none, or if it is damaged.
    """
    path = Path(given).expanduser()
    found: tuple[Literal["run", "checkpoint", "file"], Path] | None = None
    with world.together():
        if world.is_main:
            found = _look(path)
    found = world.from_main(found)
    assert found is not None
    kind, path = found
    if kind == "file":
        return path
    try:
        if kind == "checkpoint":
            verify_checkpoint(path, world)
            return path
        checkpoint = find_checkpoint(path, world=world)
    except UserError as error:
        raise agreed_error(f"lora.start: {error}") from error
    if checkpoint is None:
        raise agreed_error(f"lora.start: {path} has no complete checkpoint. Train that run first, or give another one")
    return checkpoint


def _look(path: Path) -> tuple[Literal["run", "checkpoint", "file"], Path]:
    if (path / MANIFEST).is_file():
        return "checkpoint", path
    if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir():
        return "run", path
    if not path.is_file() and not any(path.glob("*.safetensors")):
        raise UserError(
            f"lora.start: {path} is neither a run's folder, nor a checkpoint, nor a safetensors file of an adapter, nor a folder with "
            f"one. Give one of them, or lora.start=none"
        )
    return "file", adapter_file(path)


def open_start(path: Path, config: RunConfig, family: ModelFamily, shapes: Mapping[str, tuple[int, ...]]) -> Fill:
    """What fills adapters with these weights.

    An adapter at strength 1 has the same effect as there: B is multiplied by the ratio of the two scales alpha / rank, if these differ.

    Args:
        path: from `find_start`.
        config: the run that starts.
        family: of its network.
        shapes: of an adapter's factors, by canonical name.

    Raises:
        UserError: if the weights do not fit the run; it says which setting does.
    """
    if path.is_dir():
        return _from_checkpoint(path, config, family, shapes)
    return _from_file(path, config, family, shapes)


def _from_checkpoint(path: Path, config: RunConfig, family: ModelFamily, shapes: Mapping[str, tuple[int, ...]]) -> Fill:
    checkpoint = load_checkpoint(path, verify=False)
    there = checkpoint.state["config"]
    if there["train"]["weights"] != "lora":
        raise UserError(
            f"lora.start: {path} has full weights, not adapters. Export that run with --merged, and set model.path to the result"
        )
    difference = family.different_network(checkpoint.state["base_fingerprint"])
    if difference is not None:
        raise UserError(
            f"lora.start: {path} was trained on another model than model.path={config.model.path} and model.adapters contain: "
            f"{difference}. Set them to that model"
        )
    gain = there["method"].get("step_gain")
    _check_gamma(path, None if gain is None else gain["gamma"], config)
    _check_shapes(path, {name: tuple(shape) for name, shape in checkpoint.state["shapes"].items()}, config, shapes)
    ratio = _scale(there["lora"]) * config.lora.rank / config.lora.alpha
    role, reader = there["sample"]["weights"], checkpoint.reader

    def fill(name: str, part: Tensor, start: int) -> None:
        part.copy_(_read(reader, f"{role}.{name}", part, start) * (ratio if ".lora_B." in name else 1.0))

    return fill


def _read(reader: Reader, key: str, part: Tensor, start: int) -> Tensor:
    return reader.read(key, start, start + part.numel()) if part.numel() else torch.empty(0)


def _scale(lora: Mapping[str, float]) -> float:
    return lora["alpha"] / lora["rank"]


def _from_file(path: Path, config: RunConfig, family: ModelFamily, shapes: Mapping[str, tuple[int, ...]]) -> Fill:
    header = _header(path)
    if header and (steps := header.get("folded_steps")) is not None:
        raise UserError(
            f"lora.start: {path} has the strength of {count(steps, 'step')} in its weights, so its strength 1 is not that of a whole jump. "
            f"Export without --steps, or give the run's folder"
        )
    try:
        factors = read_adapter(path, family.other_tools, family.meta_network())
    except UserError as error:
        raise UserError(f"lora.start: {error}") from error
    if header:
        _check_gamma(path, header.get("step_gain_gamma"), config)
    named = {f"{name}.lora_{side}.weight": pair["AB".index(side)] for name, pair in factors.items() for side in "AB"}
    _check_shapes(path, {name: tuple(factor.shape) for name, factor in named.items()}, config, shapes)
    ratio = config.lora.rank / config.lora.alpha  # `read_adapter` has multiplied B by the file's own scale

    def fill(name: str, part: Tensor, start: int) -> None:
        factor = named[name].reshape(-1)[start : start + part.numel()]
        part.copy_(factor * (ratio if ".lora_B." in name else 1.0))

    return fill


def _header(path: Path) -> dict[str, Any]:
    """What `scfm export` has written about a file; empty for one of another program."""
    try:
        return adapter_metadata(path)
    except UserError:
        return {}


def _check_gamma(path: Path, there: float | None, config: RunConfig) -> None:
    """Raise a UserError unless the strengths of the adapter at `path` follow the step size as this run's do."""
    own = None if config.method.step_gain is None else config.method.step_gain.gamma
    if there != own:
        advice = "method.step_gain=none" if there is None else f"method.step_gain.gamma={there:g}"
        raise UserError(
            f"lora.start: {path} was trained with {advice}, this run has {'none' if own is None else f'gamma {own:g}'}: at every step count "
            f"but one the adapter would have another strength than it was trained for. Set {advice}"
        )


def _check_shapes(
    path: Path, there: Mapping[str, tuple[int, ...]], config: RunConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise a UserError unless the adapter at `path` has the linears and the rank of this run's."""
    lost, unknown = (_linears(one.keys() - other.keys()) for one, other in ((shapes, there), (there, shapes)))
    for names, what in ((lost, "lacks {}, which this run adapts"), (unknown, "has {}, which this run does not adapt")):
        if names:
            linears = f"{count(len(names), 'linear')} ({names[0]}{', ...' if len(names) > 1 else ''})"
            raise UserError(
                f"lora.start: {path} {what.format(linears)}. Set lora.targets to the linears of that adapter; it is {config.lora.targets!r}"
            )
    ranks = sorted({shape[0] for name, shape in there.items() if ".lora_A." in name})
    if ranks != [config.lora.rank]:
        advice = (
            f"Set lora.rank={ranks[0]}"
            if len(ranks) == 1
            else "All linears of a run have one rank: give another adapter"
        )
        raise UserError(
            f"lora.start: {path} has rank {' and '.join(map(str, ranks))}, but lora.rank is {config.lora.rank}. {advice}"
        )
    wrong = [name for name, shape in shapes.items() if there[name] != shape]
    if wrong:
        raise UserError(
            f"lora.start: {path} has shape {list(there[wrong[0]])} for {wrong[0]}, this run {list(shapes[wrong[0]])}. It was made for "
            f"another model"
        )


def _linears(names: Collection[str]) -> list[str]:
    return sorted({name.rpartition(".lora_")[0] for name in names})
