"""DeepSpeed's ZeRO-1, 2 and 3 behind the engine protocol.

Trained weights are fp32 in every stage. DeepSpeed's own `bf16` mode is not used: it would cast the whole module, with
EMAs and adapters, and an EMA could not read the masters without a collective. A frozen base keeps its own dtype. Full
weights compute under DeepSpeed's torch_autocast, which gathers and reduces in bf16.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from scfm_core.distributed.dcp import save_dcp
from scfm_core.distributed.deepspeed_internals import (
    Partition,
    ZeroOptimizer,
    disable_shared_memory_op,
    record_writes,
    whole_numel,
)
from scfm_core.distributed.engine import (
    Engine,
    Layout,
    OptimizerConfig,
    Parameters,
    Slot,
    moment_group,
)
from scfm_core.distributed.reader import DCP_FOLDER
from scfm_core.distributed.world import World, quiet_gloo
from scfm_core.errors import missing_extra
from scfm_core.files import Written
from scfm_core.filling import Fill, allocate, materialise, stored_tensors
from scfm_core.progress import beat


def import_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed for this kind of device.

    Raises:
        UserError: if it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise missing_extra("engine.name=deepspeed", "deepspeed", error, "set engine.name=fsdp2") from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    disable_shared_memory_op(deepspeed)
    return deepspeed  # type: ignore[no-any-return]


class ZeroLayout(Layout):
    """Under stage 3 every process holds a part of every parameter; under stages 1 and 2, all weights.

    Args:
        config: from `deepspeed_config`.
        world: the processes.
        device: of this process.
    """

    def __init__(self, config: dict[str, Any], world: World, device: torch.device) -> None:
        self.config, self.device, self._world = config, device, world
        self.deepspeed = import_deepspeed(device)
        self.deepspeed.init_distributed(dist_init_required=False)

    @property
    def is_sharded(self) -> bool:
        """See `Layout`."""
        return bool(self.config["zero_optimization"]["stage"] == 3)

    def prepare(self, network: nn.Module, blocks: list[nn.Module], fill: Fill) -> None:
        """See `Layout`. Under stage 3 one unit after the other is allocated, filled, and partitioned.

        DeepSpeed broadcasts every parameter of a unit from rank 0, so rank 0 alone reads them. A rank that raised between two
        broadcasts would leave the others waiting: the first error is kept until all units are partitioned.
        """
        if not self.is_sharded:
            materialise(network, self.device, fill)
            return
        errors: list[Exception] = []
        with _recorded(errors):
            self._fill_buffers(network, fill)
        for prefix, unit in _units(network):
            beat(f"partitioning {prefix}")
            allocate(unit, self.device)
            if self._world.is_main and not errors:
                with _recorded(errors):
                    self._fill(unit, prefix, fill)
            self.deepspeed.zero.Init(module=unit, config_dict_or_path=self._config_of_init())
        self._world.agree(errors[0] if errors else None)

    @torch.no_grad()
    def _fill_buffers(self, network: nn.Module, fill: Fill) -> None:
        """Such as a table of positions. DeepSpeed moves and sends only parameters, so every rank reads them."""
        for buffer in network.buffers():
            buffer.data = buffer.data.to(self.device)
        for name, tensor in stored_tensors(network).items():
            if not isinstance(tensor, nn.Parameter):
                fill(name, tensor.view(-1), 0)

    @torch.no_grad()
    def _fill(self, unit: nn.Module, prefix: str, fill: Fill) -> None:
        for name, tensor in stored_tensors(unit).items():
            fill(f"{prefix}.{name}".removeprefix("."), tensor.detach().view(-1), 0)

    def _config_of_init(self) -> dict[str, Any]:
        return {key: value for key, value in self.config.items() if key != "torch_autocast"}


@contextlib.contextmanager
def _recorded(errors: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        errors.append(error)


def _units(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have parameters of their own, by name, in the network's order, each without its children.

    With its children, a network that has a parameter of its own would be allocated whole on every rank.
    """
    for name, module in network.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            unit = nn.Module()
            unit._parameters = module._parameters  # the same dictionary: the module gets what is allocated here
            yield name, unit


