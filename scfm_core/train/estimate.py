"""The cost of a run, computed from the architecture on the meta device: parameters, memory, FLOPs, steps a day."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from scfm_core.errors import UserError
from scfm_core.launched import launched_size, local_size
from scfm_core.models.adapters import LoRABank
from scfm_core.models.protocol import ModelFamily
from scfm_core.train.activations import activations_of
from scfm_core.train.cards import GIB, LARGE, USABLE, Fit, fits, gpus_needed
from scfm_core.train.config import RunConfig
from scfm_core.train.disk import checkpoint_bytes, disk_bytes
from scfm_core.train.memory import Memory, encoders_on_gpu, estimate_memory, needs_encoders, shares
from scfm_core.train.rules import describe_micro_batches, micro_batches
from scfm_core.train.trace import Forward, forward_of
from scfm_core.train.trace_page import format_memory, format_roofline, format_traced, gib, table
from scfm_core.train.trace_step import Traced
from scfm_core.wording import count, duration

A100_PEAK = 312e12  # bf16 FLOP/s, dense (NVIDIA A100 data sheet)
ASSUMED_UTILISATION = 0.5
ASSUMED_A_NODE = 8  # GPUs
DISK_SPEEDS = (1, 10)  # GB/s, of all processes together
_SMALL_FORWARD = 1e10  # FLOPs; below it a pass takes as long as its kernels take to launch


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Numbers of a dry run. FLOPs count a multiply-add as two."""

    base_parameters: int
    trained_parameters: int
    adapted_linears: int
    tokens: int
    """Image and text tokens of a sample."""
    text_tokens: int
    """Text tokens of a sample."""
    forward_flops: float
    """One forward pass of one sample through the network without adapters."""
    step_flops: float
    """One sample in a training step: forward passes, backward pass, recomputation."""
    memory: dict[str, float]
    """Bytes on one GPU, by part."""
    host_memory: dict[str, float]
    """Bytes of one node in host memory, by part."""
    a_node: int
    """Number of processes of a node, as assumed for `host_memory`."""
    checkpoint: dict[str, float]
    """Bytes of one checkpoint, by kind of file."""
    encoders_if_images: float
    """Bytes of VAE and text encoders on a GPU, which are needed in addition if the shards hold images. 0 for a folder of images:
    there `memory` includes them."""
    encoders_on_host: float
    """Bytes of VAE and text encoders in the host memory of one process, while it loads them."""
    world: int
    """Number of processes."""
    cards: list[Fit]
    """On which sizes of a GPU the run fits."""
    gpus_needed: int | None
    """A number of GPUs on which it fits, if it fits none of the sizes now."""
    activations: dict[str, float]
    """Bytes that the passes of a micro-batch save, by mode of checkpointing."""
    traced: Traced | None
    """The traced step. Then FLOPs, and what fits where, are the trace's."""

    @property
    def samples_per_day(self) -> float:
        """Samples that one A100 trains in a day at the assumed utilisation."""
        return A100_PEAK * ASSUMED_UTILISATION * 86400 / self.step_flops


def processes_a_node(world: int) -> int:
    """Processes of one node: those of this launch, or up to 8."""
    return min(world, local_size() if launched_size() > 1 else ASSUMED_A_NODE)


