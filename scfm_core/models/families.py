"""Finding the family of a model, from the files in its folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scfm_core.errors import UserError
from scfm_core.models.chroma import Chroma
from scfm_core.models.flux import Flux
from scfm_core.models.flux2 import Flux2
from scfm_core.models.fused_base import FusedAdapter
from scfm_core.models.krea2 import Krea2
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.qwen_image import QwenImage
from scfm_core.models.sana import Sana
from scfm_core.models.sd3 import SD3
from scfm_core.models.weights import is_local, resolve_folder
from scfm_core.models.z_image import ZImage

FAMILIES: tuple[type[ModelFamily], ...] = (Flux, Flux2, SD3, QwenImage, ZImage, Krea2, Sana, Chroma)


def open_family(path: str, *, offline: bool = False, adapters: Sequence[FusedAdapter] = ()) -> ModelFamily:
    """The family of a hub id or of a local folder in diffusers' format.

    Args:
        path: hub id or folder.
        offline: do not access the network. Of a hub id only the architecture is then available, for a dry run.
        adapters: fused into the pre-trained weights.

    Raises:
        UserError: if there is no such model, if its family is unknown, or if an adapter does not fit it.
    """
    family = _find_family(path, offline=offline)
    family.adapters = tuple(adapters)
    if adapters:
        family.changes(family.meta_network())  # a mistake is found before the weights are read
    return family


def family_of_pipeline(pipe: Any) -> ModelFamily:
    """The family of a pipeline of diffusers that is in memory, without files: its shapes, its shift, and how it is called.

    Raises:
        UserError: if its family is unknown.
    """
    name = getattr(type(pipe), "__name__", "")
    for family in FAMILIES:
        if name in family.pipelines:
            architecture = {
                "pipeline": name,
                "transformer": dict(pipe.transformer.config),
                "vae": dict(pipe.vae.config),
                # `with_steps` sets another one for each call.
                "scheduler": dict(getattr(pipe, "_scfm_scheduler", pipe.scheduler).config),
                "encoder_bytes": 0,
            }
            found = family(Path(str(pipe.config.get("_name_or_path", name))), architecture)
            found.pipeline_config = dict(pipe.config)
            return found
    raise UserError(
        f"scfm does not know the pipeline {name}; it supports {', '.join(name for family in FAMILIES for name in family.pipelines)}"
    )


def _find_family(path: str, *, offline: bool) -> ModelFamily:
    if offline and not is_local(path):
        for family in FAMILIES:
            if path in family.known:
                return family(Path(path), family.known[path])
        known = ", ".join(name for family in FAMILIES for name in family.known)
        raise UserError(
            f"model.path {path!r} is not a local folder, and without the network only these architectures are known: {known}. "
            f"Download the model first, or give a local folder"
        )
    folder = resolve_folder(path)
    try:
        found = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"model.path: {folder / 'model_index.json'} is not in diffusers' format ({error}); download it again"
        ) from error
    for family in FAMILIES:
        if found in family.pipelines:
            return family(folder)
    raise UserError(
        f"model.path: {folder} holds a {found}; scfm supports {', '.join(name for family in FAMILIES for name in family.pipelines)}"
    )
