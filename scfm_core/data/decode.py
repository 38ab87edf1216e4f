"""From the stored fields of a sample to a record: images, captions, cached tensors."""

from dataclasses import replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from scfm_core.data.folder import load_image
from scfm_core.data.order import choose
from scfm_core.data.recipe import SourceConfig
from scfm_core.data.schema import PATH, BadData, Record, Size
from scfm_core.data.source import Shard, json_value

DECODING_ERRORS = (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError)
"""What decoders raise for bytes that are not text, JSON or tensors. RecursionError is a RuntimeError."""


def image_record(shard: Shard, at: int, config: SourceConfig, size: Size, seed: int, sample_id: int) -> Record:
    """A sample of images.

    Args:
        shard: that holds it.
        at: its place in the shard.
        config: of the source: the names of the fields.
        size: height and width of the result, in pixels.
        seed, sample_id: choose one of several captions.

    Raises:
        BadData: if the image or the caption is missing or cannot be decoded.
    """
    content = next((found for name in config.image if (found := shard.read(at, name)) is not None), None)
    key = shard.key(at)
    if content is None:
        raise BadData(
            f"data: sample {key!r} of shard {shard.name} has no {' or '.join(config.image)}, but "
            f"{', '.join(shard.fields(at))}. Name the right field with `image:` of the source"
        )
    image = load_image(content, *size, name=f"sample {key!r} of shard {shard.name}")
    return Record(key=key, caption=read_caption(shard, at, config, seed, sample_id), image=image)


def read_caption(shard: Shard, at: int, config: SourceConfig, seed: int, sample_id: int) -> str:
    """The caption of a sample of images; of several captions one, by weight. Arguments as `image_record`.

    Raises:
        BadData: if the sample has no caption, or it cannot be decoded.
    """
    names = list(config.captions)
    if len(names) > 1:
        weights = list(config.captions.values())
        names.insert(0, names.pop(choose(weights, seed, config.name, shard.key(at), sample_id)))
    for name in names:  # the chosen one first; the others for a sample that does not have it
        field, *path = name.split(".")
        content = shard.read(at, field)
        if content is None:
            continue
        try:
            value = json_value(content, path) if path else content.decode()
        except DECODING_ERRORS as error:
            raise BadData(
                f"data: sample {shard.key(at)!r} of shard {shard.name} has a {field} that cannot be decoded ({error!r})"
            ) from error
        if isinstance(value, str):
            return value
    raise BadData(
        f"data: sample {shard.key(at)!r} of shard {shard.name} has no caption in {', '.join(names)}, but the fields "
        f"{', '.join(shard.fields(at))}. Name the right one with `captions:` of the source"
    )


def cached_record(shard: Shard, at: int, source: int, padding: Tensor | None, with_path: bool) -> Record:
    """A cached sample, its text without padding.

    Args:
        shard: that holds it.
        at: its place in the shard.
        source: number of the source, which identifies the padding.
        padding: [L, D], if the texts of the source are trimmed.
        with_path: read the teacher's path too.

    Raises:
        BadData: if a field or tensor is missing.
        DECODING_ERRORS: if a field cannot be decoded.
    """
    content, caption = shard.read(at, "safetensors"), shard.read(at, "txt")
    key = shard.key(at)
    if content is None or caption is None:
        raise BadData(
            f"data: sample {key!r} of shard {shard.name} needs safetensors and txt, but has {', '.join(shard.fields(at))}"
        )
    tensors: dict[str, Tensor] = load(content)
    text = tensors["text"]
    if padding is not None and (len(text) > len(padding) or text.shape[1:] != padding.shape[1:]):
        raise ValueError(f"its text of {tuple(text.shape)} does not fit the padding of {tuple(padding.shape)}")
    if with_path and (missing := [name for name in PATH if name not in tensors]):
        raise BadData(
            f"data: sample {key!r} of shard {shard.name} has no {' and '.join(missing)}: the teacher's paths are stored by "
            f"`scfm data generate --trajectories`"
        )
    return Record(
        key=key,
        caption=caption.decode(),
        path={name: tensors[name] for name in PATH} if with_path else None,
        latents=tensors["latents"],
        text=text,
        pooled=tensors["pooled"],
        padding=None if padding is None else source,
    )


def pad_text(record: Record, padding: Tensor | None) -> Record:
    """The record with its text padded to the full length, by the padding [L, D]."""
    if padding is None or record.text is None:
        return record
    text = torch.cat([record.text, padding[len(record.text) :].to(record.text.dtype)])
    return replace(record, text=text, padding=None)
