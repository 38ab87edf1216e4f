"""`scfm data encode`: a folder of images with captions -> shards of cached latents and text embeddings."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from scfm_core.data.folder import ImageFolder
from scfm_core.data.schema import MANIFEST, Manifest, Record
from scfm_core.data.webdataset import ShardWriter
from scfm_core.errors import UserError
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.flux import Flux
from scfm_core.models.weights import encoder_fingerprint


def encode_folder(
    images: Path,
    output: Path,
    family: Flux,
    *,
    resolution: tuple[int, int],
    text_length: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    samples_per_shard: int = 1000,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> Manifest:
    """Encode every image and caption once.

    Args:
        images: folder with captions, see `ImageFolder`.
        output: folder of the shards; must not hold a finished cache.
        family: the model whose VAE, CLIP and T5 encode.
        resolution: height and width in pixels.
        text_length: T5 tokens.
        dtype: of the encoders and the stored tensors.
        progress: wraps the batches to show a bar; called with (batches, their number).

    Returns:
        the manifest written beside the shards.

    Raises:
        UserError: for a bad folder, caption, image or resolution, or an output that is not writable or holds a finished cache.
    """
    _refuse_impossible(batch_size, samples_per_shard, text_length)
    family.latent_shape(*resolution)
    if (output / MANIFEST).exists():
        raise UserError(f"{output} already holds a finished cache; choose another folder, or delete it")
    dataset = ImageFolder(images, *resolution)
    try:
        output.mkdir(parents=True, exist_ok=True)  # before the encoders are loaded, which takes minutes
    except OSError as error:
        raise UserError(
            f"the cache could not be written to {output}: {error.strerror}. Choose another folder"
        ) from error
    text = TextEncoders(family.folder, text_length, dtype, device)
    vae = Autoencoder(family.folder, dtype, device)
    manifest = Manifest(
        encoder=encoder_fingerprint(family.folder), text_length=text_length, resolution=resolution, samples=0, shards=()
    )
    starts = range(0, len(dataset), batch_size)
    try:
        with ShardWriter(output, manifest, samples_per_shard) as writer:
            for start in progress(starts, len(starts)):
                records = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
                details = {"height": resolution[0], "width": resolution[1]}
                for number, cached in enumerate(_encode(records, vae, text, dtype), start):
                    # The key is a number, never the file's name: it may hold no dot or slash.
                    cached.key, source = f"{number:08d}", cached.key
                    writer.write(cached, {**details, "source": source})
    except OSError as error:
        raise UserError(
            f"the cache could not be written to {output}: {error.strerror or error}. Mend that and run again"
        ) from error
    return Manifest.read(output)


def _refuse_impossible(batch_size: int, samples_per_shard: int, text_length: int) -> None:
    if min(batch_size, samples_per_shard) < 1 or not 1 <= text_length <= 512:
        raise UserError(
            f"batch size and samples per shard must be at least 1 and the text length in 1..512, got {batch_size}, "
            f"{samples_per_shard} and {text_length}"
        )


def _encode(records: list[Record], vae: Autoencoder, text: TextEncoders, dtype: torch.dtype) -> Iterator[Record]:
    """The same records with latents and embeddings in place of images."""
    latents = vae.encode(torch.stack([record.image for record in records if record.image is not None]))
    cond = text.encode([record.caption for record in records])
    for row, record in enumerate(records):
        yield Record(
            key=record.key,
            caption=record.caption,
            latents=latents[row].to(dtype),
            text=cond.text[row].to(dtype),
            pooled=cond.pooled[row].to(dtype),
        )
