"""Upload an export to the hub."""

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from scfm_core.errors import UserError
from scfm_core.secrets import said, scrub

_REASONS = {
    401: "the token is not valid; log in again with `hf auth login`",
    403: "the token has no right to write there; make one with write access, for an organisation with rights to its repositories",
    404: "there is no such user or organisation, or the token cannot see it",
    409: "another upload changed the repository at the same time; run the same command again",
    413: "a file is larger than the hub permits",
}


def check_access(repository: str) -> None:
    """UserError if there is no token, or the hub does not accept it: before the work, and not after it."""
    if get_token() is None:
        raise UserError(
            f"--push {repository}: there is no token of the hub. Log in with `hf auth login`, or set HF_TOKEN"
        )
    with _explained(repository, "nothing is written yet"):
        HfApi().whoami()


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Create the repository if it is missing, and upload the card and what it names.

    Args:
        folder: of the export.
        repository: OWNER/NAME.
        private: of a new repository; an existing one keeps its visibility. False: the default of its owner.

    Returns:
        the repository's address.

    Raises:
        UserError: if the hub cannot be reached, or refuses.
    """
    api = HfApi()
    with _explained(repository, "the files are on this machine"):
        address = api.create_repo(repository, private=private or None, exist_ok=True, repo_type="model")
        patterns = [glob.escape(name) for name in _files(folder)] or ["*"]
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=patterns, commit_message="Upload with scfm"
        )
    return str(address)


def _files(folder: Path) -> list[str]:
    """Of a pipeline all files: none is named. Of an adapter those that its card names: others may be of earlier weights."""
    if (folder / "model_index.json").is_file():
        return []
    card = (folder / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w.\-/]+", card))
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return ["README.md", *(name for name in names if "." in name and name in named and name != "README.md")]


@contextmanager
def _explained(repository: str, state: str) -> Iterator[None]:
    """Errors of the hub as UserErrors that end with `state`. huggingface_hub, requests and hf_xet raise dozens of types."""
    try:
        yield
    except Exception as error:
        raise UserError(f"--push {repository}: {_reason(error)}; {state}") from error


def _reason(error: Exception) -> str:
    """What happened, and what to do."""
    wrong_address = requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema
    if isinstance(error, (*wrong_address, requests.JSONDecodeError)) or _status(error, "/whoami") == 404:
        return (
            f"HF_ENDPOINT is {scrub(constants.ENDPOINT)!r}, which is not the address of a hub ({said(error)}). Unset it, or give one such as "
            f"https://huggingface.co"
        )
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token of the hub. Log in with `hf auth login`"
    if isinstance(error, requests.HTTPError):  # those of huggingface_hub are of this kind
        return f"the hub answered {_status(error)}: {_REASONS.get(_status(error)) or said(error)}"
    if isinstance(error, requests.ConnectionError | requests.Timeout | OfflineModeIsEnabled):
        return f"the hub cannot be reached ({said(error)}). Check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    return f"the upload failed ({said(error)}). Run the same command again"


def _status(error: Exception, part: str = "") -> int:
    """Of the hub's answer to a request whose address has `part`; 0 if there is none."""
    response = error.response if isinstance(error, requests.HTTPError) else None
    return 0 if response is None or part not in response.url else response.status_code
