"""DeepSpeed's undocumented attributes, under typed and documented names.

Another version of DeepSpeed may rename them. They are therefore checked when the engine is built, and no other module
uses them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from scfm_core.distributed.engine import MOMENTS, Slot
from scfm_core.distributed.written import torch_save
from scfm_core.errors import UserError
from scfm_core.files import FileEntry

SUPPORTED = ">=0.19,<0.20"
"""DeepSpeed's versions that have these attributes; the same range as in pyproject.toml."""

OPTIMIZER = ("averaged_gradients", "optimizer", "overflow", "param_groups")
"""Attributes of DeepSpeed's ZeRO optimizer in every stage."""
OPTIMIZER_STAGE_1_AND_2 = (
    "_hp_optimizer_states_linked",
    "_lazy_init_hp_params_optimizer_state",
    "cpu_offload",
    "single_partition_of_fp32_groups",
)
OPTIMIZER_STAGE_3 = (
    "fp16_groups",
    "fp32_partitioned_groups_flat",
    "grad_partitions_flat_buffer",
    "offload_optimizer",
    "persistent_parameters",
)
MAPPING = ("get_hp_fragment", "lp_fragment_address", "update_hp")
"""Attributes of a parameter's `_hp_mapping`: this rank's part of its fp32 master (stages 1 and 2)."""
PARTITIONED = ("ds_numel", "ds_persist", "ds_status", "ds_tensor", "ds_zero_partition_rank", "partition")
"""Attributes of a parameter that stage 3 has partitioned."""


def require(owner: object, description: str, names: Iterable[str]) -> None:
    """Check that an object of DeepSpeed's has the attributes that this module reads.

    Raises:
        UserError: naming the missing ones and the supported versions.
    """
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise UserError(
            f"engine.name=deepspeed: in this version of DeepSpeed, {description} lacks {', '.join(missing)}, which scfm "
            f"reads. Install a supported version: pip install 'deepspeed{SUPPORTED}', or set engine.name=fsdp2"
        )


def disable_shared_memory_op(deepspeed: ModuleType) -> None:
    """Keep DeepSpeed from compiling its all-reduce over shared memory, which only its inference on CPUs uses.

    The compilation takes half a minute at the first start. A process that is killed during it leaves a lock file, for
    which every later start waits.
    """
    require(deepspeed.ops, "deepspeed.ops", ["__compatible_ops__"])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def whole_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where stage 3 has partitioned it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class Partition:
    """This rank's slice of a parameter under stage 3.

    The slices of all ranks have the same length; where the parameter ends within or before a slice, padding follows.

    Args:
        parameter: one that DeepSpeed has partitioned.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        require(parameter, "a parameter under ZeRO-3", PARTITIONED)
        self._parameter: Any = parameter

    @property
    def whole_numel(self) -> int:
        """Elements of the whole parameter."""
        return int(self._parameter.ds_numel)

    @property
    def padded(self) -> Tensor:
        """The slice with its padding, 1-D, live storage."""
        return self._parameter.ds_tensor.view(-1)  # type: ignore[no-any-return]

    @property
    def start(self) -> int:
        """Index of the slice's first element in the flattened parameter."""
        return int(self._parameter.ds_zero_partition_rank) * self.padded.numel()

    @property
    def numel(self) -> int:
        """Elements of the slice without padding; 0 if the parameter ends before it."""
        return max(0, min(self.whole_numel - self.start, self.padded.numel()))

    def slot(self) -> Slot:
        """The slice without padding."""
        return Slot(self.padded[: self.numel], self.start)

    def clear_padding(self) -> None:
        """Zero the padding: DeepSpeed never writes it, and uninitialised memory may hold NaN."""
        self.padded.data[self.numel :].zero_()

    def drop_gathered(self) -> None:
        """Free the whole weight if it is gathered now; the next use gathers it from the slices."""
        if self._parameter.ds_status.name == "AVAILABLE":
            self._parameter.partition()

    def disable_persistence(self) -> None:
        """Let DeepSpeed free the whole weight after use, also if it is small."""
        self._parameter.ds_persist = False


@dataclass(frozen=True)
class Moments:
    """This rank's part of Adam's moments of one parameter."""

    parameter: nn.Parameter
    start: int
    """Index of their first element in the flattened parameter."""
    views: dict[str, Tensor]
    """`exp_avg` and `exp_avg_sq`, fp32, 1-D, live storage."""


