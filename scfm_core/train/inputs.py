"""From a batch to what the networks take; and whether caches and stored paths belong to the run's model."""

import contextlib
import gc
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scfm_core.data.corpus import Corpus
from scfm_core.data.schema import BadData, Batch
from scfm_core.errors import UserError
from scfm_core.flow.schedule import shift_of_grid, sigma_grid
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.protocol import Conditioning, ModelFamily
from scfm_core.models.weights import encoder_fingerprint, network_fingerprint
from scfm_core.scfm.plan import PlanConfig
from scfm_core.train.config import RunConfig
from scfm_core.train.device import compute_dtype
from scfm_core.train.sampling import sampling_shift


class BatchEncoder:
    """Batch -> latents and conditioning on the device: a copy for cached samples, else VAE and text encoders run.

    Args:
        config: the run.
        family: its model.
        corpus: its data.
        device: where latents and conditioning go.
        prompts: of the validation grids. They are encoded here, so that on a cache the text encoders are freed before the
            network is loaded.

    Raises:
        UserError: if a cache does not belong to this model or text length.
    """

    def __init__(
        self,
        config: RunConfig,
        family: ModelFamily,
        corpus: Corpus,
        device: torch.device,
        prompts: Sequence[str] = (),
    ) -> None:
        self.device = device
        self.text: TextEncoders | None = None
        self.vae: Autoencoder | None = None
        self.prompts = list(prompts)
        self.prompt_cond: Conditioning | None = None
        """Of `prompts`, at `sample.guidance`; None without prompts."""
        self.paddings = [None if padding is None else padding.to(device) for padding in corpus.paddings]
        if corpus.is_cached:
            check_cache(config, family, corpus)
        needs_empty_caption = family.passes == 2 or config.method.caption_dropout > 0
        if prompts or needs_empty_caption or not corpus.is_cached:
            self.text = TextEncoders(family, config.model.text_length, compute_dtype(config), device)
            if prompts:
                self.prompt_cond = self.text.encode(prompts, guidance=config.sample.guidance)
            if corpus.is_cached:
                self.text = None
                gc.collect()  # reference cycles would keep the encoders alive
        if not corpus.is_cached:
            self.vae = Autoencoder(family, compute_dtype(config), device)

    def encode(self, batch: Batch) -> tuple[Tensor, Conditioning]:
        """Latents fp32 [B, C, H, W] and conditioning."""
        if batch.latents is not None:
            assert batch.text is not None and batch.pooled is not None
            text = batch.text.padded(self.paddings, self.device)
            cond = Conditioning(text=text, pooled=batch.pooled.to(self.device, non_blocking=True))
            return batch.latents.to(self.device, non_blocking=True).float(), cond
        assert batch.images is not None and self.vae is not None and self.text is not None
        images = batch.images.to(self.device, non_blocking=True)
        return self.vae.encode(images).float(), self.text.encode(batch.captions)


def check_cache(config: RunConfig, family: ModelFamily, corpus: Corpus) -> None:
    """Compare cached sources with the run's model.

    Raises:
        UserError: if they were encoded by another model, or with another text length.
    """
    fingerprint = encoder_fingerprint(family.folder)
    if corpus.encoder != fingerprint:
        raise UserError(
            f"data: the cache was encoded by another model (encoder {str(corpus.encoder)[:12]}) than {family.folder} "
            f"(encoder {fingerprint[:12]}). Encode it again with this model's encoders"
        )
    if corpus.text_length != family.text_tokens(config.model.text_length):
        cached = (corpus.text_length or 0) - family.clip_tokens
        raise UserError(
            f"data: the cache was encoded with model.text_length {cached}, this run asks for "
            f"{config.model.text_length}. Set it to match, or encode again"
        )


