"""DeepSpeed's ZeRO-1, 2 and 3 behind the engine protocol.

Trained weights are fp32 in every stage (DeepSpeed's own `bf16` mode would cast the whole module, EMAs and adapters
included, and keep the masters where no EMA can reach them without a collective). A frozen base keeps its own dtype; full
weights compute under DeepSpeed's torch_autocast, which gathers and reduces in bf16.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from scfm_core.distributed.engine import OptimizerConfig, Slot
from scfm_core.distributed.fsdp2 import Parameters, save_dcp
from scfm_core.distributed.reader import DCP_FOLDER
from scfm_core.distributed.world import World
from scfm_core.errors import UserError


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, for this kind of device.

    Raises:
        UserError: if it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"engine.name=deepspeed needs DeepSpeed, which cannot be imported ({error}). "
            f"Install it with: pip install 'scfm[deepspeed]', or set engine.name=fsdp2"
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # On a CPU DeepSpeed would compile an all-reduce for inference at the first start, half a minute; killed meanwhile, it
    # leaves a lock behind for which every later start waits.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed  # type: ignore[no-any-return]


class ZeroLayout:
    """Puts networks under ZeRO-3's partitioning as they are loaded; stages 1 and 2 leave them whole.

    Args:
        config: from `deepspeed_config`.
        device: of this process.
    """

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        self.config, self.device = config, device
        self.deepspeed = import_deepspeed(device)
        self.deepspeed.init_distributed(dist_init_required=False)

    @property
    def is_sharded(self) -> bool:
        """Whether weights are spread over processes."""
        return bool(self.config["zero_optimization"]["stage"] == 3)

    def prepare(self, network: nn.Module, blocks: list[nn.Module]) -> None:
        """Partition every parameter over the ranks, one at a time."""
        if self.is_sharded:
            self.deepspeed.zero.Init(module=network, config_dict_or_path=self._for_init())
            for buffer in network.buffers():  # such as a table of positions: DeepSpeed moves parameters alone
                buffer.data = buffer.data.to(self.device)

    def _for_init(self) -> dict[str, Any]:
        return {key: value for key, value in self.config.items() if key != "torch_autocast"}


class _Networks(nn.Module):
    """All networks of a run, as the one module that DeepSpeed takes. Its forward is a micro-batch's three passes, so
    that ZeRO-3 sees the same sequence of layers in every step and can fetch ahead."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)

    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        return call()


