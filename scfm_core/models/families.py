"""Which family a model is of: its own files say."""

import json
from pathlib import Path

from scfm_core.errors import UserError
from scfm_core.models.flux import Flux
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.sd3 import SD3
from scfm_core.models.weights import is_local, resolve_folder

FAMILIES: tuple[type[ModelFamily], ...] = (Flux, SD3)


def open_family(path: str, *, offline: bool = False) -> ModelFamily:
    """The family of a hub id or of a local folder in diffusers' format.

    Args:
        path: hub id or folder.
        offline: do not touch the network; a hub id is then good for its architecture alone (dry run).

    Raises:
        UserError: if there is no such model, or it is of no known family.
    """
    if offline and not is_local(path):
        for family in FAMILIES:
            if path in family.known:
                return family(Path(path), family.known[path])
        known = ", ".join(name for family in FAMILIES for name in family.known)
        raise UserError(
            f"model.path {path!r} is not a local folder, and a dry run of a hub id knows these architectures alone: {known}. "
            f"Download the model first, or give a local folder"
        )
    folder = resolve_folder(path)
    try:
        found = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model.path: {folder / 'model_index.json'} is not diffusers' ({error}); fetch it again"
        ) from error
    for family in FAMILIES:
        if found == family.pipeline:
            return family(folder)
    raise UserError(
        f"model.path: {folder} holds a {found}; scfm knows {' and '.join(family.pipeline for family in FAMILIES)}"
    )
