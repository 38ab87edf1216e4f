"""From a batch to the inputs of the networks; checks that caches and stored paths belong to the run's model."""

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from scfm_core.data.corpus import Corpus
from scfm_core.data.fields import PackedTokens
from scfm_core.data.image import unit_range
from scfm_core.data.schema import BadData, Batch
from scfm_core.distributed.world import World
from scfm_core.errors import UserError
from scfm_core.flow.schedule import shift_of_grid, sigma_grid
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.fingerprint import different_encoders
from scfm_core.models.protocol import ModelFamily
from scfm_core.scfm.method import PlanConfig
from scfm_core.train.config import RunConfig
from scfm_core.train.device import compute_dtype, free_unused
from scfm_core.train.sampling import sampling_shift


class BatchEncoder:
    """Batch -> latents and conditioning on the device: copied from a cache, or computed by VAE and text encoders.

    A cache without fields of text holds latents alone; then the text encoders stay loaded on every rank, without the VAE.

    Args:
        config: the run.
        family: its model.
        corpus: its data.
        device: where latents and conditioning go.
        prompts: prompts of the validation grids. They are encoded here, so that with a cache the text encoders are freed
            before the network is loaded.
        world: the processes, each of which makes an encoder. If the text is cached, rank 0 alone loads the text encoders.

    Raises:
        UserError: on every rank, if a cache was encoded with another model or text length, or an encoder cannot be loaded.
    """

    def __init__(
        self,
        config: RunConfig,
        family: ModelFamily,
        corpus: Corpus,
        device: torch.device,
        prompts: Sequence[str] = (),
        world: World | None = None,
    ) -> None:
        self.device = device
        self.text: TextEncoders | None = None
        self.vae: Autoencoder | None = None
        self.prompts = list(prompts)
        self.prompt_cond: Conditioning | None = None
        """Conditioning of `prompts`, with `sample.guidance`; None without prompts."""
        self.paddings = {
            name: [None if padding is None else padding.to(device) for padding in paddings]
            for name, paddings in corpus.paddings.items()
        }
        world = world or World()
        needs_captions = bool(prompts) or family.passes == 2 or config.method.caption_dropout > 0
        with world.together():
            if corpus.is_cached:
                check_cache(config, family, corpus)
            if not corpus.fields or (needs_captions and world.is_main):
                self._encode_captions(config, family)
            if not corpus.is_cached:
                self.vae = Autoencoder(family, compute_dtype(config), device)
        if corpus.fields and needs_captions:
            self._share_captions(family, world)

    def _encode_captions(self, config: RunConfig, family: ModelFamily) -> None:
        """Load the text encoders; encode the empty caption and the prompts."""
        self.text = TextEncoders(
            family, config.model.text_length, compute_dtype(config), self.device, config.model.encoders
        )
        if self.prompts:
            self.prompt_cond = self.text.encode(self.prompts, guidance=config.sample.guidance)

    def _share_captions(self, family: ModelFamily, world: World) -> None:
        """Rank 0 sends what it encoded to the others, and frees the encoders."""
        encoded = [None if cond is None else cond.to("cpu") for cond in (family.unconditional, self.prompt_cond)]
        self.text = family.unconditional = self.prompt_cond = None
        free_unused(self.device)
        shared = [None if cond is None else cond.to(self.device) for cond in world.from_main(encoded)]
        family.unconditional, self.prompt_cond = shared

    def encode(self, batch: Batch) -> tuple[Tensor, Conditioning]:
        """Latents fp32 [B, C, H, W] and conditioning."""
        if batch.latents is not None:
            latents = batch.latents.to(self.device, non_blocking=True)
        else:
            assert batch.images is not None and self.vae is not None
            latents = self.vae.encode(unit_range(batch.images.to(self.device, non_blocking=True)))
        return latents.float(), self._conditioning(batch)

    def _conditioning(self, batch: Batch) -> Conditioning:
        if not batch.fields:
            assert self.text is not None
            return self.text.encode(batch.captions)
        fields = {
            name: value.padded(self.paddings.get(name, ()), self.device)
            if isinstance(value, PackedTokens)
            else value.to(self.device, non_blocking=True)
            for name, value in batch.fields.items()
        }
        return Conditioning(fields=fields, lengths=batch.lengths)


def check_cache(config: RunConfig, family: ModelFamily, corpus: Corpus) -> None:
    """Compare cached data with the run's model.

    Raises:
        UserError: if the data were encoded by another model, with another text length, or have other fields.
    """
    difference = different_encoders(corpus.encoder, family.folder)
    if difference is not None:
        raise UserError(
            f"data: the cache was encoded by another model (encoder {str(corpus.encoder)[:12]}) than {family.folder}: {difference}. "
            f"Encode it again with this model's encoders, or set model.path to the model of the cache"
        )
    if corpus.fields and corpus.fields != family.fields:
        raise UserError(
            f"data: the cache has the fields {_described(corpus.fields)}, but {type(family).__name__}, the model of {family.folder}, "
            f"takes {_described(family.fields)}. Encode it again with `scfm data encode --model {family.folder}`"
        )
    if corpus.text_length not in (None, family.text_tokens(config.model.text_length)):
        cached = (corpus.text_length or 0) - family.extra_tokens
        raise UserError(
            f"data: the cache was encoded with model.text_length {cached}, this run asks for "
            f"{config.model.text_length}. Set model.text_length={cached}, or encode again"
        )


