"""From configuration to the parts of a run: family, layout, model, engine."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scfm_core.distributed.deepspeed import ZeroEngine, ZeroLayout
from scfm_core.distributed.deepspeed_config import deepspeed_config
from scfm_core.distributed.engine import Engine, Layout, OptimizerConfig
from scfm_core.distributed.fsdp2 import Fsdp2Engine, Fsdp2Layout
from scfm_core.distributed.lockstep import Lockstep
from scfm_core.distributed.world import World
from scfm_core.errors import UserError
from scfm_core.filling import Fill, materialise, zeros
from scfm_core.models.adapters import ADAPTERS
from scfm_core.models.families import open_family
from scfm_core.models.offload import Offload, fill_on_host, spread
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.quantised import quantise_linears
from scfm_core.models.student import FullModel, LoRAModel, ShortcutModel
from scfm_core.train.config import RunConfig
from scfm_core.train.device import compute_dtype
from scfm_core.train.kernels import Kernels
from scfm_core.train.network import compile_blocks, set_activation_checkpointing
from scfm_core.train.rules import check_model, check_shards, micro_batches
from scfm_core.train.start import open_start
from scfm_core.train.trace import forward_of


def build_family(config: RunConfig, *, offline: bool = False) -> ModelFamily:
    """The model family of `config.model`, with its folder found or downloaded.

    Args:
        config: the run.
        offline: download nothing; of a known hub id only the architecture is available.

    Raises:
        UserError: if the model is missing, or does not fit the configuration.
    """
    family = open_family(config.model.path, offline=offline, adapters=config.model.adapters)
    check_model(config, family)
    return family


def build_layout(config: RunConfig, world: World, device: torch.device) -> Layout:
    """How `config.engine` distributes networks over the processes; UserError if the configuration does not allow it."""
    check_shards(config, world.size)
    if config.engine.name == "fsdp2":
        return Fsdp2Layout(config.engine, world, device, compute_dtype(config))
    settings = optimizer_config(config, world.size)
    return ZeroLayout(deepspeed_config(config.engine, settings, world.size, config.train.weights), world, device)


def optimizer_config(config: RunConfig, processes: int) -> OptimizerConfig:
    """The settings of `config.train` that an engine needs."""
    train, micro = config.train, micro_batches(config, processes)
    return OptimizerConfig(
        betas=train.betas,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        accumulation=micro.number,
        micro_batch_size=micro.size,
        lr=train.lr,
        compute_dtype=train.compute_dtype,
        fake_lr=config.method.matching.fake_lr,
    )


def build_engine(config: RunConfig, model: ShortcutModel, layout: Layout, world: World) -> Engine:
    """The engine of a run, over the model that was built with `layout`."""
    settings = optimizer_config(config, world.size)
    if isinstance(layout, ZeroLayout):
        return ZeroEngine(model.parameters, model.networks, layout, world, settings, model.trained)
    assert isinstance(layout, Fsdp2Layout)
    return Fsdp2Engine(model.parameters, model.networks, layout, world, settings, model.trained)


def build_model(
    config: RunConfig,
    family: ModelFamily,
    device: torch.device,
    *,
    kernels: Kernels,
    layout: Layout | None = None,
    world: World | None = None,
    with_teacher: bool = True,
    fill: Fill | None = None,
    adapters_from: Path | None = None,
) -> ShortcutModel:
    """For training: student, EMAs and teacher. For sampling: the weights of `sample.weights`, and the teacher.

    Networks are made on the meta device, distributed, and filled from their files: a process reads its own part and no more. The
    files are checked first, which is local work; then all ranks agree, before an engine communicates.

    Args:
        config: the run.
        family: how to make and call the network.
        device: where the weights go.
        kernels: which kernels the blocks use.
        layout: for training on these processes, with activation checkpointing and compilation.
            None: for sampling; full weights are loaded in the compute dtype, as in an exported pipeline.
        world: the processes, each of which calls this.
        with_teacher: load the teacher of full weights, if the run has one; for sampling also if it made the stored paths.
        fill: writes all weights, in place of the files and the initial values.
        adapters_from: the weights that adapters start from; see `find_start`.

    Raises:
        UserError: on every rank, if weights are missing or damaged, or do not fit the configuration.
    """
    dtype, is_lora = compute_dtype(config), config.train.weights == "lora"
    needs_teacher = config.method.has_teacher if layout is not None else config.method.follows_teacher
    has_teacher = with_teacher and needs_teacher and not is_lora
    prepare = _preparation(config, family, kernels, layout, device)
    with contextlib.ExitStack() as stack:
        with (world or World()).together():
            network = _empty_network(family, dtype if is_lora or layout is None else torch.float32, device)
            shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
            start, pretrained = (fill, fill) if fill else _weights(config, family, network, stack, has_teacher)
            adapted = _adapted(config, family, network, layout) if is_lora else None
            own = None
            if adapted is not None and adapters_from is not None:
                own = open_start(adapters_from, config, family, adapted.shapes())
        if adapted is not None:
            number = config.model.offload_blocks if layout is not None else 0
            fill_on_host(spread(family.blocks(network), number))
            prepare(network, True, fill or adapted.bank.filling(start, own))
            if number:  # `prepare` may have replaced the blocks
                Offload(spread(family.blocks(network), number), device)
            _after_filling(config, family, adapted, layout)
            return adapted
        roles = ADAPTERS if layout is not None else (config.sample.weights,)
        networks = _full_networks(family, network, roles, prepare, start, device)
        if has_teacher:
            networks["teacher"] = _empty_network(family, dtype, device)
            prepare(networks["teacher"], False, pretrained)
    return FullModel(family, networks, shapes, dtype, **_near_pass(config, networks, layout, world or World()))


def _full_networks(
    family: ModelFamily,
    network: nn.Module,
    roles: Sequence[str],
    prepare: Callable[[nn.Module, bool, Fill], None],
    start: Fill,
    device: torch.device,
) -> dict[str, nn.Module]:
    """Full weights by role; the first role, whose network is given, is trained, and the others are as it is after `DualEMA`."""
    networks = {role: network if role == roles[0] else _empty_network(family, torch.float32, device) for role in roles}
    for role in roles:
        # DualEMA sets the averages to the student, but not their buffers.
        prepare(networks[role], role == roles[0], start if role == roles[0] else zeros)
        for name, buffer in networks[role].named_buffers():
            buffer.copy_(networks[roles[0]].get_buffer(name))
    return networks


def _empty_network(family: ModelFamily, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """See `ModelFamily.empty_network`. A trace needs no values of buffers: tables of positions take a second to compute."""
    with device if device.type == "meta" else contextlib.nullcontext():
        return family.empty_network(dtype)


def _near_pass(
    config: RunConfig, networks: dict[str, nn.Module], layout: Layout | None, world: World
) -> dict[str, Any]:
    """How a near pass of full weights runs, as options of `FullModel`."""
    mixed = config.method.teacher_fraction > 0 and config.method.near == "ema"
    if not mixed or layout is None or not layout.is_sharded:
        return {}
    if isinstance(layout, Fsdp2Layout) and micro_batches(config, world.size).size == 1:
        return {"near_is_collective": True, "lockstep": Lockstep(networks["teacher"], networks["ema_fast"])}
    return {"near_is_collective": True}


def _after_filling(config: RunConfig, family: ModelFamily, adapted: LoRAModel, layout: Layout | None) -> None:
    """What needs the weights' values or their device."""
    if layout is None or not layout.is_sharded:
        adapted.bank.keep_copies(of_student=config.method.is_student_first)
    if config.kernels.fp8 and layout is not None:
        adapted.bank.quantise(_traced_rows(config, family))


