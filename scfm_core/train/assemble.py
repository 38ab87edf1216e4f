"""From configuration to the parts of a run: family, layout, model, engine."""

from collections.abc import Callable

import torch
from torch import nn

from scfm_core.distributed.deepspeed import ZeroEngine, ZeroLayout
from scfm_core.distributed.deepspeed_config import deepspeed_config
from scfm_core.distributed.engine import Engine, Layout, OptimizerConfig
from scfm_core.distributed.fsdp2 import Fsdp2Engine, Fsdp2Layout
from scfm_core.distributed.world import World
from scfm_core.errors import UserError
from scfm_core.models.adapters import ADAPTERS
from scfm_core.models.families import open_family
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.student import FullModel, LoRAModel, ShortcutModel
from scfm_core.train.config import RunConfig
from scfm_core.train.device import compute_dtype
from scfm_core.train.kernels import Kernels
from scfm_core.train.network import compile_blocks, set_activation_checkpointing, transformer_blocks
from scfm_core.train.rules import check_model, check_shards, micro_batches


def build_family(config: RunConfig, *, offline: bool = False) -> ModelFamily:
    """The model family of `config.model`, with its folder found or downloaded.

    Args:
        config: the run.
        offline: download nothing; of a known hub id only the architecture is available.

    Raises:
        UserError: if the model is missing, or does not fit the configuration.
    """
    family = open_family(config.model.path, offline=offline)
    check_model(config, family)
    return family


def build_layout(config: RunConfig, world: World, device: torch.device) -> Layout:
    """How `config.engine` distributes networks over the processes; UserError if the configuration does not allow it."""
    check_shards(config, world.size)
    if config.engine.name == "fsdp2":
        return Fsdp2Layout(config.engine, world, device, compute_dtype(config))
    settings = optimizer_config(config, world.size)
    return ZeroLayout(deepspeed_config(config.engine, settings, world.size, config.train.weights), device)


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
    )


def build_engine(config: RunConfig, model: ShortcutModel, layout: Layout, world: World) -> Engine:
    """The engine of a run, over the model that was built with `layout`."""
    settings = optimizer_config(config, world.size)
    if isinstance(layout, ZeroLayout):
        return ZeroEngine(model.parameters, model.networks, layout, world, settings)
    assert isinstance(layout, Fsdp2Layout)
    return Fsdp2Engine(model.parameters, model.networks, layout, world, settings)


def build_model(
    config: RunConfig,
    family: ModelFamily,
    device: torch.device,
    *,
    kernels: Kernels,
    layout: Layout | None = None,
    with_teacher: bool = True,
) -> ShortcutModel:
    """For training: student, EMAs and teacher. For sampling: the weights of `sample.weights`, and the teacher.

    Args:
        config: the run.
        family: how to load and call the network.
        device: where the weights go.
        kernels: which kernels the blocks use.
        layout: for training on these processes, with activation checkpointing and compilation. Networks that are
            sharded are loaded into host memory one after the other, and moved to the device block by block.
            None: for sampling; full weights are loaded in the compute dtype, as in an exported pipeline.
        with_teacher: load the teacher of full weights, if the run has one; for sampling also if it made the stored paths.
    """
    dtype = compute_dtype(config)
    target = torch.device("cpu") if layout is not None and layout.is_sharded else device
    prepare = _preparation(config, kernels, layout)
    is_lora = config.train.weights == "lora"
    loaded = dtype if is_lora or layout is None else torch.float32
    if config.model.init == "random":
        network = family.random_network(loaded, target, config.run.seed)
    else:
        network = family.load_network(loaded, target)
    if is_lora:
        try:
            model = LoRAModel(family, network, config.lora, config.run.seed)
        except ValueError as error:
            raise UserError(str(error)) from error
        if config.kernels.fp8 and layout is not None:
            model.bank.quantise()
        prepare(network, True)
        return model
    teacher = None
    if with_teacher and (config.method.has_teacher if layout is not None else config.method.follows_teacher):
        teacher = family.load_network(dtype, target)
        prepare(teacher, False)
    roles = ADAPTERS if layout is not None else (config.sample.weights,)
    return FullModel(family, network, dtype, teacher=teacher, roles=roles, prepare=prepare)


def _preparation(config: RunConfig, kernels: Kernels, layout: Layout | None) -> Callable[[nn.Module, bool], None]:
    """Prepares a network: fused blocks; for training also activation checkpointing (if trained), compilation, sharding."""

    def prepare(network: nn.Module, trained: bool) -> None:
        kernels.apply(network)
        if layout is None:
            return
        if trained:
            set_activation_checkpointing(network, config.train.activation_checkpointing)
        if config.train.compile:
            compile_blocks(network)
        layout.prepare(network if trained else network.requires_grad_(False), transformer_blocks(network))

    return prepare
