"""Prompts from the configuration, a text file, JSON lines, or captions in COCO's format."""

import json
import re
from pathlib import Path
from typing import Any

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
    """The prompts of `read_records`."""
    return [record["prompt"] for record in read_records(source, where)]


def read_records(source: str | tuple[str, ...], where: str) -> list[dict[str, Any]]:
    """Prompts with whatever else a file tells about them: objects with the key `prompt`.

    From a list, from the lines of a text file, from the objects of a file `.jsonl`, or from a JSON file in COCO's format: the first caption
    of each image (https://cocodataset.org/#format-data).

    Args:
        source: the prompts; or a string, which is a file's path, or one prompt if it does not look like a path.
        where: the setting or option that has `source`, for messages.

    Raises:
        UserError: if the file is missing, is empty, or has another format.
    """
    if not isinstance(source, str):
        return [{"prompt": prompt} for prompt in source]
    path = Path(source).expanduser()
    if not _is_path(source):
        return [{"prompt": source.strip()}]
    try:
        content = decode_text(path.read_bytes(), f"the prompt file {source!r}")
        records = _parse(content, path.suffix)
        for record in records:
            check_text(record["prompt"], f"a prompt of {source!r}")
    except BadData as error:
        raise UserError(f"{where}: {str(error).removeprefix('data: ')}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        expected = _FORMATS.get(path.suffix, "a text file in UTF-8")
        raise UserError(f"{where}: the prompt file {source!r} is not {expected} ({error})") from error
    except OSError as error:
        raise UserError(
            f"{where}: the prompt file {source!r} cannot be read ({error.strerror}). Give a text file with one prompt on each "
            f"line. A prompt itself has no file ending"
        ) from error
    if not records:
        raise UserError(f"{where}: the prompt file {source!r} has no prompt; put one on each line")
    return records


_FORMATS = {
    ".json": 'JSON of COCO\'s format, {"annotations": [{"image_id": ..., "caption": ...}]}',
    ".jsonl": 'JSON lines, {"prompt": ..., ...}',
}


def _parse(content: str, suffix: str) -> list[dict[str, Any]]:
    # `splitlines` would cut at form feeds and at U+2028 too.
    lines = _coco_captions(content) if suffix == ".json" else content.replace("\r", "\n").split("\n")
    if suffix != ".jsonl":
        return [{"prompt": line.strip()} for line in lines if line.strip()]
    objects = [json.loads(line) for line in lines if line.strip()]
    return [{**record, "prompt": record["prompt"].strip()} for record in objects]


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