def _weights(
    config: RunConfig, family: ModelFamily, network: nn.Module, stack: contextlib.ExitStack, has_teacher: bool
) -> tuple[Fill, Fill]:
    """What fills the trained network and the teacher. Files are open until `stack` closes.

    Raises:
        UserError: if files are missing or damaged, or do not fit `network`.
    """
    family.fingerprint  # noqa: B018  (kept from now on: checkpoints name what is loaded here, also if the files go away)
    start = pretrained = zeros
    if has_teacher or config.model.init != "random":
        start = pretrained = stack.enter_context(family.open_weights(network)).fill
    if config.model.init == "random":
        start = family.random_weights(config.run.seed).fill
    return start, pretrained


def _traced_rows(config: RunConfig, family: ModelFamily) -> dict[str, int]:
    """Input rows of each linear, for one sample of the run."""
    return forward_of(family, family.latent_shape(*config.data.resolution), config.model.text_length).rows


def _adapted(config: RunConfig, family: ModelFamily, network: nn.Module, layout: Layout | None) -> LoRAModel:
    try:
        with_fake = config.method.has_matching and layout is not None
        adapted = LoRAModel(family, network, config.lora, config.run.seed, with_fake=with_fake)
    except ValueError as error:
        raise UserError(str(error)) from error
    base = config.model.base if layout is not None else config.sample.base
    quantise_linears(network, family.blocks(network), base)
    return adapted


def _preparation(
    config: RunConfig, family: ModelFamily, kernels: Kernels, layout: Layout | None, device: torch.device
) -> Callable[[nn.Module, bool, Fill], None]:
    """Prepares a network on the meta device: fused blocks; for training also activation checkpointing (if trained) and compilation;
    then its weights."""

    def prepare(network: nn.Module, trained: bool, fill: Fill) -> None:
        kernels.apply(family, network)
        if layout is None:
            materialise(network, device, fill)
            return
        blocks = family.blocks(network)
        if trained:
            set_activation_checkpointing(blocks, config.train.activation_checkpointing)
        if config.train.compile:
            compile_blocks(blocks)
        layout.prepare(network if trained else network.requires_grad_(False), blocks, fill)

    return prepare