def estimate(config: RunConfig, family: ModelFamily, world: int = 1, traced: Traced | None = None) -> Estimate:
    """Estimate a run on `world` processes, without loading anything.

    Args:
        config: the run.
        family: its model.
        world: number of processes.
        traced: its traced step on as many processes. Variants of the run differ from it by as much as their formulas do.
    """
    network = family.meta_network()
    shapes = [tuple(parameter.shape) for parameter in network.parameters()]
    base = sum(p.numel() for p in network.parameters())
    channels, height, width = family.latent_shape(*config.data.resolution)
    forward = forward_of(family, (channels, height, width), config.model.text_length)
    text_tokens = family.text_tokens(config.model.text_length)
    tokens = height * width // family.patch**2 + text_tokens

    adapted, trained, lora = 0, base, 0.0
    if config.train.weights == "lora":
        try:
            bank = LoRABank(network, config.lora, with_fake=config.method.has_matching)
        except ValueError as error:
            raise UserError(str(error)) from error
        factors = bank.parameters("student")
        shapes = [tuple(factor.shape) for factor in factors.values()]
        adapted, trained = len(bank.layers), sum(p.numel() for p in factors.values())
        lora = 2.0 * sum(p.numel() * forward.rows.get(name.rpartition(".lora_")[0], 0) for name, p in factors.items())
    step = traced.sample_flops if traced is not None else _step_flops(config, forward, lora, family.passes)

    def memory_of(variant: RunConfig, number: int = world) -> Memory:
        return estimate_memory(variant, family, network, forward.rows, base, trained, number, processes_a_node(number))

    def gpu_bytes(variant: RunConfig, processes: int = world) -> float:
        return correction + sum(memory_of(variant, processes).gpu.values())

    memory = memory_of(config)
    correction = 0.0 if traced is None else traced.peak + memory.gpu["encoders (on the fly)"] - sum(memory.gpu.values())
    encoders = 0.0 if needs_encoders(config) else encoders_on_gpu(config, family)
    cards = fits(config, world, gpu_bytes, len(family.blocks(network)), encoders)
    fitting = any(card.fits for card in cards)
    return Estimate(
        base_parameters=base,
        trained_parameters=trained,
        adapted_linears=adapted,
        tokens=tokens,
        text_tokens=text_tokens,
        forward_flops=forward.linear + forward.attention,
        step_flops=step,
        memory=memory.gpu,
        host_memory=memory.host,
        a_node=processes_a_node(world),
        checkpoint=checkpoint_bytes(config, shapes, world),
        encoders_if_images=encoders,
        encoders_on_host=float(family.encoder_bytes),
        world=world,
        cards=cards,
        gpus_needed=None if fitting else gpus_needed(config, world, lambda number: gpu_bytes(config, number)),
        activations={mode: _activations(config, family, world, mode) for mode in ("none", "selective", "full")},
        traced=traced,
    )


def _activations(
    config: RunConfig, family: ModelFamily, world: int, mode: Literal["none", "selective", "full"]
) -> float:
    variant = replace(config, train=replace(config.train, activation_checkpointing=mode))
    return micro_batches(config, world).size * activations_of(variant, family).saved


def _step_flops(config: RunConfig, forward: Forward, lora: float, guided: int) -> float:
    """FLOPs of one sample in a training step. A guided velocity takes `guided` passes, one of them with gradient.

    Backward pass, in forward passes of the same part: 1 for the linears' input gradients and 1 for their weight gradients, if
    the base is trained; 2 for attention (four products); 2 for adapters.
    """
    a_pass = forward.linear + forward.attention + lora
    full = config.train.weights == "full"
    backward = forward.linear * (2 if full else 1) + 2 * forward.attention + 2 * lora
    recomputed = {"none": 0.0, "selective": 0.0, "full": a_pass}[config.train.activation_checkpointing]
    trained = 1 + config.method.matching_fraction  # the student's passes and those of the fake score
    return a_pass * (sum(config.method.passes(guided)) + config.method.matching_fraction) + trained * (
        backward + recomputed
    )


def format_estimate(result: Estimate, config: RunConfig, kernels: str) -> str:
    """The output of a dry run; `kernels` describes the kernels of the blocks."""
    lines = [
        f"model       {config.model.path}",
        f"base        {_count(result.base_parameters)} parameters",
        f"trained     {_trained(result, config)}",
        f"sample      {config.data.resolution[0]} x {config.data.resolution[1]} pixels, {result.tokens} tokens "
        f"({result.text_tokens} of text)",
        f"compute     {_flops(result.forward_flops)} a forward, {_flops(result.step_flops)} a sample "
        f"in a step (checkpointing: {config.train.activation_checkpointing})",
        *_time(result, config),
        f"engine      {_engine(config, result.world)}",
        f"kernels     {kernels}",
        f"micro-batch {describe_micro_batches(config, result.world)}",
        *(
            format_memory(result.memory)
            if result.traced is None
            else format_traced(result.traced, result.memory, compiled=config.train.compile)
        ),
    ]
    if result.encoders_if_images:
        lines.append(f"  {'and if shards hold images':<28} {gib(result.encoders_if_images)} of encoders")
    elif needs_encoders(config):
        lines.append("  a cache of `scfm data encode` saves the encoders' part")
    lines += [
        f"host memory of a node with {count(result.a_node, 'process', 'processes')}, besides Python, CUDA and data workers",
        *table(result.host_memory),
    ]
    more = result.a_node * result.encoders_on_host - result.host_memory["encoders while loading"]
    if result.encoders_if_images and more:
        lines.append(f"  {'and if shards hold images':<28} {gib(more)} of encoders")
    by_mode = ", ".join(f"{mode} {size / GIB:.2f}" for mode, size in result.activations.items())
    lines.append(f"activations that a micro-batch saves, by checkpointing: {by_mode} GiB (formula)")
    lines += _disk(result, config)
    if sum(result.memory.values()) > GIB:  # a smaller run fits anywhere
        lines += [
            f"fits, if the total at the peak is at most {USABLE:.0%} of the memory that the driver reports (assumed); {_source(result)}",
            *(f"  {card}" for card in result.cards),
        ]
    if result.gpus_needed:
        lines.append(f"  {LARGE} GB: fits on {result.gpus_needed} GPUs (--gpus {result.gpus_needed})")
    if result.traced is not None and sum(result.memory.values()) > GIB:
        lines += format_roofline(result.traced, micro_batches(config, result.world).number, config.train.steps)
    return "\n".join(lines)


