"""How to sample with a run's weights in other tools: weight, shift and guidance."""

import torch

from scfm_core.models.protocol import ModelFamily
from scfm_core.scfm.method import sampling_strength
from scfm_core.train.config import RunConfig
from scfm_core.train.sampling import sampling_shift

CARD_STEPS = (1, 2, 3, 4, 6, 8, 16)
"""The step counts of tables."""


def weight(config: RunConfig, num_steps: int, folded: int | None) -> float:
    """The weight of an adapter's file in a sampler of `num_steps` steps.

    Args:
        config: the run.
        num_steps: of the sampler.
        folded: the step count whose strength is in the file; None: the file has strength 1.
    """
    gain = config.method.step_gain
    return sampling_strength(gain, num_steps) / (1.0 if folded is None else sampling_strength(gain, folded))


def shift(config: RunConfig, family: ModelFamily, num_steps: int) -> float:
    """The timestep shift of a sampler of `num_steps` steps at the run's resolution."""
    latents = torch.empty(1, *family.latent_shape(*config.data.resolution), device="meta")
    return sampling_shift(config.sample, family, latents, num_steps)


def student_guidance(config: RunConfig, family: ModelFamily) -> float:
    """The scale of guidance for the student; the one of a single pass if the student has learned guidance."""
    return (
        family.neutral_guidance
        if config.method.distil_guidance or family.has_learned_guidance
        else config.sample.guidance
    )


def teacher_guidance(config: RunConfig, family: ModelFamily) -> float:
    """The scale of guidance for the undistilled model; the one of a single pass if it has learned guidance itself."""
    return family.neutral_guidance if family.has_learned_guidance else config.sample.guidance


def is_guidance_only(config: RunConfig) -> bool:
    """Whether the weights have learned guidance, and not fewer steps."""
    return config.method.distil_guidance and not config.method.has_trajectory


def weight_advice(config: RunConfig, folded: int | None = None) -> str:
    """How to set the weight of an adapter's file, as a sentence."""
    if folded is not None:
        return f"Use weight 1.0 at {'1 step' if folded == 1 else f'{folded} steps'}: this strength is in the file."
    if (gain := config.method.step_gain) is None:
        return "Use weight 1 at every step count."
    return (
        f"The adapter's weight carries the step size: for N steps use N^-gamma, gamma = {gain.gamma:g}. Weight 0 is the "
        f"original model."
    )


def guidance_advice(config: RunConfig, family: ModelFamily) -> str:
    """How to set the guidance, as text; empty if there is nothing to say."""
    method = config.method
    if method.distil_guidance:
        fewer_steps = "" if method.has_trajectory else ", not fewer steps"
        return (
            f"It has learned guidance {method.guidance[0]:g}{fewer_steps}: set the guidance as below, which is one "
            f"pass of the network a step."
        )
    if family.has_learned_guidance:
        return "The base model has learned its guidance: set the guidance as below, which is one pass of the network a step."
    if family.passes == 2 and method.has_stored_paths:
        return (
            "The adapter has learned guided paths of the teacher: use the guidance of those paths, two passes "
            "of the network a step."
        )
    if family.passes == 2 and method.student_is_guided:
        return (
            f"The adapter was trained with guidance between {method.guidance[0]:g} and "
            f"{method.guidance[1]:g}: use a scale in this range, two passes of the network a step."
        )
    return ""
