"""One training step of a run at its true size on meta tensors: the real trainer, without data, weights or a GPU."""

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from scfm_core.data.fields import PackedTokens
from scfm_core.data.schema import Batch
from scfm_core.errors import UserError
from scfm_core.kernels.attention import AttentionChoice
from scfm_core.models.adapters import ADAPTERS
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.protocol import ModelFamily
from scfm_core.train.assemble import build_family
from scfm_core.train.config import RunConfig
from scfm_core.train.inputs import BatchEncoder
from scfm_core.train.kernels import Kernels
from scfm_core.train.rules import check_base
from scfm_core.train.rules import micro_batches as micro_batches_of
from scfm_core.train.sources import Sources
from scfm_core.train.trace_device import GpuFunctions, as_gpu, fake_world
from scfm_core.train.trace_memory import reserved_bytes
from scfm_core.train.trace_mode import Recorder
from scfm_core.train.trace_ops import Operation
from scfm_core.train.trainer import Trainer

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What one process does in a step."""

    peak: int
    """Bytes of all tensors, each rounded up to 512, at the largest."""
    peak_by_part: dict[str, int]
    """The same by part, the largest first."""
    reserved: int
    """Bytes that PyTorch's caching allocator reserves for them, by a model of it; see `reserved_bytes`."""
    micro_batches: int
    """Number of traced micro-batches; a step may have more."""
    micro_batch_size: int
    flops: float
    """A multiply-add counts as two."""
    operators: list[Operation]
    collectives: dict[str, tuple[int, float]]
    """Calls, and bytes of the larger side, by kind."""
    reads: int
    """How often the host waits for a value."""
    kernels: str
    """The kernels that the trace assumes."""

    @property
    def sample_flops(self) -> float:
        """FLOPs of one sample."""
        return self.flops / (self.micro_batches * self.micro_batch_size)

    @property
    def launches(self) -> int:
        """Kernels of the step, estimated."""
        return round(sum(operation.launches for operation in self.operators))


def why_not_traced(config: RunConfig) -> str | None:
    """Why the step of a run cannot run on meta tensors; None if it can."""
    if config.engine.name == "deepspeed":
        return "DeepSpeed's step does not run on meta tensors"
    if config.engine.cpu_offload:
        return "with engine.cpu_offload the optimizer runs on the host"
    return None


def trace_step(config: RunConfig, *, world: int = 1, micro_batches: int = 2) -> Traced:
    """Trace a step on rank 0 of `world` processes.

    The kernels are those of a GPU that supports all of them; `kernels.attention=auto` is FlashAttention, or cuDNN with a mask.
    Captions have the full length. With `train.compile` the elementwise operators are a model of what it fuses: see `Recorder`.
    Text encoders, VAE and CUDA graphs are not traced.

    Args:
        config: the run.
        world: number of processes; the others do not exist.
        micro_batches: how many of the step's to run at most. The peak is in the second one, if gradients accumulate.

    Raises:
        UserError: if the step cannot be traced, or the configuration does not fit the model.
    """
    if (reason := why_not_traced(config)) is not None:
        raise UserError(f"this run cannot be traced: {reason}. Use the estimate: scfm train ... --dry-run --estimate")
    check_base(config, world)
    variant = _without_outputs(config)
    is_lora = config.train.weights == "lora"
    recorder = Recorder(rank=config.lora.rank if is_lora else 0, compiled=config.train.compile)
    memory = recorder.memory
    with fake_world(world) as processes, as_gpu(recorder) as functions, recorder:
        memory.part = "inputs and targets"
        trainer = Trainer(variant, world=processes, sources=_sources(variant))
        _label(trainer, recorder)
        shape = micro_batches_of(config, world)
        data = [
            _batch(config, trainer.family, number, shape.size) for number in range(min(micro_batches, shape.number))
        ]
        memory.start()
        recorder.is_on = True
        with _phases(trainer, recorder, functions):
            meter = trainer._backward(data)
            trainer._finish_step(meter, data, [], time.perf_counter())
        recorder.is_on = False
        operators = recorder.operators()
        return Traced(
            peak=memory.peak,
            peak_by_part=memory.peak_by_part(),
            reserved=reserved_bytes(memory.events),
            micro_batches=len(data),
            micro_batch_size=shape.size,
            flops=sum(operation.flops for operation in operators),
            operators=operators,
            collectives=recorder.collectives,
            reads=recorder.reads,
            kernels=str(trainer.kernels),
        )