def check_paths(config: RunConfig, family: ModelFamily, corpus: Corpus) -> None:
    """Compare stored paths, by the first of each source, with the run's model, method and sampler.

    Raises:
        UserError: naming the source.
    """
    if config.model.init != "random":  # a random network is no teacher
        _refuse_other_teachers(family, corpus)
    intervals: dict[str, int] = {}
    others: dict[str, str] = {}
    """Sources whose paths were taken at another shift or guidance than the sampler's, and at which."""
    for name, item in corpus.first_items().items():
        with contextlib.suppress(BadData):  # the loader handles bad samples
            record = corpus.record(item, padded=False)
            path, latents = record.path, record.latents
            assert path is not None and latents is not None
            intervals[name] = path["velocities"].shape[0]
            refuse_other_intervals(config.method, intervals[name], f"of source {name!r} ")
            guidance = float(path["guidance"])  # stored in fp32
            _refuse_other_guidance(config.method, name, guidance)
            shift = sampling_shift(config.sample, family.image_tokens(latents))
            if other := _other_setting(config, family, path["sigmas"], guidance, shift):
                others[name] = other
    if len(set(intervals.values())) > 1:
        raise UserError(
            f"data: the sources' paths have different numbers of intervals, {intervals}, which do not fit into one batch. "
            f"Store them alike with `scfm data generate --trajectories --steps N --intervals K`"
        )
    if others and len(others) == len(intervals):
        sample = config.sample
        raise UserError(
            f"data: the stored paths were taken at {' or '.join(sorted(set(others.values())))}, but sample.shift is {sample.shift} "
            f"and sample.guidance {sample.guidance:g}: sample their student as they were taken. Set both to those values, or "
            f"store paths with `scfm data generate --trajectories --shift {sample.shift} --guidance {sample.guidance:g}`"
        )


def _refuse_other_teachers(family: ModelFamily, corpus: Corpus) -> None:
    own = network_fingerprint(family.folder)
    for name, network in corpus.networks().items():
        if network not in (None, own):
            raise UserError(
                f"data: the stored paths of source {name!r} were taken by another network ({str(network)[:12]}) than that of "
                f"{family.folder} ({own[:12]}). Take them with this one: `scfm data generate --trajectories`"
            )


def _refuse_other_guidance(method: PlanConfig, source: str, guidance: float) -> None:
    scale = method.guidance[0]
    if method.distil_guidance and not math.isclose(guidance, scale, rel_tol=1e-6):
        raise UserError(
            f"data: the stored paths of source {source!r} were guided at scale {guidance:g}, but "
            f"method.distil_guidance learns method.guidance={scale:g} alone. Set it and sample.guidance to that scale, "
            f"or make paths with `scfm data generate --trajectories --guidance {scale:g}`"
        )


def _other_setting(config: RunConfig, family: ModelFamily, sigmas: Tensor, guidance: float, shift: float) -> str | None:
    """The shift and guidance of a path, if they are not those of the run's sampler."""
    has_guidance = family.passes == 2 or bool(family.network_config.get("guidance_embeds"))
    same_shift = torch.allclose(sigmas.float(), sigma_grid(len(sigmas) - 1, shift), atol=1e-4)
    same_guidance = not has_guidance or math.isclose(guidance, config.sample.guidance, rel_tol=1e-6)
    if same_shift and same_guidance:
        return None
    return f"shift {shift if same_shift else shift_of_grid(sigmas):.4g} and guidance {guidance:g}"


def refuse_other_intervals(method: PlanConfig, intervals: int, where: str = "") -> None:
    """UserError unless the nodes of every grid of `method` are nodes of stored paths of so many intervals."""
    if any(intervals % grid for grid in method.trajectory_grids):
        divisors = [grid for grid in method.trajectory_grids if intervals % grid == 0] or [1]
        raise UserError(
            f"data: the stored paths {where}have {intervals} intervals, of which "
            f"method.trajectory_grids={list(method.trajectory_grids)} are not all divisors. Set "
            f"method.trajectory_grids={divisors}, or store paths of another number of intervals"
        )
