"""Memory of the activations of one sample, measured on the meta device with a few of the network's blocks."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scfm_core.filling import materialise
from scfm_core.kernels.attention import AttentionChoice
from scfm_core.models.adapters import LoRAConfig
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.quantised import Base, quantise_linears
from scfm_core.models.student import LoRAModel
from scfm_core.train.config import RunConfig
from scfm_core.train.device import compute_dtype
from scfm_core.train.kernels import Kernels
from scfm_core.train.network import set_activation_checkpointing
from scfm_core.train.trace import architecture
from scfm_core.train.trace_device import GpuFunctions, as_gpu
from scfm_core.train.trace_mode import Recorder
from scfm_core.train.trace_step import META, any_caption, assumed_kernels

_FEW = 2
"""Blocks of each list that run: the others cost the same again."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one sample."""

    saved: float
    """What the student's pass saves for the backward."""
    temporary: float
    """What the backward pass needs beyond that, recomputed activations too."""
    without_gradient: float
    """What a pass without gradient needs."""


def activations_of(config: RunConfig, family: ModelFamily) -> Activations:
    """The activations of a run, for a sample with a caption of the full length."""
    is_lora, kernels = config.train.weights == "lora", assumed_kernels(config, family)
    assert kernels.attention is not None
    key = (
        architecture(family),
        (*config.data.resolution, config.model.text_length),
        config.lora if is_lora else None,
        config.model.base,
        config.train.activation_checkpointing,
        kernels.fused,
        kernels.attention.backend,
        compute_dtype(config),
        config.method.student_is_guided or family.guidance_kind == "input",
    )
    if key not in _KNOWN:
        _KNOWN[key] = _measured(family, *key[1:])
    return _KNOWN[key]


_KNOWN: dict[tuple, Activations] = {}
"""A dry run compares many variants of a run."""


def _measured(
    family: ModelFamily, size: tuple[int, int, int], lora: LoRAConfig | None, base: Base, checkpointing: str, fused: str, backend: str,
    dtype: torch.dtype, is_guided: bool,
) -> Activations:  # fmt: skip
    recorder, narrow = Recorder(), None if lora or dtype == torch.float32 else dtype
    memory = recorder.memory
    few, counts = _few_blocks(family, dtype)
    with as_gpu(recorder) as functions, recorder, _with_empty_caption(family, size[2]):
        network = copy.deepcopy(few)
        model = None
        if lora is not None:
            model = LoRAModel(family, network, lora)
            quantise_linears(network, family.blocks(network), base)
        Kernels(fused, "", AttentionChoice(backend, "")).apply(family, network)
        set_activation_checkpointing(family.blocks(network), checkpointing)
        materialise(network, META, lambda name, part, start: None)
        if model is not None:
            model.bank.keep_copies()
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: memory.label(p.grad, "gradients"))
        kept = {name: list(getattr(network, name)) for name in counts}

        def velocity(role: str) -> Tensor:
            x, ones = torch.empty(1, *family.latent_shape(*size[:2]), device=META), torch.ones(1, device=META)
            cond = any_caption(family, size[2]).with_guidance(ones if is_guided else None)
            with functions.autocast(narrow):
                if model is not None:
                    return model.velocity(role, x, ones, cond, torch.ones(1))
                return family.velocity(network, x, ones, cond)

        def measure(numbers: dict[str, int]) -> tuple[float, float]:
            """Bytes saved; at the peak of the backward, without the weights' gradients."""
            for name, number in numbers.items():
                setattr(network, name, nn.ModuleList(kept[name][:number]))
            return _training_pass(network, recorder, functions, velocity, narrow)

        ones = {name: min(1, count) for name, count in counts.items()}
        saved, peak = measure(ones)
        without = _pass_without_gradient(recorder, velocity)
        temporary, total = peak - saved, saved
        for name, count in counts.items():
            if count > 1:
                more = measure({**ones, name: _FEW})
                total += (count - 1) * (more[0] - saved)
                temporary = max(temporary, more[1] - more[0])
    return Activations(total, max(temporary, 0.0), without)


def _few_blocks(family: ModelFamily, dtype: torch.dtype) -> tuple[nn.Module, dict[str, int]]:
    """The network with `_FEW` blocks in each list, and how many each list has. Made once, and without a recorder, which would take long."""
    key = (architecture(family), dtype)
    if key not in _NETWORKS:
        with META:  # its buffers too: tables of positions take a second to compute
            network = family.empty_network(dtype)
        counts = {name: len(getattr(network, name)) for name in family.block_lists}
        for name in counts:
            setattr(network, name, getattr(network, name)[:_FEW])
        _NETWORKS[key] = network, counts
    return _NETWORKS[key]


_NETWORKS: dict[tuple[str, torch.dtype], tuple[nn.Module, dict[str, int]]] = {}


def _pass_without_gradient(recorder: Recorder, velocity: Callable[[str], Tensor]) -> float:
    """Bytes at the peak."""
    before = recorder.memory.total
    recorder.memory.start()
    with torch.inference_mode():
        velocity("ema_slow")
    return recorder.memory.peak - before


def _training_pass(
    network: nn.Module, recorder: Recorder, functions: GpuFunctions, velocity: Callable[[str], Tensor], narrow: torch.dtype | None
) -> tuple[float, float]:  # fmt: skip
    memory = recorder.memory
    before = memory.total
    out = velocity("student")
    saved = memory.total - before
    memory.start()
    with functions.autocast(narrow):  # for recomputed blocks
        out.backward(torch.empty_like(out))
    peak = memory.peak - before - memory.peak_by_part().get("gradients", 0)
    for parameter in network.parameters():
        parameter.grad = None
    return saved, peak


@contextlib.contextmanager
def _with_empty_caption(family: ModelFamily, text_length: int) -> Iterator[None]:
    before = family.unconditional
    family.unconditional = any_caption(family, text_length)
    try:
        yield
    finally:
        family.unconditional = before