def _without_outputs(config: RunConfig) -> RunConfig:
    """The run without validation grids, and without what a trace models (compilation) or leaves out (CUDA graphs)."""
    return replace(
        config,
        sample=replace(config.sample, every=0, teacher_steps=0),
        train=replace(config.train, compile=False),
        kernels=replace(config.kernels, cuda_graphs=False),
    )


def _sources(config: RunConfig) -> Sources:
    family = functools.partial(build_family, offline=True)
    return Sources(
        device=lambda _: META,
        corpus=_corpus,
        family=family,
        kernels=assumed_kernels,
        encoder=_Encoder,
        fill=lambda name, part, start: None,
    )


def _corpus(config: Any, *, with_paths: bool = False) -> Any:
    """In place of the data: a cache of this model's encoders."""
    return SimpleNamespace(
        is_cached=True,
        fingerprint="traced",
        notes=(),
        paddings={},
        order=lambda *_: None,
        first_items=dict,
        networks=dict,
    )


def assumed_kernels(config: RunConfig, family: ModelFamily, device: torch.device = META) -> Kernels:
    """As `choose_kernels` on a GPU that supports all kernels, without measurements."""
    fused = config.kernels.fused if family.has_kernels else "none"
    if fused == "auto":
        fused = "triton"
    backend = config.kernels.attention
    if backend == "auto":
        backend = "cudnn" if family.masks_attention else "flash"
    elif backend in ("flash3", "flash4", "xformers"):  # they save and return the same tensors
        backend = "flash"
    return Kernels(fused, "assumed", AttentionChoice(backend, "assumed"))


class _Encoder(BatchEncoder):
    """Takes the batches of `_batch`; loads no encoders."""

    def __init__(self, config: RunConfig, family: ModelFamily, corpus: Any, device: torch.device, *_: Any) -> None:
        self.device, self.text, self.vae, self.prompts, self.prompt_cond, self.paddings = (
            device,
            None,
            None,
            [],
            None,
            {},
        )
        family.unconditional = any_caption(family, config.model.text_length)


def any_caption(family: ModelFamily, text_length: int) -> Conditioning:
    """One row on the meta device, of the full length."""
    fields = {
        name: torch.empty(1, *shape, device=META, dtype=torch.bfloat16)
        for name, shape in family.shapes(text_length).items()
    }
    is_masked = "masked" in family.fields.values()
    return Conditioning(fields=fields, lengths=(family.text_tokens(text_length),) if is_masked else None)


def _batch(config: RunConfig, family: ModelFamily, number: int, size: int) -> Batch:
    """A micro-batch of a cache, with captions of the full length."""
    channels, height, width = family.latent_shape(*config.data.resolution)
    fields: dict[str, PackedTokens | Tensor] = {}
    for name, shape in family.shapes(config.model.text_length).items():
        if family.fields[name] == "vector":
            fields[name] = torch.empty(size, *shape, dtype=torch.bfloat16)
        else:
            paddings = None if family.fields[name] == "masked" else (None,) * size
            tokens = torch.empty(size * shape[0], *shape[1:], dtype=torch.bfloat16)
            fields[name] = PackedTokens(tokens, (shape[0],) * size, paddings)
    path = None
    if config.method.has_stored_paths:
        intervals = math.lcm(*config.method.trajectory_grids)
        path = {
            "velocities": torch.empty(size, intervals, channels, height, width, dtype=torch.bfloat16),
            "sigmas": torch.linspace(1, 0, intervals + 1).repeat(size, 1),
            "guidance": torch.full((size,), float(config.method.guidance[0])),
        }
    matching = config.method.matching
    taught = matching.warmup + matching.every - 1  # the first step in which the student learns from matching rows
    first = taught * config.train.global_batch_size + number * size
    return Batch(
        sample_ids=torch.arange(first, first + size),
        keys=["traced"] * size,
        captions=[""] * size,
        latents=torch.empty(size, channels, height, width, dtype=torch.bfloat16),
        fields=fields,
        images=None,
        path=path,
    )


