"""Loading and exporting weights, in diffusers' own folder layout, as safetensors."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm_core.errors import UserError

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")

GUIDANCE_MARK = "GUIDANCE_IS_DISTILLED.txt"
"""A file that marks a pipeline's folder: guidance was distilled, so one pass of the network is guided."""


def is_local(path: str) -> bool:
    """Whether `path` is a folder of this machine, and not a hub id (`owner/name`)."""
    return Path(path).expanduser().exists() or path.startswith((".", "/", "~")) or path.count("/") != 1


def resolve_folder(path: str) -> Path:
    """The local folder in diffusers' format for `path`; a hub id is downloaded.

    Raises:
        UserError: if there is no such folder or repository.
    """
    folder = Path(path).expanduser() if is_local(path) else _download(path)
    index = folder / "model_index.json"
    if not folder.is_dir():
        maker = "python -m recipes.demo --only teacher" if path == "runs/demo/teacher" else "make demo"
        raise UserError(
            f"model.path: there is no folder {path!r}. Give a local folder in diffusers' format or a hub id"
            + (f". `{maker}` makes it" if path.startswith("runs/demo/") else "")
        )
    if not index.is_file():
        raise UserError(
            f"model.path: {folder} has no model_index.json, so it is not a pipeline in diffusers' format. "
            f"Give the folder that holds transformer/, vae/ and text_encoder/"
        )
    return folder


def _download(repository: str) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    try:
        # diffusers knows which files a pipeline loads: of each component the weights in one variant, and everything of tokenizers
        # and processors; no copy of the weights in one file. Here only safetensors, no pickles.
        folder = Path(DiffusionPipeline.download(repository, use_safetensors=True))
        snapshot_download(repository, revision=folder.name, allow_patterns=[GUIDANCE_MARK])  # the same commit
        return folder
    except Exception as error:  # the hub raises a dozen types; the user's remedy is the same for all
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"model.path: {repository!r} is not a local folder, and it could not be downloaded from the hub "
            f"({type(error).__name__}: {reason}). Check the name, the network and, for gated models, `hf auth login`"
        ) from error


def component_config(folder: Path, component: str, file: str = "config.json") -> dict[str, Any]:
    """Read the configuration of one component.

    Raises:
        UserError: if it is missing or not JSON.
    """
    path = folder / component / file
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model.path: {path} is missing; {folder} is not a complete pipeline") from None
    except json.JSONDecodeError as error:
        raise UserError(f"model.path: {path} is not valid JSON ({error})") from error
    return config


def load_component(cls: Any, folder: Path, component: str, dtype: torch.dtype) -> Any:
    """Load one component with `cls.from_pretrained`, only from safetensors, every parameter in `dtype`, in eval mode.

    Raises:
        UserError: if its weights are missing or damaged.
    """
    if not any(any((folder / component).glob(pattern)) for pattern in _WEIGHT_FILES):
        raise UserError(f"model.path: {folder / component} has no .safetensors weights; is the download complete?")
    try:
        module = cls.from_pretrained(folder, subfolder=component, torch_dtype=dtype, use_safetensors=True)
    except Exception as error:  # a damaged file can raise any type
        raise UserError(
            f"model.path: the weights in {folder / component} cannot be read ({type(error).__name__}: {error}). "
            f"They are damaged or incomplete: download them again"
        ) from error
    return module.eval()


def save_adapter(folder: Path, parameters: Mapping[str, Tensor], scale: float, metadata: Mapping[str, Any]) -> Path:
    """Write a LoRA that diffusers' `load_lora_weights(folder)` reads.

    Args:
        folder: created if missing.
        parameters: `<module>.lora_A.weight` and `<module>.lora_B.weight`, fp32.
        scale: alpha / rank; B is multiplied by it, so that weight 1 means strength 1 in every tool.
        metadata: for the file's header, under `scfm`, as JSON.

    Returns:
        the safetensors file's path.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"transformer.{name}": (tensor.detach() * scale if ".lora_B." in name else tensor.detach()).cpu().contiguous()
        for name, tensor in parameters.items()
    }
    path = folder / ADAPTER_FILE
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"format": "pt", "scfm": json.dumps(metadata, sort_keys=True)})
    os.replace(temporary, path)
    return path


def read_weights(folder: Path, component: str) -> Iterator[tuple[str, Tensor]]:
    """A component's weights by name, read from its safetensors files one at a time."""
    from safetensors import safe_open

    for path in sorted((folder / component).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                yield name, file.get_tensor(name)


def save_pipeline(
    source: Path,
    target: Path,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shift: float | None,
    *,
    has_learned_guidance: bool = False,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a complete pipeline folder: `source` with other weights of the transformer.

    The other components are copied, so `target` does not need `source`. `target` appears only when it is complete.

    Args:
        source: a pipeline's folder.
        target: the new folder.
        weights: every weight by name. They are read one by one and written in files of `shard_bytes`, as diffusers
            does, so at most one such file is in memory.
        dtype: of the written weights.
        shift: the sampler's fixed timestep shift; None keeps the scheduler of `source`.
        has_learned_guidance: mark the model as guided by one pass; a marked `source` stays marked.
        shard_bytes: largest size of a weight file.

    Raises:
        UserError: if `target` exists.
    """
    if target.exists():
        raise UserError(f"{target} exists already; choose another folder, or delete it")
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("transformer"))
    (temporary / "transformer").mkdir()
    shutil.copy(source / "transformer" / "config.json", temporary / "transformer" / "config.json")
    _save_sharded(temporary / "transformer", ((name, weight.to(dtype)) for name, weight in weights), shard_bytes)
    if shift is not None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False).save_pretrained(
            temporary / "scheduler"
        )
    if has_learned_guidance:
        (temporary / GUIDANCE_MARK).write_text(
            "Guidance was distilled into these weights: sample with guidance_scale=1.\n", encoding="utf-8"
        )
    temporary.rename(target)


def _save_sharded(folder: Path, weights: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write one safetensors file, or several files and their index, with diffusers' names."""
    from safetensors.torch import save_file

    stem = "diffusion_pytorch_model"
    shards: list[tuple[Path, dict[str, int]]] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        path = folder / f"shard_{len(shards)}"
        save_file({name: weight.contiguous() for name, weight in pending.items()}, path, metadata={"format": "pt"})
        shards.append((path, {name: weight.nbytes for name, weight in pending.items()}))
        pending.clear()

    for name, weight in weights:
        if pending and sum(w.nbytes for w in pending.values()) + weight.nbytes > shard_bytes:
            flush()
        pending[name] = weight
    flush()
    if len(shards) == 1:
        shards[0][0].rename(folder / f"{stem}.safetensors")
        return
    index: dict[str, str] = {}
    for number, (path, sizes) in enumerate(shards, 1):
        final = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / final)
        index |= dict.fromkeys(sizes, final)
    total = sum(sum(sizes.values()) for _, sizes in shards)
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(listing, indent=2), encoding="utf-8")