class _Networks(nn.Module):
    """All networks of a run as one module, because DeepSpeed takes one.

    Its forward runs all passes of a micro-batch for a trained role, so ZeRO-3 can prefetch: each step has the same sequence of layers.
    With two roles the sequences alternate, and it prefetches little.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)

    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        return call()


class ZeroEngine(Engine):
    """AdamW under ZeRO.

    Args:
        parameters: of `student`, `ema_fast`, `ema_slow` by role, fp32, by canonical name.
        networks: prepared by `layout`.
        layout: of the networks.
        world: the processes.
        config: of the optimizer.
        trained: the roles that are trained.
    """

    checkpoint_kind: ClassVar[Literal["dcp", "zero"]] = "zero"

    def __init__(
        self,
        parameters: Parameters,
        networks: Mapping[str, nn.Module],
        layout: ZeroLayout,
        world: World,
        config: OptimizerConfig,
        trained: Sequence[str] = ("student",),
    ) -> None:
        self._parameters, self._world, self._config, self._roles = parameters, world, config, tuple(trained)
        self._stage: int = layout.config["zero_optimization"]["stage"]
        adam = torch.optim.AdamW(
            [{"params": list(parameters(role).values()), "lr": config.rate(role, config.lr)} for role in trained],
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        elements = sum(map(whole_numel, parameters("student").values()))  # a backward reduces those of one role
        settings = dict(layout.config, zero_optimization=dict(layout.config["zero_optimization"]))
        # DeepSpeed allocates the whole bucket. Its default of 2 GB is more than all adapters need.
        settings["zero_optimization"].setdefault("reduce_bucket_size", min(500_000_000, elements))
        self._engine, optimizer, _, _ = layout.deepspeed.initialize(
            model=_Networks(networks), optimizer=adam, config=settings, dist_init_required=False
        )
        self._backwards = 0
        """Of this step."""
        self._zero = ZeroOptimizer(optimizer, self._stage, [p for role in trained for p in parameters(role).values()])
        self._writes = record_writes(self._engine)
        self._partitions: dict[str, dict[str, Partition]] = {}
        """Of stage 3: slices by role and name."""
        self._mesh: DeviceMesh | None = None
        if self._stage == 3:
            with quiet_gloo():
                self._mesh = init_device_mesh(layout.device.type, (world.size,))
            for role in (*self._roles, "ema_fast", "ema_slow"):
                self._partitions[role] = {name: Partition(value) for name, value in parameters(role).items()}
            # ZeRO-3 keeps small weights gathered, and gathers them again after every update. For EMAs this is in vain:
            # they change after that.
            self._zero.disable_persistence(p for role in ("ema_fast", "ema_slow") for p in parameters(role).values())
        self._zero.reset_adam()

    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        """See `Engine`."""
        return self._engine(call)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """See `Engine`. DeepSpeed is told which backward is the last. An offloaded optimizer gets what a backward has reduced in
        that backward alone, so there it is the last of each role; stage 1 reduces nothing before the last of all."""
        self._backwards += 1
        left = self._config.accumulation * len(self._roles) - self._backwards
        is_last = left < len(self._roles) if self._zero.is_offloaded and self._stage > 1 else left == 0
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss / self._config.accumulation, scale_wrt_gas=False)

    def reduce(self) -> Tensor:
        """See `Engine`. DeepSpeed's own norm replaces NaN and infinity by 1, so the guard cannot use it."""
        self._backwards = 0
        if self._zero.is_offloaded and self._stage < 3 and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # DeepSpeed copies them off the GPU without waiting
        gradients = list(self._zero.reduced_gradients())
        assert gradients  # on every rank: the all-reduce is that of their device
        norms = torch.stack(torch._foreach_norm(gradients))  # type: ignore[arg-type]
        squared = norms.double().square().sum()
        if self._world.size > 1:
            dist.all_reduce(squared, group=self._world.group)
        return squared.sqrt()

    def step(self, lr: float) -> None:
        """See `Engine`."""
        self._zero.set_lr([self._config.rate(role, lr) for role in self._roles])
        self._engine.step()
        self._forget_gradients()

    def skip(self) -> None:
        """See `Engine`: DeepSpeed skips a step after an fp16 overflow; this is the same on request."""
        with self._zero.overflowed():
            self._engine.step()
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        if len(self._roles) > 1:
            self._zero.clear_buffers()

    def ema_tensors(self, role: str) -> dict[str, Tensor]:
        """See `Engine`: whole weights in stages 1 and 2, this rank's slices in stage 3."""
        if self._stage < 3:
            return {name: parameter.detach() for name, parameter in self._parameters(role).items()}
        for partition in self._partitions[role].values():
            partition.clear_padding()
        return {name: partition.padded for name, partition in self._partitions[role].items()}

    def after_ema_update(self) -> None:
        """See `Engine`: a weight that ZeRO-3 still holds gathered is outdated, so it is dropped."""
        if self._stage < 3:
            return
        for role in ("ema_fast", "ema_slow"):
            for partition in self._partitions[role].values():
                partition.drop_gathered()
        if self._mesh is not None and self._mesh.device_type == "cuda":
            # DeepSpeed gathers on a stream of its own, which does not wait for the averages' update on this one.
            torch.cuda.current_stream().synchronize()

    def save(self, folder: Path, world: World, *, on_thread: bool) -> Callable[[], Written]:
        """See `Engine`: DeepSpeed's files, and a DCP of the EMAs."""
        assert not on_thread
        writes = self._writes
        writes.files.clear()
        writes.errors.clear()
        self._engine.save_checkpoint(
            str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=True
        )
        if any(world.gather(bool(writes.errors))):  # then no rank enters the collectives of the rest

            def failed() -> Written:
                if writes.errors:
                    raise writes.errors[0]
                return {}

            return failed
        emas = {
            f"{role}.{name}": tensor for role in ("ema_fast", "ema_slow") for name, tensor in self._whole(role).items()
        }
        written = save_dcp(emas, folder / DCP_FOLDER, world, on_thread=False)
        return lambda: {**writes.files, **written()}

    def _whole(self, role: str) -> dict[str, Tensor]:
        """An EMA's tensors as DCP takes them; under stage 3 flattened, because its slices are not ranges of rows."""
        if self._mesh is None:
            return {name: parameter.detach() for name, parameter in self._parameters(role).items()}
        return {
            name: DTensor.from_local(
                partition.slot().local,
                self._mesh,
                [Shard(0)],
                run_check=False,
                shape=torch.Size([partition.whole_numel]),
                stride=(1,),
            )
            for name, partition in self._partitions[role].items()
        }

    def slots(self) -> dict[str, Slot]:
        """See `Engine`. What is trained is what the forward uses; `restored` copies it into the masters."""
        slots: dict[str, Slot] = {}
        for role in (*self._roles, "ema_fast", "ema_slow"):
            for name, parameter in self._parameters(role).items():
                own = Slot(parameter.detach()) if self._stage < 3 else self._partitions[role][name].slot()
                slots[f"{role}.{name}"] = own
        names = {parameter: (role, name) for role in self._roles for name, parameter in self._parameters(role).items()}
        for part in self._zero.moments():
            role, name = names[part.parameter]
            for moment, view in part.views.items():
                slots[f"{moment_group(role, moment)}.{name}"] = Slot(view, part.start)
        return slots

    def restored(self, updates: int) -> None:
        """See `Engine`: the masters take the weights that were just read."""
        self._zero.update_masters()
        self.after_ema_update()
        for master in self._zero.masters:
            self._zero.adam_state(master)["step"].fill_(updates)
