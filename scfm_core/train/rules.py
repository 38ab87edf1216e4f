"""Every rule that one section alone cannot check: between sections, and against model, device and number of processes.

What a single section can check by itself stands in its `__post_init__`; whether a run may resume from a checkpoint, in
`resume.py`.
"""

from collections.abc import Iterator

import torch

from scfm_core.distributed.world import launched_size
from scfm_core.errors import UserError
from scfm_core.kernels.fp8 import why_no_fp8
from scfm_core.models.protocol import ModelFamily
from scfm_core.train.config import RunConfig


def broken_rules(config: RunConfig) -> Iterator[str]:
    """A sentence for each rule between sections that `config` breaks: what is wrong, and how to mend it."""
    method, train, sample = config.method, config.train, config.sample
    is_full = train.weights == "full"
    if is_full and method.step_gain is not None:
        yield "method.step_gain needs adapters: full weights have no strength. Set it to none, or train.weights=lora"
    if method.step_embedding and not is_full:
        yield "method.step_embedding teaches the network a new input: it needs train.weights=full"
    if config.model.init == "random" and not is_full:
        yield "model.init=random leaves nothing for adapters to adapt. Set train.weights=full"
    if sample.teacher_steps and is_full and not method.has_teacher:
        yield (
            "sample.teacher_steps needs a teacher, but this run trains full weights without one in their targets "
            "(method.teacher_fraction is 0). Set it to 0"
        )
    if method.distil_guidance and sample.guidance != method.guidance[0]:
        yield (
            f"sample.guidance={sample.guidance:g} is the teacher's, in grids and evaluation, but the student learns "
            f"scale {method.guidance[0]:g} (method.guidance). Make them equal"
        )
    if config.checkpoint.asynchronous and config.engine.name == "deepspeed":
        yield "checkpoint.asynchronous is fsdp2's; DeepSpeed writes its own files. Set it to false, or engine.name=fsdp2"
    if train.compile and config.engine.name == "deepspeed" and config.engine.zero_stage == 3:
        yield (
            "train.compile=true does not work with engine.zero_stage=3, which fetches the weights of every layer by hooks. "
            "Set train.compile=false, zero_stage 1 or 2, or engine.name=fsdp2"
        )


def check_model(config: RunConfig, family: ModelFamily) -> None:
    """Rules between the configuration and the model.

    Raises:
        UserError: if the model cannot pack a size, has no input for the step size, or is guided in another way.
    """
    method, path = config.method, config.model.path
    for size in {config.data.resolution, *config.data.sizes()}:
        family.latent_shape(*size)
    if method.step_embedding and not family.network_config.get("guidance_embeds"):
        raise UserError(
            f"method.step_embedding gives the step size to the network's embedded guidance, but {path} has none "
            f"(guidance_embeds in transformer/config.json). Use an architecture that has it"
        )
    if family.passes == 1 and method.distil_guidance:
        raise UserError(
            f"method.distil_guidance is for models that are guided by a second pass of the network; {path} needs one pass "
            f"as it is. Set it to false"
        )
    draws_guidance = method.has_pairs or method.trajectory_steps is not None
    if family.passes == 2 and draws_guidance and method.guidance[0] < 1:
        raise UserError(
            f"method.guidance is the scale of classifier-free guidance for this model, and begins at "
            f"{method.guidance[0]:g}: rows below 1 would teach to leave the caption out. Set it, for SD3.5 to [3.5, 5]"
        )


def check_kernels(config: RunConfig, device: torch.device) -> None:
    """Rules of `kernels.fp8` and `kernels.cuda_graphs`, which need a frozen base that is not sharded, on a GPU.

    Raises:
        UserError: naming the option and the reason.
    """
    for option, reason in (("fp8", _why_no_fp8(config, device)), ("cuda_graphs", _why_no_graphs(config, device))):
        if getattr(config.kernels, option) and (reason := _why_no_whole_base(config) or reason) is not None:
            raise UserError(f"kernels.{option}=true cannot run here: {reason}. Or set kernels.{option}=false")


def _why_no_whole_base(config: RunConfig) -> str | None:
    if config.train.weights != "lora":
        return "train.weights=full has no frozen base"
    if config.engine.name == "fsdp2" and config.engine.shard != 1 and launched_size() > 1:
        return "the base is sharded; set engine.shard=1, which keeps it whole on every GPU"
    if config.engine.name == "deepspeed" and config.engine.zero_stage == 3:
        return "ZeRO-3 shards the base; set engine.zero_stage to 1 or 2"
    return None


def _why_no_fp8(config: RunConfig, device: torch.device) -> str | None:
    if not config.kernels.fp8:
        return None  # asking may initialise the device
    if device.type == "cuda" and not config.train.compile:
        return "set train.compile=true, without which quantising moves more bytes than the products save"
    if not config.method.has_pairs:
        return "no row is a pair, so there are no such passes"
    return why_no_fp8(device)


def _why_no_graphs(config: RunConfig, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, this is a {device.type.upper()}"
    if config.method.has_flow or config.method.has_trajectory:
        return "method.flow_fraction or method.trajectory_fraction > 0 makes the number of rows in these passes vary"
    return None


def micro_batches(config: RunConfig, processes: int) -> int:
    """Micro-batches that each process runs in a step.

    Raises:
        UserError: if the processes cannot share the global batch evenly.
    """
    train = config.train
    together = train.micro_batch_size * processes
    if train.global_batch_size % together:
        raise UserError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {processes} processes. Change the micro-batch or the number of processes"
        )
    return train.global_batch_size // together


def check_shards(config: RunConfig, processes: int) -> None:
    """Rules between `engine.shard`, `engine.cpu_offload` and the number of processes; UserError if one is broken."""
    engine = config.engine
    if engine.name == "fsdp2" and engine.shard != -1 and processes % engine.shard:
        raise UserError(
            f"engine.shard={engine.shard} does not divide the {processes} processes. Set it to a divisor, or to -1 for all "
            f"of them; for a dry run, give their number with --gpus"
        )
    if engine.name == "fsdp2" and engine.cpu_offload and processes == 1:
        raise UserError("engine.cpu_offload needs several processes: one process has nothing to shard")
