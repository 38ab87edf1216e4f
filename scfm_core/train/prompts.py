"""Prompts from the configuration, a text file, or captions in COCO's format."""

import json
import re
from pathlib import Path

from scfm_core.data.schema import BadData
from scfm_core.data.text import check_text, decode_text
from scfm_core.errors import UserError
from scfm_core.train.config import SampleConfig


def validation_prompts(config: SampleConfig) -> list[str]:
    """Prompts of the validation grids; none if the grids are off.

    Raises:
        UserError: if the grids are on, but there is no prompt.
    """
    if not config.every:
        return []
    prompts = read_prompts(config.prompts, "sample.prompts")
    if not prompts:
        raise UserError("sample.every asks for grids, but sample.prompts is empty. Give prompts, or set sample.every=0")
    return prompts


def read_prompts(source: str | tuple[str, ...], where: str) -> list[str]:
    """Prompts from a list, from the lines of a text file, or from a JSON file in COCO's format: the first caption of each image
    (https://cocodataset.org/#format-data).

    Args:
        source: the prompts; or a string, which is a file's path, or one prompt if it does not look like a path.
        where: the setting or option that has `source`, for messages.

    Raises:
        UserError: if the file is missing, is empty, or has another format.
    """
    if not isinstance(source, str):
        return list(source)
    path = Path(source).expanduser()
    if not _is_path(source):
        return [source.strip()]
    try:
        content = decode_text(path.read_bytes(), f"the prompt file {source!r}")
        # Only newlines end a prompt: `splitlines` would cut at form feeds and at U+2028 too.
        lines = _coco_captions(content) if path.suffix == ".json" else content.replace("\r", "\n").split("\n")
        prompts = [check_text(line.strip(), f"a prompt of {source!r}") for line in lines if line.strip()]
    except BadData as error:
        raise UserError(f"{where}: {str(error).removeprefix('data: ')}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = 'JSON of COCO\'s format, {"annotations": [{"image_id": ..., "caption": ...}]}'
        expected = kind if path.suffix == ".json" else "a text file in UTF-8"
        raise UserError(f"{where}: the prompt file {source!r} is not {expected} ({error})") from error
    except OSError as error:
        raise UserError(
            f"{where}: the prompt file {source!r} cannot be read ({error.strerror}). Give a text file with one prompt on each "
            f"line. A prompt itself has no file ending"
        ) from error
    if not prompts:
        raise UserError(f"{where}: the prompt file {source!r} has no prompt; put one on each line")
    return prompts


def _is_path(source: str) -> bool:
    """Whether a string names a file: one that exists, or that has the ending of a text file, or one word with a dot or slash."""
    if not source.strip() or re.search(r"\.(txt|jsonl?|csv|tsv|md|ya?ml)$", source):
        return True
    try:
        return Path(source).expanduser().exists() or (" " not in source and bool(re.search(r"[./]", source)))
    except OSError:  # a prompt may be longer than the name of a file can be
        return False


def _coco_captions(content: str) -> list[str]:
    """For each image, in the order of image ids, its caption with the lowest id."""
    first: dict[int, tuple[int, str]] = {}
    for row in json.loads(content)["annotations"]:
        candidate = (row.get("id", 0), row["caption"])
        first[row["image_id"]] = min(first.get(row["image_id"], candidate), candidate)
    return [caption for _, (_, caption) in sorted(first.items())]
