"""`scfm data generate`: prompts -> samples of the teacher, as shards of cached latents and text embeddings."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from data_tools.encode import CUT, CacheWriter, EncodeConfig, Encoded
from data_tools.job import Job, Made, Progress, plan_shards
from scfm_core.data.schema import Size
from scfm_core.errors import UserError
from scfm_core.flow.random import sample_noise
from scfm_core.flow.sampler import euler_sample, roll_out
from scfm_core.flow.schedule import sigma_grid
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.protocol import ModelFamily, dtype_of
from scfm_core.models.quantised import Base

# Larger than all sample ids of a run: a run with the same seed must not draw the noise from which its latents were
# sampled.
FIRST_ID = 1 << 62


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Which samples are made, and how.

    Raises:
        UserError: if a value is invalid.
    """

    sizes: tuple[Size, ...]
    """Heights and widths in pixels, taken in turn."""
    per_prompt: int
    """Number of samples of each prompt."""
    num_steps: int
    """Steps of the sampler."""
    shift: float | Literal["dynamic"]
    """Of the timesteps; `dynamic`: the family's shift, which depends on the size."""
    guidance: float
    """Guidance embedding, or scale of classifier-free guidance. No effect if the network has neither."""
    seed: int
    """Of the noise."""
    intervals: int | None = None
    """Store the teacher's paths too (mean velocities, sigmas, guidance), in this number of intervals of equally many
    steps."""
    second_order: bool = False
    """Of stored paths: use the Adams-Bashforth method instead of Euler's."""
    base: Base = "bfloat16"
    """How the network's blocks are stored."""

    def __post_init__(self) -> None:
        counts = (("sizes", len(self.sizes)), ("samples of a prompt", self.per_prompt), ("steps", self.num_steps))
        for name, value in counts:
            if value < 1:
                raise UserError(f"the number of {name} must be at least 1, got {value}")
        if self.intervals is not None and (self.intervals < 1 or self.num_steps % self.intervals):
            raise UserError(
                f"the {self.num_steps} steps of a path cannot be stored as {self.intervals} intervals: the number of "
                f"intervals must be positive and divide the number of steps"
            )
        shift = self.shift
        if shift != "dynamic" and not (isinstance(shift, int | float) and 0 < shift < math.inf):
            raise UserError(f"the shift must be positive and finite, or 'dynamic', got {shift!r}")

    def shift_of(self, family: ModelFamily, size: Size) -> float:
        """The timestep shift for images of a size."""
        if self.shift != "dynamic":
            return float(self.shift)
        like = torch.empty(1, *family.latent_shape(*size), device="meta")
        return family.shift(family.image_tokens(like), self.num_steps)

    def parameters(self, family: ModelFamily) -> dict[str, object]:
        """Everything here that determines the samples, for `Job`. A dynamic shift depends on the model's scheduler, which has no hash."""
        names = ["sizes", "per_prompt", "num_steps", "shift", "guidance", "seed"]
        if self.intervals is not None:
            names += ["intervals", "second_order"]
        if self.base != "bfloat16":
            names.append("base")
        own = {"shift": [self.shift_of(family, size) for size in self.sizes]} if self.shift == "dynamic" else {}
        return {name: getattr(self, name) for name in names} | own


def generate(
    prompts: list[str],
    output: Path,
    family: ModelFamily,
    config: EncodeConfig,
    sampler: SamplerConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress = lambda items, total: items,
) -> Encoded:
    """Sample the teacher, and store the latents without decoding them.

    Sample i is of prompt i // per_prompt and of size i % len(sizes). Its noise is a function of the seed, i and the
    size only. So any number of processes and any batch size give the same samples, up to floating point. Each shard has
    one size. The network and the text encoders are on the device together; the VAE is not loaded.

    Args:
        prompts: at least one.
        output: folder of the shards.
        family: the model.
        config: of the cache. Network and encoders use its dtype, device and batch size.
        sampler: which samples are made, and how.
        rank, world_size: of this process; the processes share the shards.
        progress: shows a progress bar; called with (samples, their number), it returns the samples.

    Raises:
        UserError: if there are no prompts, a sample is not finite, or the output cannot be written or has other data.
    """
    if not prompts:
        raise UserError("there are no prompts; give at least one")
    config.check(family)
    for size in sampler.sizes:
        family.latent_shape(*size)
    parameters = {
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        **sampler.parameters(family),
        "network": family.fingerprint,
        **config.parameters(family),
    }
    job = Job(output, parameters)  # before loading the weights, which takes minutes
    if job.finished is not None:
        return Encoded(job.finished, None, job.counts)
    writer = CacheWriter(output, family, config)
    teacher = _Teacher(family, family.load_network(config.dtype, config.device, sampler.base), sampler)

    def make(items: Sequence[int]) -> Made:
        return _make_batch(items, prompts, teacher, writer)

    total, sizes = len(prompts) * sampler.per_prompt, len(sampler.sizes)
    network_of_paths = None if sampler.intervals is None else str(parameters["network"])
    draft = replace(writer.draft, settings=_settings(writer, sampler.sizes), network=network_of_paths)
    shards = plan_shards([range(first, total, sizes) for first in range(sizes)], config.samples_per_shard)
    batch = config.batch_size
    manifest = job.run(shards, make, draft, batch_size=batch, rank=rank, world_size=world_size, progress=progress)
    return Encoded(manifest, writer.padding_error, job.counts)