def _label(trainer: Trainer, recorder: Recorder) -> None:
    """Name the parts of what is in memory before the first step."""
    memory, is_lora = recorder.memory, trainer.config.train.weights == "lora"
    for role, network in trainer.model.networks.items():
        part = "frozen base" if is_lora else "teacher" if role == "teacher" else role
        for tensor in (*network.parameters(), *network.buffers()):
            memory.label(_local(tensor), part)
    parts = {"student": "student", "ema_fast": "EMAs", "ema_slow": "EMAs", "fake": "fake score"}
    for role, part in ((role, parts[role]) for role in (*ADAPTERS, *trainer.model.trained[1:])):
        for tensor in trainer.model.parameters(role).values():
            memory.label(_local(tensor), part)
    for layer in getattr(trainer.model, "bank", SimpleNamespace(layers={})).layers.values():
        for copy in (*(layer.copies or ()), *(layer.own_copies or ())):
            memory.label(copy, "adapter in the compute dtype")
    for state in trainer.engine._optimizer.state.values():  # type: ignore[attr-defined]
        for tensor in state.values():
            memory.label(tensor, "Adam")
    for parameter in _trained(trainer):
        memory.label(_local(parameter.grad), "gradients")


def _trained(trainer: Trainer) -> Iterator[Tensor]:
    """All trained weights: the student's, and the fake score's."""
    for role in trainer.model.trained:
        yield from trainer.model.parameters(role).values()


def _local(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def _phases(trainer: Trainer, recorder: Recorder, functions: GpuFunctions) -> Iterator[None]:
    """Names of the phases of the step, and of what is allocated in them."""
    objective, engine = trainer.objective, trainer.engine
    dtype = trainer.model.compute_dtype if getattr(trainer.model, "_mixed", False) else None  # type: ignore[attr-defined]

    def named(holder: Any, name: str, phase: str, part: str) -> None:
        call = getattr(holder, name)

        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            with recorder.within(phase, part):
                return call(*args, **kwargs)

        setattr(holder, name, run)

    recorder.phase, recorder.memory.part = "prepare", "inputs and targets"
    named(objective, "_near", "near", "activations of passes without gradient")
    named(objective, "_far", "far", "activations of passes without gradient")
    named(objective, "_student", "flow map", "activations of passes without gradient")
    named(objective, "_teacher", "teacher", "activations of passes without gradient")
    if objective.matching is not None:
        named(objective.matching, "real", "teacher's score", "activations of passes without gradient")
        named(objective.matching, "fake", "fake score", "saved activations")
    named(trainer.model, "student_velocity", "student", "saved activations")
    named(engine, "backward", "backward", "temporaries of the backward")
    named(engine, "reduce", "reduce", "temporaries of the optimizer")
    named(engine, "step", "adam", "temporaries of the optimizer")
    named(trainer, "_update_averages", "ema", "temporaries of the optimizer")
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: recorder.memory.label(_local(p.grad), "gradients"))
        for parameter in _trained(trainer)
    ]
    backward = engine.backward

    def under_autocast(loss: Tensor) -> None:
        with functions.autocast(dtype):  # for recomputed blocks
            backward(loss)

    engine.backward = under_autocast  # type: ignore[method-assign]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
