"""Loading and exporting weights, in diffusers' own folder layout, as safetensors."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm_core.errors import UserError
from scfm_core.files import permit_reading, renamed_at_end
from scfm_core.secrets import said, scrub

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")

_LOCAL_PATH = re.compile(r"[/~.]|[A-Za-z]:[\\/]")
_OF_A_COMPONENT = re.compile(
    r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors|[\w-]+\.safetensors\.index\.json|[\w-]+\.(json|txt|model|jinja)|"
    r"additional_chat_templates"
)
"""What diffusers loads of a component: weights without a variant, their index, configurations, tokenizers."""
_LICENCE = re.compile(r"(licen[cs]e|notice|use_policy)", re.IGNORECASE)
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
    from huggingface_hub import constants, snapshot_download

    try:
        # diffusers knows which files a pipeline loads: of each component the weights in one variant, and everything of tokenizers
        # and processors; no copy of the weights in one file. Here only safetensors, no pickles.
        folder = Path(DiffusionPipeline.download(repository, use_safetensors=True))
        snapshot_download(repository, revision=folder.name, allow_patterns=[GUIDANCE_MARK])  # the same commit
        return folder
    except Exception as error:  # the hub raises a dozen types; the user's remedy is the same for all
        own = {"HF_ENDPOINT": scrub(constants.ENDPOINT), "HF_HUB_OFFLINE": "1" if constants.HF_HUB_OFFLINE else ""}
        usual = {"HF_ENDPOINT": "https://huggingface.co", "HF_HUB_OFFLINE": ""}
        changed = "".join(f", {name} (it is {value!r})" for name, value in own.items() if value != usual[name])
        raise UserError(
            f"model.path: {repository!r} is not a local folder, and it could not be downloaded from the hub ({said(error)}). Check the "
            f"name, the network{changed} and, for gated models, `hf auth login`"
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
    except (ValueError, RecursionError) as error:
        raise UserError(f"model.path: {path} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"model.path: {path} is not a JSON object; download it again")
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


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, which appears when it is complete, and which everybody may read whom the umask permits.

    Args:
        path: its folder is created if it is missing.
        tensors: by name, on any device.
        metadata: for the header.
    """
    from safetensors.torch import save_file

    with renamed_at_end(path) as temporary:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
        permit_reading(temporary)


def adapter_files(folder: Path) -> list[Path]:
    """The adapters in a folder that `scfm export` has written, by name."""
    return sorted(folder.glob("scfm_*.safetensors"))


def adapter_metadata(path: Path) -> dict[str, Any]:
    """What an adapter's header says about it (`recipes.header`).

    Raises:
        UserError: if `path` is no adapter of `scfm export`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})["scfm"])
        if not isinstance(found, dict):
            raise ValueError("its settings are not a JSON object")
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not an adapter that `scfm export` has written") from error
    return found


def save_pipeline(
    source: Path,
    target: Path,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shift: float | None,
    *,
    has_learned_guidance: bool = False,
    shard_bytes: int = 5 * 10**9,
    describe: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a complete pipeline folder: `source` with other weights of the transformer.

    The other components are copied, so `target` does not need `source`; see `_copy_components`. `target` appears only when it is
    complete. Its configurations do not name folders of this machine.

    Args:
        source: a pipeline's folder.
        target: the new folder.
        weights: every weight by name. They are read one by one and written in files of `shard_bytes`, as diffusers
            does, so at most one such file is in memory.
        dtype: of the written weights.
        shift: the sampler's fixed timestep shift; None keeps the scheduler of `source`.
        has_learned_guidance: mark the model as guided by one pass; a marked `source` stays marked.
        shard_bytes: largest size of a weight file.
        describe: writes more files, as the card, into the new folder before it appears.

    Raises:
        UserError: if `target` exists.
    """
    if target.exists():
        raise UserError(f"{target} exists already; choose another folder, or delete it")
    with renamed_at_end(target) as temporary:
        _write_pipeline(source, temporary, weights, dtype, shift, has_learned_guidance, shard_bytes)
        describe(temporary)
        for path in (*temporary.glob("*.json"), *temporary.glob("*/*config.json")):
            _edit_json(path, {})
        permit_reading(temporary)


def _write_pipeline(
    source: Path,
    temporary: Path,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shift: float | None,
    has_learned_guidance: bool,
    shard_bytes: int,
) -> None:
    """Components, weights and scheduler of `save_pipeline`."""
    _copy_components(source, temporary)
    (temporary / "transformer").mkdir()
    shutil.copy(source / "transformer" / "config.json", temporary / "transformer" / "config.json")
    _save_sharded(temporary / "transformer", ((name, weight.to(dtype)) for name, weight in weights), shard_bytes)
    if shift is not None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        shutil.rmtree(temporary / "scheduler")
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)
        scheduler.save_pretrained(temporary / "scheduler")
        _edit_json(temporary / "model_index.json", {"scheduler": ["diffusers", type(scheduler).__name__]})
    if has_learned_guidance:
        (temporary / GUIDANCE_MARK).write_text(
            "Guidance was distilled into these weights: sample with one pass a step, without guidance (guidance_scale=1; 0 for models\n"
            "whose scale counts from the conditional velocity).\n",
            encoding="utf-8",
        )


def _copy_components(source: Path, target: Path) -> None:
    """Copy what a pipeline consists of: `model_index.json`, its components but the transformer, the mark of guidance, licences.

    Of a component: configurations, tokenizer, and the weights that are loaded without a variant. Nothing else that is in the folder,
    such as notes, checkpoints of a training and other formats of the weights: the copy may be published.
    """
    target.mkdir()
    for path in source.iterdir():
        if path.name in ("model_index.json", GUIDANCE_MARK) or (path.is_file() and _LICENCE.match(path.name)):
            shutil.copy(path, target)
    index = component_config(source, ".", "model_index.json")
    for name, component in index.items():
        if isinstance(component, list) and name != "transformer" and (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=_unneeded)


def _unneeded(folder: str, names: list[str]) -> list[str]:
    """The entries of a component's folder that are not copied; `shutil.copytree` calls it."""
    return [name for name in names if not _OF_A_COMPONENT.fullmatch(name)]


def _edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Change a configuration, and remove the places that it was loaded from."""
    config = json.loads(path.read_text(encoding="utf-8"))
    new = {**_without_places(config), **changes}
    if new != config:
        path.write_text(json.dumps(new, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the keys in which transformers and diffusers write where a component was loaded from."""

    def is_place(key: str, value: Any) -> bool:
        if not isinstance(value, str):
            return False
        return key.endswith("name_or_path") or bool(re.search("_(file|path|dir)$", key) and _LOCAL_PATH.match(value))

    return {
        key: _without_places(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not is_place(key, value)
    }


def _save_sharded(folder: Path, weights: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write one safetensors file, or several files and their index, with diffusers' names."""
    stem = "diffusion_pytorch_model"
    shards: list[tuple[Path, dict[str, int]]] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        path = folder / f"shard_{len(shards)}"
        save_tensors(path, pending)
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
