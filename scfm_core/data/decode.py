"""From the stored fields of a sample to a record: images, captions, cached tensors."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from scfm_core.data.fields import FieldKind
from scfm_core.data.image import load_picture
from scfm_core.data.order import choose
from scfm_core.data.recipe import SourceConfig
from scfm_core.data.schema import PATH, BadData, Record, Size
from scfm_core.data.source import Shard, json_value
from scfm_core.data.text import check_size, check_text, decode_text

DECODING_ERRORS = (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError)
"""What decoders raise for bytes that are not text, JSON or tensors. RecursionError is a RuntimeError."""


def image_record(
    shard: Shard, at: int, config: SourceConfig, size: Size, seed: int, sample_id: int, background: str
) -> Record:
    """A sample of images.

    Args:
        shard: that holds it.
        at: its place in the shard.
        config: of the source: the names of the fields.
        size: height and width of the result, in pixels.
        seed, sample_id: choose one of several captions.
        background: behind a transparent image.

    Raises:
        BadData: if the image or the caption is missing or cannot be decoded.
    """
    content = image_content(shard, at, config)
    picture = load_picture(content, *size, name=_where(shard, at), background=background)
    caption = read_caption(shard, at, config, seed, sample_id)
    return Record(key=shard.key(at), caption=caption, image=picture.pixels, notes=picture.notes)


def image_content(shard: Shard, at: int, config: SourceConfig) -> bytes:
    """The image file of a sample; BadData if it has none."""
    content = next((found for name in config.image if (found := shard.read(at, name)) is not None), None)
    if content is None:
        raise BadData(f"data: {_where(shard, at)} {no_image(shard.fields(at), config)}")
    return content


def no_image(fields: list[str], config: SourceConfig) -> str:
    """What to say of a sample whose fields have no image, after its name."""
    dotted = [name for name in fields if name.rpartition(".")[2] in config.image]
    advice = "Name the right field with `image:` of the source"
    if dotted:
        advice = "In tars a field begins after the first dot of a file's name: pack names without other dots"
    return f"has no {' or '.join(config.image)}, but {', '.join(fields)}. {advice}"


def _where(shard: Shard, at: int) -> str:
    return f"sample {shard.key(at)!r} of shard {shard.name}"


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
        caption = caption_of(shard, at, name)
        if caption is not None:
            return caption
    raise BadData(
        f"data: {_where(shard, at)} has no caption in {', '.join(names)}, but the fields {', '.join(shard.fields(at))}. Name the "
        f"right one with `captions:` of the source"
    )


def caption_of(shard: Shard, at: int, name: str) -> str | None:
    """The caption `name` of a sample: a field, or `FIELD.KEY` of a JSON field; None if the sample has no such text.

    Raises:
        BadData: if it cannot be decoded.
    """
    path: list[str] = []
    content, where = shard.read(at, name), f"the caption {name} of {_where(shard, at)}"
    if content is None:
        field, *path = name.split(".")
        content = shard.read(at, field)
    if content is None:
        return None
    check_size(len(content), where)
    text = decode_text(content, where)
    if not path:
        return text
    try:
        value = json_value(text, path)
    except DECODING_ERRORS as error:
        raise BadData(f"data: {where} is not in JSON ({error!r})") from error
    return check_text(value, where) if isinstance(value, str) else None


def cached_record(
    shard: Shard,
    at: int,
    source: int,
    kinds: Mapping[str, FieldKind],
    text_length: int | None,
    padding: Mapping[str, Tensor] | None,
    with_path: bool,
) -> Record:
    """A cached sample, its fields of tokens without padding.

    Args:
        shard: that holds it.
        at: its place in the shard.
        source: number of the source, which identifies the padding.
        kinds: of the source's fields, by name.
        text_length: L of the fields of tokens.
        padding: [L, ...] of each field of tokens, if those of the source are trimmed.
        with_path: read the teacher's path too.

    Raises:
        BadData: if a file or tensor is missing, or tokens have another length.
        DECODING_ERRORS: if one cannot be decoded.
    """
    content, caption = shard.read(at, "safetensors"), shard.read(at, "txt")
    key = shard.key(at)
    if content is None or caption is None:
        raise BadData(
            f"data: sample {key!r} of shard {shard.name} needs safetensors and txt, but has {', '.join(shard.fields(at))}"
        )
    check_size(len(caption), f"the caption of sample {key!r} of shard {shard.name}")
    tensors: dict[str, Tensor] = load(content)
    if missing := [name for name in ("latents", *kinds) if name not in tensors]:
        raise BadData(
            f"data: sample {key!r} of shard {shard.name} has no {' and no '.join(missing)}, but {', '.join(sorted(tensors))}. Encode it again"
        )
    if with_path and (missing := [name for name in PATH if name not in tensors]):
        raise BadData(
            f"data: sample {key!r} of shard {shard.name} has no {' and '.join(missing)}: the teacher's paths are stored by "
            f"`scfm data generate --trajectories`"
        )
    fields = {name: tensors[name] for name in kinds}
    for name in (name for name, kind in kinds.items() if kind == "tokens"):
        whole = fields[name] if padding is None else padding[name]
        if whole.shape[:1] != (text_length,):
            raise BadData(
                f"data: sample {key!r} of shard {shard.name} has {name} of the shape {list(whole.shape)}, not [{text_length}, ...]. "
                f"Encode it again"
            )
    _check_fields(fields, kinds, padding)
    return Record(
        key=key,
        caption=decode_text(caption, f"the caption of sample {key!r} of shard {shard.name}"),
        path={name: tensors[name] for name in PATH} if with_path else None,
        latents=tensors["latents"],
        fields=fields,
        kinds=kinds,
        padding=None if padding is None else source,
    )


def _check_fields(
    fields: Mapping[str, Tensor], kinds: Mapping[str, FieldKind], padding: Mapping[str, Tensor] | None
) -> None:
    """ValueError if tokens do not fit their padding, or masked fields differ in their length."""
    for name, whole in (padding or {}).items():
        own = fields[name]
        if len(own) > len(whole) or own.shape[1:] != whole.shape[1:]:
            raise ValueError(f"its {name} of {tuple(own.shape)} does not fit the padding of {tuple(whole.shape)}")
    lengths = {name: len(fields[name]) for name, kind in kinds.items() if kind == "masked"}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"its masked fields have different numbers of tokens: {lengths}")


def pad_tokens(record: Record, padding: Mapping[str, Tensor] | None) -> Record:
    """The record with its fields of tokens padded to the full length, by the padding [L, ...] of each."""
    if padding is None:
        return record
    padded = {}
    for name, whole in padding.items():
        own = record.fields[name]
        padded[name] = torch.cat([own, whole[len(own) :].to(own.dtype)])
    return replace(record, fields=record.fields | padded, padding=None)