def _source(result: Estimate) -> str:
    if result.traced is None:
        return "all of it by formula"
    return "this run by the trace, with other settings by the trace and formulas of the difference"


def _trained(result: Estimate, config: RunConfig) -> str:
    if config.train.weights == "full":
        return f"all {_count(result.trained_parameters)} parameters (full weights)"
    return (
        f"{result.adapted_linears} adapted linears, {_count(result.trained_parameters)} adapter parameters "
        f"(rank {config.lora.rank}), three adapters"
    )


def _time(result: Estimate, config: RunConfig) -> list[str]:
    """The duration on A100s; for a network so small that its FLOPs do not decide the duration, only the number of samples."""
    train, per_day = config.train, result.samples_per_day
    samples = train.steps * train.global_batch_size
    run = f"this run    {train.steps:,} steps, {samples:,} samples"
    if result.forward_flops < _SMALL_FORWARD:
        return [run]
    hours = samples / per_day * 24
    several = (
        f"; {hours / result.world:,.1f} hours on {result.world} A100s, without communication"
        if result.world > 1
        else ""
    )
    return [
        f"A100-day    {per_day:,.0f} samples, {per_day / train.global_batch_size:,.0f} steps of batch "
        f"{train.global_batch_size}, at {ASSUMED_UTILISATION:.0%} of {A100_PEAK / 1e12:.0f} TFLOP/s (assumed); encoders not counted",
        f"{run}, {hours:,.1f} A100-hours{several}",
    ]


def _disk(result: Estimate, config: RunConfig) -> list[str]:
    """What a run writes. Disks are counted in powers of ten."""
    total = sum(result.checkpoint.values())
    times = ", ".join(f"{duration(math.ceil(total / 1e9 / speed))} at {speed} GB/s" for speed in DISK_SPEEDS)
    return [
        f"checkpoint  {_bytes(total)}: written in {times}",
        *(f"  {name:<36} {_bytes(size)}" for name, size in result.checkpoint.items()),
        f"disk        {_bytes(disk_bytes(config, total))} in run.dir: checkpoint.keep={config.checkpoint.keep}, one more while it is "
        f"written, and 1 GB for the other files",
    ]


def _bytes(size: float) -> str:
    if size >= 1e12:
        return f"{size / 1e12:,.2f} TB"
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def _engine(config: RunConfig, world: int) -> str:
    engine, share = config.engine, shares(config, world)
    if world == 1 and engine.name == "fsdp2":
        return "one process"
    offload = ", offloaded to the CPU" if engine.cpu_offload else ""
    if engine.name == "deepspeed":
        return f"DeepSpeed ZeRO-{engine.zero_stage} on {world} GPUs{offload}"
    if share.weights == 1:
        return f"{world} GPUs, each with all weights; gradients of the trained ones are reduced"
    kind = "FSDP2" if share.weights == world else f"HSDP, {world // share.weights} replicas of {share.weights} shards"
    return f"{kind} on {world} GPUs{offload}"


def _flops(number: float) -> str:
    return f"{number / 1e12:,.3g} TFLOPs" if number >= 1e9 else f"{number / 1e6:,.3g} MFLOPs"


def _count(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.1f} B"
    return f"{number / 1e6:.0f} M" if number >= 1e8 else f"{number / 1e6:.2f} M"
