"""What an export says about the model that a run was trained on. It never names a folder of this machine."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from scfm_core.errors import UserError
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.published import PUBLISHED, Published
from scfm_core.models.weights import is_local

NOT_ON_THE_HUB = "none"
_SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/[^/]+/?$")
"""The folder of a model in the hub's cache."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model under an adapter."""

    id: str | None
    """On the hub; None: it is not there, or unknown."""
    name: str
    """For names of files."""
    published: Published
    """The published model of its architecture, which may be another one."""
    license: str | None
    license_name: str | None
    license_link: str | None


def find_base_model(family: ModelFamily, path: str, choice: str | None) -> BaseModel:
    """The base model of a run.

    Args:
        family: of the model, with its folder.
        path: `model.path`.
        choice: `--base`: a hub id, or `none`; None: `path`, if it is a hub id or the hub's cache.

    Raises:
        UserError: if `choice` is neither.
    """
    hub_id = (
        _hub_id(family, path) if choice is None else None if choice == NOT_ON_THE_HUB else checked_id(choice, "--base")
    )
    known = {name: _published(family, name) for name in family.known}
    alike = next((name for name in family.known if _has_architecture_of(family, name)), None)
    module = type(family).__module__.rpartition(".")[2].replace("_", "-")
    published = known[hub_id or ""] if hub_id in known else known[alike or next(iter(known))]
    if hub_id in known:
        name = published.name
    elif hub_id is not None:
        name = re.sub(r"[^a-z0-9.]+", "-", hub_id.partition("/")[2].lower()).strip("-")
    else:
        name = module if alike is None else published.name
    license, license_name, link = _licence_of_card(family.folder)
    if hub_id in known:
        link = f"https://huggingface.co/{hub_id}" if published.license == "other" else None
        license, license_name = published.license, published.license_name
    return BaseModel(
        id=hub_id, name=name, published=published, license=license, license_name=license_name, license_link=link
    )


def checked_id(name: str, option: str) -> str:
    """`name`, if it can be the id of a repository on the hub.

    Raises:
        UserError: if it is not of the form OWNER/NAME.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{option}: {name!r} is not OWNER/NAME: {str(error).splitlines()[0]}") from error
    if name.count("/") != 1:
        raise UserError(f"{option}: {name!r} is not of the form OWNER/NAME")
    return name


def _hub_id(family: ModelFamily, path: str) -> str | None:
    if not is_local(path):
        return path
    found = _SNAPSHOT.search(str(family.folder.resolve()))
    return f"{found['owner']}/{found['name']}" if found else None


def _published(family: ModelFamily, name: str) -> Published:
    module = type(family).__module__.rpartition(".")[2]
    default = Published(name=module.replace("_", "-"), architecture=type(family).__name__, version=module)
    return PUBLISHED.get(name, default)


def _has_architecture_of(family: ModelFamily, name: str) -> bool:
    """Whether the network is that of a known model: a copy of it, or a fine-tune."""
    known = json.loads(
        json.dumps(family.known[name]["transformer"])
    )  # tuples become lists, as in a folder's configuration
    own = json.loads(json.dumps(family.network_config))
    return all(own.get(key) == value for key, value in known.items())


def _licence_of_card(folder: Path) -> tuple[str | None, str | None, str | None]:
    """The licence that the card in a model's folder names; a link only if it is an address."""
    try:
        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return None, None, None
    link = data.license_link if str(data.license_link).startswith("https://") else None
    return data.license if isinstance(data.license, str) else None, data.license_name, link