def _settings(writer: CacheWriter, sizes: Sequence[Size]) -> dict[str, object]:
    """Text length and sizes of a cache, for `Manifest.settings`."""
    largest = max(sizes, key=lambda size: size[0] * size[1])
    buckets = "none" if len(set(sizes)) == 1 else [list(size) for size in dict.fromkeys(sizes)]
    return writer.draft.settings | {"data.resolution": list(largest), "data.buckets": buckets}


@dataclass(frozen=True)
class _Teacher:
    """The network, and the settings of its sampler."""

    family: ModelFamily
    network: nn.Module
    config: SamplerConfig

    def sample(self, items: Sequence[int], cond: Conditioning, size: Size) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The latents of samples `items`, fp32 [B, C, h, w], and their paths (by tensor name) if paths are stored."""
        config, ids = self.config, torch.tensor(items, dtype=torch.int64) + FIRST_ID
        like = torch.empty(len(items), *self.family.latent_shape(*size), device=cond.device)
        noise = sample_noise(like, ids, config.seed)
        sigmas = sigma_grid(config.num_steps, config.shift_of(self.family, size))

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return self.family.velocity(self.network, x, sigma, cond)

        if config.intervals is None:
            return euler_sample(velocity, noise, sigmas), None
        latents, velocities = roll_out(
            velocity, noise, sigmas, intervals=config.intervals, second_order=config.second_order
        )
        rows = len(items)
        return latents, {
            "velocities": velocities.to(dtype_of(self.network)),
            "sigmas": sigmas[:: config.num_steps // config.intervals].expand(rows, -1),
            "guidance": torch.full((rows,), config.guidance),
        }

    def details(self, item: int, size: Size) -> dict[str, object]:
        """How a sample was made, for its field `json`."""
        config = self.config
        solver = "adams-bashforth" if config.intervals is not None and config.second_order else "euler"
        sample = {"height": size[0], "width": size[1], "sample": item, "seed": config.seed}
        return sample | {"steps": config.num_steps, "solver": solver, "guidance": config.guidance}


def _make_batch(items: Sequence[int], prompts: list[str], teacher: _Teacher, writer: CacheWriter) -> Made:
    """Sample a batch of one size."""
    config, made = teacher.config, Made()
    size = config.sizes[items[0] % len(config.sizes)]
    numbers = [item // config.per_prompt for item in items]
    texts = [prompts[number] for number in numbers]
    # With the text as it is stored: the student will have no other.
    cond = writer.encode(texts, config.guidance)
    latents, path = teacher.sample(items, cond, size)
    latents = latents.to(writer.config.dtype)
    _check_finite(latents, items, texts)
    details = [teacher.details(item, size) | {"prompt": number} for item, number in zip(items, numbers, strict=True)]
    samples = writer.samples(latents, texts, cond, details, path)
    for item, text, (files, not_finite, is_cut) in zip(items, texts, samples, strict=True):
        if not_finite:
            raise UserError(
                f"the {' and '.join(not_finite)} of sample {item}, of the prompt {text!r}, are not finite in {writer.config.dtype}. "
                f"Check the model's weights, or use another dtype and another folder"
            )
        made.samples.append((f"{item:08d}", files, size))
        made.counts[CUT] += is_cut
    return made


def _check_finite(latents: Tensor, items: Sequence[int], texts: list[str]) -> None:
    finite = latents.isfinite().flatten(1).all(1).tolist()
    bad = [row for row, is_finite in enumerate(finite) if not is_finite]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(items)} samples of a batch are not finite in {latents.dtype}, the first is sample "
            f"{items[bad[0]]}, of the prompt {texts[bad[0]]!r}. Check the model's weights and the guidance, or use another "
            f"dtype and another folder"
        )
