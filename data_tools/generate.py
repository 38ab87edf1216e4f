"""`scfm data generate`: prompts -> the teacher's own samples, as shards of cached latents and text embeddings."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_tools.encode import CacheWriter, EncodeConfig
from data_tools.job import Job, Piece, cut
from scfm_core.data.schema import Manifest, Size
from scfm_core.data.webdataset import TarWriter
from scfm_core.errors import UserError
from scfm_core.flow.random import sample_noise
from scfm_core.flow.sampler import euler_sample, roll_out
from scfm_core.flow.schedule import dynamic_shift, sigma_grid
from scfm_core.models.encoders import TextEncoders
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.weights import network_fingerprint

# Out of reach of a run's sample ids: a run of the same seed must not draw the very noise that its latents came from.
FIRST_ID = 1 << 62


def generate(
    prompts: list[str],
    output: Path,
    family: ModelFamily,
    config: EncodeConfig,
    *,
    sizes: tuple[Size, ...],
    per_prompt: int,
    num_steps: int,
    shift: float | Literal["dynamic"],
    guidance: float,
    seed: int,
    intervals: int | None = None,
    second_order: bool = False,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> tuple[Manifest | None, float | None]:
    """Sample the teacher straight to latents, which nothing decodes.

    Sample i is of prompt i // per_prompt and of size i % len(sizes), and starts from noise that is a function of the
    seed, i and the size alone: any number of processes and any batch size give the same samples, up to floating point.
    Each shard holds one size. The network and both text encoders lie on the device together; the VAE is not loaded.

    Args:
        prompts: what is sampled.
        output: folder of the shards.
        family: the model.
        config: how; its dtype and device are the network's too, and its batch size counts samples.
        sizes: heights and widths in pixels, taken in turn.
        per_prompt: samples of each prompt.
        num_steps: steps of the sampler.
        shift: the timestep shift; `dynamic`: Flux's, by the size.
        guidance: embedded, or the scale of classifier-free guidance; without effect on a network that knows neither.
        seed: of the noise.
        intervals: store the paths too, in so many intervals of equal numbers of steps: mean velocities, sigmas, guidance.
        second_order: of paths: by the Adams-Bashforth method instead of Euler's.
        rank, world_size: this process, of how many that share the work.
        progress: wraps the shards to show a bar; called with (shards, their number).

    Returns:
        the manifest written beside the shards (None while other processes are at work), and the error of the padding.

    Raises:
        UserError: for arguments that make no sample, a sample that is not finite, or an output that is not writable or
            holds something else.
    """
    _check(prompts, family, sizes, per_prompt, num_steps, shift, intervals)
    parameters = {
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "sizes": sizes,
        "per_prompt": per_prompt,
        "num_steps": num_steps,
        "shift": shift,
        "guidance": guidance,
        "seed": seed,
        **({"intervals": intervals, "second_order": second_order} if intervals is not None else {}),
        "network": network_fingerprint(family.folder),
        **config.parameters(family),
    }
    job = Job(output, parameters)  # before the weights are loaded, which takes minutes
    if job.finished is not None:
        return job.finished, None
    writer = CacheWriter(output, family, config)
    network = family.load_network(config.dtype, config.device)
    teacher = _Teacher(family, network, writer.text, num_steps, shift, guidance, seed, intervals, second_order)

    def write(piece: Piece, tar: TarWriter) -> list[str]:
        size = sizes[piece.items[0] % len(sizes)]
        for at in range(0, len(piece.items), config.batch_size):
            items = piece.items[at : at + config.batch_size]
            numbers = [item // per_prompt for item in items]
            texts = [prompts[number] for number in numbers]
            latents, path = teacher.sample(items, texts, size)
            latents = latents.to(config.dtype)
            _refuse_not_finite(latents, items, texts)
            details = [
                teacher.details(item, size) | {"prompt": number} for item, number in zip(items, numbers, strict=True)
            ]
            for item, fields in zip(items, writer.fields(latents, texts, details, path), strict=True):
                tar.write(f"{item:08d}", fields, size)
        return []

    total = len(prompts) * per_prompt
    pieces = cut([range(first, total, len(sizes)) for first in range(len(sizes))], config.samples_per_shard)
    draft = writer.draft if intervals is None else replace(writer.draft, network=str(parameters["network"]))
    manifest = job.run(pieces, write, draft, rank=rank, world_size=world_size, progress=progress)
    return manifest, writer.padding_error


@dataclass(frozen=True)
class _Teacher:
    """The network with its text encoders, and how it is sampled."""

    family: ModelFamily
    network: nn.Module
    text: TextEncoders
    num_steps: int
    shift: float | Literal["dynamic"]
    guidance: float
    seed: int
    intervals: int | None
    second_order: bool

    def sample(self, items: Sequence[int], texts: list[str], size: Size) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The latents of samples `items`, fp32 [B, C, h, w], and their paths if they are to be stored."""
        cond = self.text.encode(texts, guidance=self.guidance)
        ids = torch.tensor(items, dtype=torch.int64) + FIRST_ID
        like = torch.empty(len(items), *self.family.latent_shape(*size), device=cond.text.device)
        shift = dynamic_shift(self.family.image_tokens(like)) if self.shift == "dynamic" else self.shift
        noise, sigmas = sample_noise(like, ids, self.seed), sigma_grid(self.num_steps, shift)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return self.family.velocity(self.network, x, sigma, cond)

        if self.intervals is None:
            return euler_sample(velocity, noise, sigmas), None
        latents, velocities = roll_out(
            velocity, noise, sigmas, intervals=self.intervals, second_order=self.second_order
        )
        rows = len(items)
        return latents, {
            "velocities": velocities.to(cond.text.dtype),
            "sigmas": sigmas[:: self.num_steps // self.intervals].expand(rows, -1),
            "guidance": torch.full((rows,), self.guidance),
        }

    def details(self, item: int, size: Size) -> dict[str, object]:
        """What is stored of how a sample was made."""
        solver = "adams-bashforth" if self.intervals is not None and self.second_order else "euler"
        place = {"height": size[0], "width": size[1], "sample": item, "seed": self.seed}
        return place | {"steps": self.num_steps, "solver": solver, "guidance": self.guidance}


def _check(
    prompts: list[str],
    family: ModelFamily,
    sizes: tuple[Size, ...],
    per_prompt: int,
    num_steps: int,
    shift: float | str,
    intervals: int | None,
) -> None:
    if not prompts:
        raise UserError("there are no prompts to sample from; give at least one")
    for name, value in (("sizes", len(sizes)), ("samples a prompt", per_prompt), ("steps", num_steps)):
        if value < 1:
            raise UserError(f"the number of {name} must be at least 1, got {value}")
    if intervals is not None and (intervals < 1 or num_steps % intervals):
        raise UserError(
            f"the {num_steps} steps of a path cannot be stored as {intervals} intervals: their number must be positive and "
            f"divide that of the steps"
        )
    if shift != "dynamic" and not (isinstance(shift, int | float) and 0 < shift < math.inf):
        raise UserError(f"the shift must be positive and finite, or 'dynamic', got {shift!r}")
    for size in sizes:
        family.latent_shape(*size)


def _refuse_not_finite(latents: Tensor, items: Sequence[int], texts: list[str]) -> None:
    finite = latents.isfinite().flatten(1).all(1).tolist()
    bad = [place for place, good in enumerate(finite) if not good]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(items)} samples of a batch are not finite in {latents.dtype}, the first is sample "
            f"{items[bad[0]]}, of the prompt {texts[bad[0]]!r}. Check the model's weights and the guidance, or compute in "
            f"another dtype, into another folder"
        )
