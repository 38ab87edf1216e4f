"""PyTorch's own engine: one process, replicas of the trained weights, or FSDP2 (`fully_shard`), plain and hybrid."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from scfm_core.distributed.dcp import save_dcp
from scfm_core.distributed.engine import (
    MOMENTS,
    Engine,
    EngineConfig,
    Layout,
    OptimizerConfig,
    Parameters,
    Slot,
    moment_group,
)
from scfm_core.distributed.reader import DCP_FOLDER
from scfm_core.distributed.replicas import ReplicatedGradients
from scfm_core.distributed.world import World, quiet_gloo
from scfm_core.files import Written
from scfm_core.filling import Fill, allocate, kept_in_fp32, materialise, stored_tensors


class Fsdp2Layout(Layout):
    """Every process holds all weights, or shards of them (`fully_shard`), plain or hybrid.

    Args:
        config: degree of sharding, which divides the number of processes; offload to host memory, of shards alone.
        world: the processes.
        device: of this process.
        compute_dtype: of gathered weights; gradients are reduced in fp32.
    """

    def __init__(self, config: EngineConfig, world: World, device: torch.device, compute_dtype: torch.dtype) -> None:
        shard = world.size if config.shard == -1 else config.shard
        assert world.size % shard == 0 and not (config.cpu_offload and shard == 1)  # train/rules.py: check_shards
        self.mesh: DeviceMesh | None = None
        if shard > 1:
            replicas = world.size // shard
            shape, names = ((shard,), ("shard",)) if replicas == 1 else ((replicas, shard), ("replicate", "shard"))
            with quiet_gloo():
                self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self._device, self._is_offloaded = device, config.cpu_offload
        self._policy = MixedPrecisionPolicy(
            param_dtype=None if compute_dtype == torch.float32 else compute_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # sigma and strength stay fp32; the networks cast their own inputs
        )
        self._offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.cpu_offload else OffloadPolicy()

    @property
    def is_sharded(self) -> bool:
        """See `Layout`."""
        return self.mesh is not None

    def prepare(self, network: nn.Module, blocks: list[nn.Module], fill: Fill) -> None:
        """See `Layout`. Each block is a unit; all other parameters form the last unit. Nothing is communicated.

        A unit is gathered in one dtype, so parameters that must stay fp32 are not sharded: every process holds them.
        """
        if self.mesh is None:
            materialise(network, self._device, fill)
            return
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": self._policy,
            "offload_policy": self._offload,
            # Also for the root, which FSDP2 would otherwise keep gathered until its backward. An EMA has no backward,
            # so it would use the weights of the first step forever.
            "reshard_after_forward": True,
            "ignored_params": set(self._replicated(network)),
        }
        for block in blocks:
            fully_shard(block, **options)
        fully_shard(network, **options)
        allocate(network, "cpu" if self._is_offloaded else self._device, others_on=self._device)
        for parameter in self._replicated(network):
            parameter.data = parameter.data.to(self._device)
        with torch.no_grad():
            for name, tensor in stored_tensors(network).items():
                slot = _slot(tensor)
                fill(name, slot.local.view(-1), slot.start)

    def _replicated(self, network: nn.Module) -> list[nn.Parameter]:
        """Small parameters that would lose their precision if they were gathered."""
        return [] if self._policy.param_dtype is None else list(kept_in_fp32(network).values())


class Fsdp2Engine(Engine):
    """AdamW on this rank's shards.

    Args:
        parameters: of `student`, `ema_fast`, `ema_slow` by role, fp32, by canonical name; plain or sharded.
        networks: prepared by `layout`.
        layout: of the networks.
        world: the processes.
        config: of the optimizer.
        trained: the roles that are trained.
    """

    checkpoint_kind: ClassVar[Literal["dcp", "zero"]] = "dcp"

    def __init__(
        self,
        parameters: Parameters,
        networks: Mapping[str, nn.Module],
        layout: Fsdp2Layout,
        world: World,
        config: OptimizerConfig,
        trained: Sequence[str] = ("student",),
    ) -> None:
        self._parameters, self._world, self._config, self._mesh = parameters, world, config, layout.mesh
        self._sharded = [network for network in networks.values() if isinstance(network, FSDPModule)]
        self._roles = tuple(trained)
        self._trained = {(role, name): p for role in trained for name, p in parameters(role).items()}
        # The optimizer gets plain tensors, which are views of the shards: the arithmetic is the same on one process and
        # on many, and DTensor's dispatch does not cost time for each of a thousand factors.
        self._local = {key: _local(parameter) for key, parameter in self._trained.items()}
        # The fused kernel: some 40 launches for the thousand factors of a 12-B model. It exists for CPUs too, with the same results.
        self._optimizer = torch.optim.AdamW(
            [{"params": [local for key, local in self._local.items() if key[0] == role]} for role in trained],
            lr=0.0,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        for local in self._local.values():
            self._optimizer.state[local] = {
                "step": torch.zeros((), dtype=torch.float32, device=local.device),
                **{moment: torch.zeros_like(local) for moment in MOMENTS},
            }
        self._backwards = 0
        """Of this step."""
        self._norm = torch.zeros(())
        replicated = {key: p for key, p in self._trained.items() if world.size > 1 and not isinstance(p, DTensor)}
        self._sharded_keys = [key for key in self._trained if key not in replicated]
        """Also those of a single process."""
        self._replicated: ReplicatedGradients | None = None
        """The gradients of replicated weights: of all, or beside shards of those that stay fp32."""
        if replicated:  # sums start with the last weights of this list: those of the role whose backward is first
            in_order = [p for role in reversed(self._roles) for key, p in replicated.items() if key[0] == role]
            self._replicated = ReplicatedGradients(in_order, overlapped=self._mesh is None)

    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        """See `Engine`."""
        return call()

    def backward(self, loss: Tensor) -> None:
        """See `Engine`. The sum over micro-batches and the mean over ranks is the mean over the global batch."""
        self._backwards += 1
        left = self._config.accumulation * len(self._roles) - self._backwards
        for network in self._sharded:
            # HSDP: reducing between replicas once per step is enough. But FSDP2 keeps what is not reduced yet as one vector, and would
            # add the gradients of one role to those of another one.
            network.set_requires_all_reduce(left == 0 or len(self._roles) > 1)
        if self._replicated is not None and left == len(self._roles) - 1:  # each role's last backward begins
            self._replicated.expect_last_backward()
        divisor = self._config.accumulation * (self._world.size if self._mesh is None else 1)  # FSDP2 takes the mean
        (loss / divisor).backward()

    def reduce(self) -> Tensor:
        """See `Engine`."""
        self._backwards = 0
        if self._replicated is not None:
            self._replicated.sum_()
            if self._mesh is not None:
                self._replicated.flat /= self._world.size
        for key, local in self._local.items():
            gradient = self._trained[key].grad
            local.grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        keys = self._local if self._mesh is None else self._sharded_keys
        gradients = [gradient for key in keys if (gradient := self._local[key].grad) is not None]
        self._norm = nn.utils.get_total_norm(gradients)
        if self._mesh is not None:
            # Over all ranks, so that all have the same bits: replicas that summed on their own could differ in the last one,
            # and clipping would let them drift apart.
            squared, shards = self._norm.square(), self._mesh["shard"].size()
            if self._replicated is not None:  # the same on all ranks: each of a group of shards adds its share
                squared += self._replicated.flat.square().sum().to(squared.device) / shards
            dist.all_reduce(squared)
            self._norm = (squared * shards / self._world.size).sqrt()
        return self._norm

    def step(self, lr: float) -> None:
        """See `Engine`."""
        nn.utils.clip_grads_with_norm_(self._local.values(), self._config.clip_norm, self._norm)
        for role, group in zip(self._roles, self._optimizer.param_groups, strict=True):
            group["lr"] = self._config.rate(role, lr)
        self._optimizer.step()
        self.skip()

    def skip(self) -> None:
        """See `Engine`."""
        if self._replicated is not None:
            self._replicated.flat.zero_()
        for key in self._sharded_keys:
            self._local[key].grad = self._trained[key].grad = None
        for network in self._sharded:
            _forget_passes(network)

    def ema_tensors(self, role: str) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: _local(parameter) for name, parameter in self._parameters(role).items()}

    def ema_share(self, name: str) -> float:
        """See `Engine`: every rank has the whole of a weight that is not sharded."""
        if self._mesh is None or isinstance(self._trained["student", name], DTensor):
            return 1.0
        return 1 / self._mesh["shard"].size()

    def after_ema_update(self) -> None:
        """See `Engine`. Nothing to do: the next forward gathers the shards."""

    def state(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint by `<group>.<name>`, for DCP: sharded ones are DTensors."""
        tensors: dict[str, Tensor] = {}
        for role in (*self._roles, "ema_fast", "ema_slow"):
            tensors |= {f"{role}.{name}": parameter.detach() for name, parameter in self._parameters(role).items()}
        for (role, name), local in self._local.items():
            for moment in MOMENTS:
                state = _like(self._trained[role, name], self._optimizer.state[local][moment])
                tensors[f"{moment_group(role, moment)}.{name}"] = state
        return tensors

    def save(self, folder: Path, world: World, *, on_thread: bool) -> Callable[[], Written]:
        """See `Engine`."""
        return save_dcp(self.state(), folder / DCP_FOLDER, world, on_thread=on_thread)

    def slots(self) -> dict[str, Slot]:
        """See `Engine`."""
        return {key: _slot(tensor) for key, tensor in self.state().items()}

    def restored(self, updates: int) -> None:
        """See `Engine`."""
        for state in self._optimizer.state.values():
            state["step"].fill_(updates)


def _forget_passes(network: FSDPModule) -> None:
    """Empty FSDP2's list of passes. It has every pass, and a backward of the network empties it; teacher and EMAs have none."""
    state = network._get_fsdp_state()
    if not hasattr(state._comm_ctx, "post_forward_order"):  # no pass yet
        return
    state._comm_ctx.post_forward_order.clear()
    for unit in state._state_ctx.all_states:
        if unit._fsdp_param_group is not None:
            unit._fsdp_param_group._post_forward_indices.clear()


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its storage."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _slot(tensor: Tensor) -> Slot:
    if not isinstance(tensor, DTensor):
        return Slot(tensor.detach())
    assert all(p.is_replicate() or p == Shard(0) for p in tensor.placements), tensor.placements
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Slot(_local(tensor), offsets[0] * math.prod(tensor.shape[1:]))