class ZeroEngine:
    """AdamW under ZeRO.

    Args:
        parameters: of `student`, `ema_fast`, `ema_slow` by role, fp32, by canonical name.
        networks: the networks as prepared.
        layout: how they were.
        world: the processes.
        config: of the optimizer.
    """

    checkpoint_kind = "zero"

    def __init__(
        self,
        parameters: Parameters,
        networks: Mapping[str, nn.Module],
        layout: ZeroLayout,
        world: World,
        config: OptimizerConfig,
    ) -> None:
        self._parameters, self._world, self._config = parameters, world, config
        self._stage: int = layout.config["zero_optimization"]["stage"]
        self._student = dict(parameters("student"))
        base = torch.optim.AdamW(
            list(self._student.values()), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        elements = sum(getattr(p, "ds_numel", p.numel()) for p in self._student.values())
        settings = dict(layout.config, zero_optimization=dict(layout.config["zero_optimization"]))
        # The bucket is allocated whole; DeepSpeed's default of 2 GB is more than all adapters.
        settings["zero_optimization"].setdefault("reduce_bucket_size", min(500_000_000, elements))
        self._engine, self._zero, _, _ = layout.deepspeed.initialize(
            model=_Networks(networks), optimizer=base, config=settings, dist_init_required=False
        )
        self._engine.checkpoint_engine = _recording(self._engine.checkpoint_engine)
        # Rank 0 copies DeepSpeed's scripts beside the checkpoint; the others are in the barrier behind it already.
        self._engine._copy_recovery_script = self._engine.checkpoint_engine.recorded(self._engine._copy_recovery_script)
        if self._stage == 3:
            self._let_go_of_emas()
        self._mesh = init_device_mesh(layout.device.type, (world.size,)) if self._stage == 3 else None
        for vector in self._vectors():  # also drops the update that ZeRO-3 counts when it makes its states
            self._zero.optimizer.state[vector] = {
                "step": torch.zeros((), dtype=torch.float32, device=vector.device),
                "exp_avg": torch.zeros_like(vector.detach()),
                "exp_avg_sq": torch.zeros_like(vector.detach()),
            }
        self._link_states()

    def _let_go_of_emas(self) -> None:
        """ZeRO-3 keeps small weights gathered, and gathers them after every update: in vain for the EMAs, which change
        after that."""
        emas = {parameter for role in ("ema_fast", "ema_slow") for parameter in self._parameters(role).values()}
        for parameter in emas:
            parameter.ds_persist = False  # type: ignore[attr-defined]
        self._zero.persistent_parameters[:] = [p for p in self._zero.persistent_parameters if p not in emas]

    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        """See `Engine`."""
        return self._engine(call)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """See `Engine`. DeepSpeed counts micro-batches by calls of its `step`, which does nothing between."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def reduce(self) -> float:
        """See `Engine`. DeepSpeed's own norm turns NaN and infinity into 1, so it is no ground for a decision."""
        if self._config_offloads() and self._stage < 3 and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # DeepSpeed copies them off the GPU without waiting
        gradients = list(self._reduced_gradients())
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(1)  # type: ignore[arg-type]
        squared = norms.double().square().sum().cpu()  # one wait for the GPU
        if self._world.size > 1:
            dist.all_reduce(squared, group=self._world.group)
        return float(squared.sqrt().item())

    def _reduced_gradients(self) -> Iterator[Tensor]:
        if self._config_offloads():
            yield from (vector.grad for vector in self._vectors() if vector.grad is not None)
        else:
            for parts in self._zero.averaged_gradients.values():
                yield from (part for part in parts or ())

    def _config_offloads(self) -> bool:
        return bool(self._zero.cpu_offload if self._stage < 3 else self._zero.offload_optimizer)

    def step(self, lr: float) -> None:
        """See `Engine`."""
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()

    def skip(self) -> None:
        """See `Engine`: DeepSpeed's own way of dropping an overflowed step, taken when we say so."""
        self._zero.overflow = True
        try:
            self._engine.step()
        finally:
            self._zero.overflow = False

    def ema_tensors(self, role: str) -> dict[str, Tensor]:
        """See `Engine`: whole weights in stages 1 and 2, this rank's slices in stage 3."""
        parameters = self._parameters(role).items()
        if self._stage < 3:
            return {name: parameter.detach() for name, parameter in parameters}
        for _, parameter in parameters:
            _clear_padding(parameter)
        return {name: parameter.ds_tensor for name, parameter in parameters}  # type: ignore[attr-defined]

    def after_ema_update(self) -> None:
        """See `Engine`: a weight that ZeRO-3 has left gathered is dropped, and gathered anew from the slices."""
        if self._stage < 3:
            return
        for role in ("ema_fast", "ema_slow"):
            for parameter in self._parameters(role).values():
                if parameter.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]
                    parameter.partition()  # type: ignore[attr-defined]

    def save(self, folder: Path, world: World, *, on_thread: bool) -> Callable[[], object]:
        """See `Engine`: DeepSpeed's files, and a DCP of the EMAs."""
        assert not on_thread
        recording = self._engine.checkpoint_engine
        recording.errors.clear()
        self._engine.save_checkpoint(
            str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=True
        )
        if any(world.gather(bool(recording.errors))):  # then no rank enters the collectives of the rest

            def failed() -> None:
                if recording.errors:
                    raise recording.errors[0]

            return failed
        emas = {
            f"{role}.{name}": self._whole(parameter)
            for role in ("ema_fast", "ema_slow")
            for name, parameter in self._parameters(role).items()
        }
        return save_dcp(emas, folder / DCP_FOLDER, world, on_thread=False)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """An EMA's tensor as DCP takes it; under stage 3 flattened, for its slices are no ranges of rows."""
        if self._mesh is None:
            return parameter.detach()
        local = parameter.ds_tensor[: _slice_length(parameter)]  # type: ignore[attr-defined]
        shape = torch.Size([parameter.ds_numel])  # type: ignore[attr-defined]
        return DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=(1,))

    def slots(self) -> dict[str, Slot]:
        """See `Engine`."""
        slots: dict[str, Slot] = {}
        for role in ("student", "ema_fast", "ema_slow"):
            for name, parameter in self._parameters(role).items():
                slots[f"{role}.{name}"] = Slot(parameter.detach()) if self._stage < 3 else _slice(parameter)
        for name, start, views in self._master_slices():
            slots |= {f"{group}.{name}": Slot(view, start) for group, view in views.items()}
        return slots

    def _master_slices(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        """Of every trained parameter on this rank: name, first element, and its part of the flat vectors."""
        names = {parameter: name for name, parameter in self._student.items()}
        if self._stage < 3:
            for parameter, name in names.items():
                if (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                    moments = {group: mapping.get_hp_fragment(group) for group in ("exp_avg", "exp_avg_sq")}
                    # The weights are named twice: here the master, above the copy that the forward uses.
                    yield name, mapping.lp_fragment_address.start, moments
            return
        for group, vector in zip(self._zero.fp16_groups, self._vectors(), strict=True):
            offset, state = 0, self._zero.optimizer.state[vector]
            for parameter in group:
                length = _slice_length(parameter)
                views = {kind: state[kind][offset : offset + length] for kind in ("exp_avg", "exp_avg_sq")}
                yield names[parameter], _slice(parameter).start, views
                offset += parameter.ds_tensor.ds_numel

    def _vectors(self) -> list[Tensor]:
        """The flat fp32 masters of this rank."""
        name = "single_partition_of_fp32_groups" if self._stage < 3 else "fp32_partitioned_groups_flat"
        return list(getattr(self._zero, name))

    def _link_states(self) -> None:
        if self._stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def restored(self, updates: int) -> None:
        """See `Engine`: the masters take the weights that were just read."""
        if self._stage < 3:
            for parameter in self._student.values():
                if (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                    mapping.update_hp()
        else:
            for group, vector in zip(self._zero.fp16_groups, self._vectors(), strict=True):
                offset = 0
                for parameter in group:
                    length = parameter.ds_tensor.ds_numel
                    vector.data[offset : offset + length].copy_(parameter.ds_tensor.view(-1))
                    offset += length
                    if parameter.ds_status.name == "AVAILABLE":
                        parameter.partition()
        self.after_ema_update()
        for vector in self._vectors():
            self._zero.optimizer.state[vector]["step"].fill_(updates)


def _slice_length(parameter: nn.Parameter) -> int:
    """Elements of this rank's slice that are the parameter's, without padding."""
    rank, length = parameter.ds_zero_partition_rank, parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    return int(max(0, min(parameter.ds_numel - rank * length, length)))  # type: ignore[attr-defined]


def _slice(parameter: nn.Parameter) -> Slot:
    start = parameter.ds_zero_partition_rank * parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    return Slot(parameter.ds_tensor.view(-1)[: _slice_length(parameter)], start)  # type: ignore[attr-defined]


def _recording(checkpoint_engine: Any) -> Any:
    """DeepSpeed's writer, which remembers what went wrong and goes on: an error on one rank would leave the others
    waiting in its barrier. `ZeroEngine.save` raises it once all ranks are through."""

    class Recording(type(checkpoint_engine)):  # type: ignore[misc]
        def save(self, state_dict: Any, path: str) -> None:
            self.recorded(torch.save)(state_dict, path)

        def recorded(self, function: Callable[..., object]) -> Callable[..., None]:
            def call(*arguments: Any) -> None:
                try:
                    function(*arguments)
                except (OSError, RuntimeError) as error:
                    self.errors.append(error)

            return call

    checkpoint_engine.__class__ = Recording
    checkpoint_engine.errors = []
    return checkpoint_engine


def _clear_padding(parameter: Any) -> None:
    """ZeRO-3's slices are of one length; what is behind the last one's end was never written, and may be no number."""
    slice_, rank = parameter.ds_tensor, torch.distributed.get_rank(parameter.ds_process_group)
    slice_.data[max(0, parameter.ds_numel - rank * slice_.numel()) :].zero_()