class ZeroOptimizer:
    """DeepSpeed's ZeRO optimizer around torch's AdamW.

    It keeps fp32 masters as flat vectors (`masters`); a vector holds parts of many parameters.

    Args:
        optimizer: as `deepspeed.initialize` returned it.
        stage: 1, 2 or 3.
        trained: the trained parameters, of all roles.

    Raises:
        UserError: if it, or a parameter, lacks an attribute that is used here.
    """

    def __init__(self, optimizer: Any, stage: int, trained: Iterable[nn.Parameter]) -> None:
        self._zero, self._stage, self._trained = optimizer, stage, list(trained)
        require(optimizer, "ZeRO's optimizer", OPTIMIZER)
        if stage == 3:
            require(optimizer, "ZeRO-3's optimizer", OPTIMIZER_STAGE_3)
            return
        require(optimizer, "the optimizer of ZeRO-1 and 2", OPTIMIZER_STAGE_1_AND_2)
        if optimizer.cpu_offload:
            require(optimizer, "the optimizer of ZeRO-1 and 2", ["accumulated_grads_in_cpu"])
        for parameter in self._trained:
            require(parameter, "a trained parameter under ZeRO-1 and 2", ["_hp_mapping"])
        for mapping in self._mappings().values():
            require(mapping, "_hp_mapping of a trained parameter", MAPPING)

    def _mappings(self) -> dict[nn.Parameter, Any]:
        """DeepSpeed's link to the master, for the trained parameters of which this rank has a part."""
        mappings = {parameter: parameter._hp_mapping for parameter in self._trained}  # type: ignore[attr-defined]
        return {parameter: mapping for parameter, mapping in mappings.items() if mapping is not None}

    @property
    def masters(self) -> list[Tensor]:
        """This rank's flat fp32 masters."""
        zero = self._zero
        return list(zero.single_partition_of_fp32_groups if self._stage < 3 else zero.fp32_partitioned_groups_flat)

    @property
    def is_offloaded(self) -> bool:
        """Whether masters, moments and reduced gradients are in host memory."""
        return bool(self._zero.cpu_offload if self._stage < 3 else self._zero.offload_optimizer)

    def adam_state(self, master: Tensor) -> dict[str, Tensor]:
        """AdamW's `step`, `exp_avg` and `exp_avg_sq` of a master."""
        return self._zero.optimizer.state[master]  # type: ignore[no-any-return]

    def reset_adam(self) -> None:
        """Zero moments and step count. This also drops the update that stage 3 counts when it allocates its state."""
        for master in self.masters:
            self._zero.optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master.detach()) for moment in MOMENTS},
            }
        if self._stage < 3:  # each parameter's mapping points into these tensors
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def reduced_gradients(self) -> Iterator[Tensor]:
        """This rank's part of the global batch's gradient, after the last micro-batch."""
        if self.is_offloaded:
            yield from (master.grad for master in self.masters if master.grad is not None)
        else:
            for parts in self._zero.averaged_gradients.values():
                yield from parts or ()

    def set_lr(self, rates: Sequence[float]) -> None:
        """The next update's learning rate of each role."""
        for group, lr in zip(self._zero.param_groups, rates, strict=True):
            group["lr"] = lr

    def clear_buffers(self) -> None:
        """After an update, zero the gradients that DeepSpeed keeps.

        The first backward of a step overwrites them, the later ones add to them. With two trained roles the second role's first backward
        is a later one: without this it would add to the gradients of the last step.
        """
        if self._stage == 3:
            self._zero.grad_partitions_flat_buffer.zero_()
        elif self.is_offloaded:
            for gradient in self._zero.accumulated_grads_in_cpu.values():
                gradient.zero_()

    @contextmanager
    def overflowed(self) -> Iterator[None]:
        """Within, DeepSpeed's `step` drops the gradient and updates nothing, as it does after an fp16 overflow."""
        self._zero.overflow = True
        try:
            yield
        finally:
            self._zero.overflow = False

    def disable_persistence(self, parameters: Iterable[nn.Parameter]) -> None:
        """Stage 3: do not keep these parameters gathered, and do not gather them after an update."""
        dropped = set(parameters)
        for parameter in dropped:
            Partition(parameter).disable_persistence()
        self._zero.persistent_parameters[:] = [p for p in self._zero.persistent_parameters if p not in dropped]

    def moments(self) -> Iterator[Moments]:
        """Adam's moments of every trained parameter of which this rank has a part."""
        if self._stage < 3:
            for parameter, mapping in self._mappings().items():
                views = {moment: mapping.get_hp_fragment(moment) for moment in MOMENTS}
                yield Moments(parameter, mapping.lp_fragment_address.start, views)
            return
        for parameter, master, offset in self._stage_3_parts():
            partition, state = Partition(parameter), self.adam_state(master)
            views = {moment: state[moment][offset : offset + partition.numel] for moment in MOMENTS}
            yield Moments(parameter, partition.start, views)

    @torch.no_grad()
    def update_masters(self) -> None:
        """Copy the trained weights into the masters, after the weights were loaded."""
        if self._stage < 3:
            for mapping in self._mappings().values():
                mapping.update_hp()
            return
        for parameter, master, offset in self._stage_3_parts():
            partition = Partition(parameter)
            master.data[offset : offset + partition.padded.numel()].copy_(partition.padded)
            partition.drop_gathered()

    def _stage_3_parts(self) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
        """Trained parameters, the master that holds the slice, and the slice's offset in it."""
        for group, master in zip(self._zero.fp16_groups, self.masters, strict=True):
            offset = 0
            for parameter in group:
                yield parameter, master, offset
                offset += Partition(parameter).padded.numel()


@dataclass
class Writes:
    """What DeepSpeed wrote of a checkpoint on this rank."""

    files: dict[Path, FileEntry] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)


def record_writes(engine: Any) -> Writes:
    """Make DeepSpeed's writes of a checkpoint record files and errors in the returned object.

    A rank that raised within `save_checkpoint` would leave the others waiting in its barrier.
    """
    require(engine, "its engine", ["checkpoint_engine", "_copy_recovery_script"])
    writes = Writes()

    def recording(function: Callable[..., object]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            try:
                function(*arguments)
            except (OSError, RuntimeError) as error:
                writes.errors.append(error)

        return call

    class RecordingWriter(type(engine.checkpoint_engine)):  # type: ignore[misc]
        def save(self, state_dict: Mapping[str, Any], path: str) -> None:
            recording(self._save)(state_dict, Path(path))

        def _save(self, state_dict: Mapping[str, Any], path: Path) -> None:
            writes.files[path] = torch_save(state_dict, path)

    engine.checkpoint_engine.__class__ = RecordingWriter
    # Rank 0 copies DeepSpeed's scripts beside the checkpoint while the others are in the barrier.
    engine._copy_recovery_script = recording(engine._copy_recovery_script)
    return writes
