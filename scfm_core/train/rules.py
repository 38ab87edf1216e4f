"""Rules across sections, and between the configuration and model, device or number of processes.

Rules of a single section are in its `__post_init__`; rules for resuming from a checkpoint are in `resume.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from scfm_core.errors import UserError
from scfm_core.kernels.fp8 import why_no_fp8
from scfm_core.launched import launched_size
from scfm_core.models.protocol import ModelFamily
from scfm_core.train.config import RunConfig
from scfm_core.wording import count


def broken_rules(config: RunConfig) -> Iterator[str]:
    """A message for each rule across sections that `config` breaks: what is wrong, and how to fix it."""
    method, train, sample = config.method, config.train, config.sample
    is_full = train.weights == "full"
    if is_full and method.step_gain is not None:
        yield "method.step_gain needs adapters: full weights have no strength. Set method.step_gain=none, or train.weights=lora"
    if method.step_embedding and not is_full:
        yield "method.step_embedding teaches the network a new input: it needs train.weights=full"
    yield from _broken_by_base(config)
    if config.model.init == "random" and not is_full:
        yield "model.init=random leaves nothing for adapters to adapt. Set train.weights=full"
    if config.lora.start is not None and is_full:
        yield "lora.start has weights of adapters, but train.weights=full trains none. Set lora.start=none, or train.weights=lora"
    if config.model.init == "random" and config.model.adapters:
        yield "model.adapters are fused into pre-trained weights, which model.init=random does not use. Remove one of them"
    if sample.teacher_steps and is_full and not method.has_teacher:
        yield (
            "sample.teacher_steps needs a teacher, but this run trains full weights without one in their targets "
            "(method.teacher_fraction is 0). Set sample.teacher_steps=0"
        )
    if method.distil_guidance and sample.guidance != method.guidance[0]:
        yield (
            f"sample.guidance={sample.guidance:g} is the teacher's scale in grids and evaluation, but the student learns "
            f"scale {method.guidance[0]:g} (method.guidance). Set both to the same value"
        )
    if config.checkpoint.asynchronous and config.engine.name == "deepspeed":
        yield "checkpoint.asynchronous works only with fsdp2. Set it to false, or engine.name=fsdp2"
    if train.compile and config.engine.name == "deepspeed" and config.engine.zero_stage == 3:
        yield (
            "train.compile=true does not work with engine.zero_stage=3, which gathers the weights of every layer in hooks. "
            "Set train.compile=false, zero_stage 1 or 2, or engine.name=fsdp2"
        )


def _broken_by_base(config: RunConfig) -> Iterator[str]:
    """Rules of how the frozen base is stored."""
    for key, base in (("model.base", config.model.base), ("sample.base", config.sample.base)):
        if config.train.weights == "full" and base != "bfloat16":
            yield f"{key}={base} stores a frozen base, but train.weights=full trains the base. Set {key}=bfloat16, or train.weights=lora"
    if config.kernels.fp8 and config.model.base in ("int8", "nf4"):
        yield (
            f"kernels.fp8 needs the weights in bfloat16 or float8, but model.base is {config.model.base}. Set model.base=float8, or "
            f"kernels.fp8=false"
        )
    if not config.model.offload_blocks:
        return
    for is_broken, what, remedy in (
        (config.train.weights == "full", "train.weights=full trains the base", "set train.weights=lora"),
        (
            config.engine.name == "deepspeed",
            "DeepSpeed sends the weights of all blocks at the start",
            "set engine.name=fsdp2",
        ),
        (config.kernels.fp8, "kernels.fp8 keeps copies of the weights", "set kernels.fp8=false"),
        (config.kernels.cuda_graphs, "a CUDA graph cannot wait for copies", "set kernels.cuda_graphs=false"),
    ):
        if is_broken:
            yield f"model.offload_blocks={config.model.offload_blocks} cannot work: {what}. Set model.offload_blocks=0, or {remedy}"


def check_model(config: RunConfig, family: ModelFamily) -> None:
    """Rules between the configuration and the model.

    Raises:
        UserError: if a size cannot be packed, or step embedding or guidance do not fit the model.
    """
    method, path = config.method, config.model.path
    for size in {config.data.resolution, *config.data.sizes()}:
        family.latent_shape(*size)
    if (wanted := config.model.offload_blocks) and wanted > (blocks := len(family.blocks(family.meta_network()))):
        raise UserError(
            f"model.offload_blocks is {wanted}, but {path} has {blocks} blocks. Set it to {blocks} or fewer"
        )
    if method.step_embedding and family.guidance_kind != "input":
        raise UserError(
            f"method.step_embedding gives the step size to the network's embedded guidance, but {path} has none. "
            f"Use an architecture that has it"
        )
    if config.kernels.cuda_graphs and not family.static_shapes:
        raise UserError(
            f"kernels.cuda_graphs needs batches of one shape, but the text of {path} is as long as the longest caption of a batch. "
            f"Set kernels.cuda_graphs=false"
        )
    if family.passes == 1 and method.distil_guidance:
        raise UserError(
            f"method.distil_guidance is for models with classifier-free guidance in two passes; {path} needs only one. Set "
            f"it to false"
        )
    if method.distil_guidance and method.guidance[0] <= family.neutral_guidance:
        raise UserError(
            f"method.distil_guidance needs a scale above {family.neutral_guidance:g}, which is no guidance for {path}: method.guidance has "
            f"{method.guidance[0]:g}. Give the scale with which the model is sampled, twice"
        )
    if family.passes == 1 and method.matching.guidance_share != 1:
        raise UserError(
            f"method.matching.guidance_share is a share of classifier-free guidance in two passes; {path} needs only one. Remove it"
        )
    draws_guidance = (
        method.has_pairs or method.has_flow_map or method.has_matching or method.trajectory_steps is not None
    )
    if family.passes == 2 and draws_guidance and method.guidance[0] < family.neutral_guidance:
        raise UserError(
            f"method.guidance is the scale of classifier-free guidance for this model, and its range starts at "
            f"{method.guidance[0]:g}: scales below {family.neutral_guidance:g} would weaken the caption. Start at "
            f"{family.neutral_guidance:g} or above, near the scale with which the model is sampled"
        )


def check_kernels(config: RunConfig, device: torch.device) -> None:
    """Rules of `check_base` for the launched processes, and of `kernels.fp8` and `kernels.cuda_graphs` on a device.

    Raises:
        UserError: it names the option and the reason.
    """
    check_base(config, launched_size())
    for option, reason in (("fp8", _why_no_fp8(config, device)), ("cuda_graphs", _why_no_graphs(config, device))):
        if getattr(config.kernels, option) and reason is not None:
            raise UserError(f"kernels.{option}=true cannot run here: {reason}. Or set kernels.{option}=false")


def check_base(config: RunConfig, processes: int) -> None:
    """Rules of the options that need an unsharded, frozen base: `model.base`, `model.offload_blocks`, `kernels.fp8` and `cuda_graphs`.

    Raises:
        UserError: it names the option and the reason.
    """
    reason = why_no_unsharded_base(config, processes)
    for section, key, default in (
        ("model", "base", "bfloat16"),
        ("model", "offload_blocks", 0),
        ("kernels", "fp8", False),
        ("kernels", "cuda_graphs", False),
    ):
        value = getattr(getattr(config, section), key)
        if value != default and reason is not None:
            shown, other = (str(word).lower() if isinstance(word, bool) else word for word in (value, default))
            raise UserError(f"{section}.{key}={shown} cannot run here: {reason}. Or set {section}.{key}={other}")


def why_no_unsharded_base(config: RunConfig, processes: int) -> str | None:
    """Why not every one of `processes` has a whole frozen base; None if it has."""
    if config.train.weights != "lora":
        return "train.weights=full has no frozen base"
    if config.engine.name == "fsdp2" and config.engine.shard != 1 and processes > 1:
        return "the base is sharded; set engine.shard=1, which keeps a full copy on every GPU"
    if config.engine.name == "deepspeed" and config.engine.zero_stage == 3:
        return "ZeRO-3 shards the base; set engine.zero_stage to 1 or 2"
    return None


def _why_no_fp8(config: RunConfig, device: torch.device) -> str | None:
    if not config.kernels.fp8:
        return None  # `why_no_fp8` may initialise the device
    if device.type == "cuda" and not config.train.compile:
        return "set train.compile=true: without it, quantisation moves more bytes than fp8 products save"
    if not config.method.has_pairs:
        return "no row is a pair, so there are no near and far passes"
    return why_no_fp8(device)


def _why_no_graphs(config: RunConfig, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, this is a {device.type.upper()}"
    if config.method.has_flow or config.method.has_trajectory:
        return "method.flow_fraction or method.trajectory_fraction > 0 makes the number of rows in the near and far passes vary"
    if config.method.has_flow_map or config.method.has_matching:
        return "method.flow_map_fraction or method.matching_fraction > 0 makes the number of rows in the passes for a target vary"
    if config.method.near == "student" and config.method.teacher_fraction > 0:
        return "method.near=student makes the number of rows in the near pass vary: they are the teacher's alone"
    return None


@dataclass(frozen=True)
class MicroBatches:
    """How each process splits its share of the global batch."""

    size: int
    """Samples of one forward pass."""
    number: int
    """Forward passes of a step, over which gradients accumulate."""


def micro_batches(config: RunConfig, processes: int) -> MicroBatches:
    """The largest micro-batches up to `train.micro_batch_size` that divide a process's share of the global batch.

    Raises:
        UserError: if the processes cannot share the global batch equally.
    """
    total = config.train.global_batch_size
    if total % processes:
        below, above = total // processes * processes, (total // processes + 1) * processes
        choice = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"train.global_batch_size {total} is not a multiple of the {processes} processes, which share it equally. Set it "
            f"to {choice}, or change the number of processes"
        )
    share = total // processes
    size = max(size for size in range(1, min(share, config.train.micro_batch_size) + 1) if share % size == 0)
    return MicroBatches(size, share // size)


def describe_micro_batches(config: RunConfig, processes: int) -> str:
    """The micro-batches in words; why they are smaller than `train.micro_batch_size`, if they are."""
    found, maximum = micro_batches(config, processes), config.train.micro_batch_size
    words = f"{count(found.size, 'sample')} x {found.number} a step"
    words += f" on each of {processes} processes" if processes > 1 else ""
    if found.size == maximum:
        return words
    share = config.train.global_batch_size // processes
    return f"{words} (train.micro_batch_size allows {maximum}; the share of a process is {share})"


def check_shards(config: RunConfig, processes: int) -> None:
    """Rules between `engine.shard`, `engine.cpu_offload` and the number of processes; UserError if one is broken."""
    engine = config.engine
    if engine.name == "fsdp2" and engine.shard != -1 and processes % engine.shard:
        raise UserError(
            f"engine.shard={engine.shard} does not divide the {processes} processes. Set it to a divisor, or to -1 for all "
            f"processes; for a dry run, set the number of processes with --gpus"
        )
    if engine.name == "fsdp2" and engine.cpu_offload and processes == 1:
        raise UserError("engine.cpu_offload needs several processes: with one process nothing is sharded")