def _described(fields: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in fields.items())


def check_paths(config: RunConfig, family: ModelFamily, corpus: Corpus) -> None:
    """Compare the first stored path of each source with the run's model, method and sampler.

    Raises:
        UserError: if they do not match; it names the source.
    """
    if config.model.init != "random":  # a random network has no teacher
        _check_teacher(family, corpus)
    intervals: dict[str, int] = {}
    shifts: set[float] = set()
    others: dict[str, str] = {}
    """Shift and guidance of each source whose paths do not have the sampler's."""
    for name, item in corpus.first_items().items():
        with contextlib.suppress(BadData):  # the loader handles bad samples
            record = corpus.record(item, padded=False)
            path, latents = record.path, record.latents
            assert path is not None and latents is not None
            intervals[name] = path["velocities"].shape[0]
            check_intervals(config.method, intervals[name], f"of source {name!r} ")
            guidance = float(path["guidance"])  # stored in fp32
            _check_guidance(config.method, name, guidance)
            shifts = {sampling_shift(config.sample, family, latents, grid) for grid in config.method.trajectory_grids}
            if other := _different_settings(config, family, path["sigmas"], guidance, shifts):
                others[name] = other
    if len(set(intervals.values())) > 1:
        raise UserError(
            f"data: the sources' paths have different numbers of intervals, {intervals}, which cannot be in one batch. "
            f"Store all with the same number: `scfm data generate --trajectories --steps N --intervals K`"
        )
    if others and len(others) == len(intervals):
        sample = config.sample
        advice = f", or store paths with `scfm data generate --trajectories --shift {sample.shift} --guidance {sample.guidance:g}`"
        if len(shifts) > 1:
            advice = ". The dynamic shift of this model depends on the number of steps, and a path has one shift"
        raise UserError(
            f"data: the stored paths were sampled at {' or '.join(sorted(set(others.values())))}, but sample.shift is "
            f"{sample.shift} and sample.guidance {sample.guidance:g}: the student must be sampled as its paths were. Set both to "
            f"those values{advice}"
        )


def _check_teacher(family: ModelFamily, corpus: Corpus) -> None:
    for name, network in corpus.networks().items():
        difference = None if network is None else family.different_network(network)
        if difference is not None:
            raise UserError(
                f"data: the stored paths of source {name!r} were sampled from another network ({str(network)[:12]}) than that of "
                f"{family.folder}: {difference}. Make them with this one: `scfm data generate --trajectories`"
            )


def _check_guidance(method: PlanConfig, source: str, guidance: float) -> None:
    scale = method.guidance[0]
    if method.distil_guidance and not math.isclose(guidance, scale, rel_tol=1e-6):
        raise UserError(
            f"data: the stored paths of source {source!r} have guidance scale {guidance:g}, but method.distil_guidance learns "
            f"only method.guidance={scale:g}. Set method.guidance and sample.guidance to the paths' scale, or make paths with "
            f"`scfm data generate --trajectories --guidance {scale:g}`"
        )


def _different_settings(
    config: RunConfig, family: ModelFamily, sigmas: Tensor, guidance: float, shifts: Collection[float]
) -> str | None:
    """Shift and guidance of a path, if they differ from the run's sampler; else None. `shifts` are those of the trajectory grids."""
    grids = [sigma_grid(len(sigmas) - 1, shift) for shift in shifts]
    same_shift = all(torch.allclose(sigmas.float(), grid, atol=1e-4) for grid in grids)
    same_guidance = not family.has_guidance or math.isclose(guidance, config.sample.guidance, rel_tol=1e-6)
    if same_shift and same_guidance:
        return None
    return f"shift {min(shifts) if same_shift else shift_of_grid(sigmas):.4g} and guidance {guidance:g}"


def check_intervals(method: PlanConfig, intervals: int, where: str = "") -> None:
    """UserError unless `intervals`, the number of intervals of stored paths, is a multiple of every trajectory grid."""
    if any(intervals % grid for grid in method.trajectory_grids):
        divisors = [grid for grid in method.trajectory_grids if intervals % grid == 0] or [1]
        raise UserError(
            f"data: the stored paths {where}have {intervals} intervals, which is not a multiple of every number in "
            f"method.trajectory_grids={list(method.trajectory_grids)}. Set method.trajectory_grids={','.join(map(str, divisors))}, or store paths "
            f"with another number of intervals"
        )
