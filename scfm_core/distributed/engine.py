"""The engine protocol: what the trainer asks of FSDP2 and of DeepSpeed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from scfm_core.distributed.world import World


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How weights and optimizer lie on the processes that the launcher started; for one process, nothing to choose."""

    name: Literal["fsdp2", "deepspeed"] = "fsdp2"
    """`fsdp2`: PyTorch alone; `deepspeed`: ZeRO (install the extra `deepspeed`)."""
    shard: int = -1
    """fsdp2: processes that one copy of the weights is spread over. -1: all of them. 1: each holds everything and the
    trained weights' gradients alone are reduced (adapters, if the base fits). Between: HSDP, copies are replicated over
    consecutive groups, so the number of GPUs of a node shards inside nodes and replicates between them."""
    cpu_offload: bool = False
    """Weights and optimizer (fsdp2), or the optimizer (deepspeed), in host memory."""
    zero_stage: Literal[1, 2, 3] = 2
    """deepspeed: 1 shards the optimizer, 2 the gradients too, 3 the weights too, teacher and EMAs included."""
    deepspeed_config: str | None = None
    """deepspeed: your own DeepSpeed JSON. What it says must not contradict the recipe; `auto` takes the recipe's value."""
    timeout: float = 600.0
    """Seconds without progress, on any rank, after which the job ends; a step, and the first one's compilation, must fit."""

    def __post_init__(self) -> None:
        if self.shard != -1 and self.shard < 1:
            raise ValueError(f"engine.shard must be -1 (all processes) or at least 1, got {self.shard}")
        if not self.timeout > 0:
            raise ValueError(f"engine.timeout must be positive, got {self.timeout}")
        if self.name == "fsdp2" and self.deepspeed_config is not None:
            raise ValueError("engine.deepspeed_config is read with engine.name=deepspeed alone; set that, or remove it")
        if self.name == "deepspeed" and self.shard != -1:
            raise ValueError(
                f"engine.shard={self.shard} is fsdp2's; with engine.name=deepspeed engine.zero_stage decides what is sharded"
            )
        if self.cpu_offload and self.shard == 1:
            raise ValueError("engine.cpu_offload needs sharded weights: set engine.shard=-1, or cpu_offload=false")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, and how micro-batches make a step; from the recipe."""

    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    accumulation: int
    """Micro-batches a step, on each rank."""
    micro_batch_size: int
    """Samples a micro-batch, on each rank."""
    lr: float
    """The recipe's peak rate: held against a DeepSpeed JSON; each step names its own."""
    compute_dtype: str
    """`bfloat16` or `float32`."""


@dataclass(frozen=True)
class Slot:
    """This rank's piece of a tensor: elements `start` to `start + local.numel()` of the flattened whole."""

    local: Tensor
    """Live storage, contiguous."""
    start: int = 0


class Engine(Protocol):
    """Backward, optimizer step, and the state that a checkpoint needs. All tensors go by canonical names.

    A step is: `forward` and `backward` for each micro-batch, then `reduce`, then `step` or `skip`.
    """

    checkpoint_kind: str
    """`dcp` or `zero`: which files `save` writes."""

    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        """Run a micro-batch's passes; the loss."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        ...

    def reduce(self) -> float:
        """After the last micro-batch: the norm of the global batch's gradient, the same number on every rank."""
        ...

    def step(self, lr: float) -> None:
        """Clip and update with the reduced gradient."""
        ...

    def skip(self) -> None:
        """Drop the gradient: weights, optimizer and its step count stay as they are."""
        ...

    def ema_tensors(self, role: str) -> dict[str, Tensor]:
        """Live tensors of the student's masters (`student`) or of an EMA that this rank keeps, aligned by name."""
        ...

    def after_ema_update(self) -> None:
        """Tell the engine that the EMAs' tensors were changed."""
        ...

    def save(self, folder: Path, world: World, *, on_thread: bool) -> Callable[[], object]:
        """Write student, optimizer and EMAs into `folder`; every rank calls it, and talks over `world`.

        Returns:
            a function that returns when the files are written; with `on_thread` the writing goes on in a thread.
        """
        ...

    def slots(self) -> Mapping[str, Slot]:
        """Where a checkpoint's tensors go on this rank: `<group>.<name>`, groups as in `GROUPS`."""
        ...

    def restored(self, updates: int) -> None:
        """All slots were filled; the optimizer has made `updates` updates."""
        ...


MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's first and second moment, by torch's names."""
GROUPS = ("student", "ema_fast", "ema_slow", *MOMENTS)
"""What a checkpoint holds, tensors by parameter name in each."""
