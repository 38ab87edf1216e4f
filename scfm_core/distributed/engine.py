"""The protocols of an engine: what the trainer asks of FSDP2 and of DeepSpeed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from torch import Tensor, nn

from scfm_core.distributed.world import World
from scfm_core.files import Written
from scfm_core.filling import Fill


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How weights and optimizer are distributed over the processes. A single process has nothing to choose."""

    name: Literal["fsdp2", "deepspeed"] = "fsdp2"
    """`fsdp2`: only PyTorch; `deepspeed`: ZeRO (install the extra `deepspeed`)."""
    shard: int = -1
    """fsdp2: number of processes over which one copy of the weights is sharded. -1: all processes. 1: every process
    holds all weights, and only the gradients of the trained ones are reduced (for adapters, if the base fits). Between:
    HSDP; consecutive processes form a group that holds one copy, so the number of GPUs of a node shards within nodes
    and replicates between them."""
    cpu_offload: bool = False
    """Keep weights and optimizer (fsdp2), or the optimizer (deepspeed), in host memory."""
    zero_stage: Literal[1, 2, 3] = 2
    """deepspeed: 1 shards the optimizer, 2 also the gradients, 3 also all weights, including teacher and EMAs."""
    deepspeed_config: str | None = None
    """deepspeed: your own DeepSpeed JSON. It must not contradict the recipe; `auto` takes the recipe's value."""
    timeout: float = 600.0
    """Seconds without progress of any rank after which the job ends. Progress is a step, a pass, a written or hashed part of a file, a
    loaded block of weights, a shard, a compiled graph."""

    def __post_init__(self) -> None:
        if self.shard != -1 and self.shard < 1:
            raise ValueError(f"engine.shard must be -1 (all processes) or at least 1, got {self.shard}")
        if not self.timeout > 0:
            raise ValueError(f"engine.timeout must be positive, got {self.timeout}")
        if self.name == "fsdp2" and self.deepspeed_config is not None:
            raise ValueError(
                "engine.deepspeed_config needs engine.name=deepspeed; set that, or remove engine.deepspeed_config"
            )
        if self.name == "deepspeed" and self.shard != -1:
            raise ValueError(
                f"engine.shard={self.shard} needs engine.name=fsdp2; with deepspeed, engine.zero_stage decides what is sharded: "
                f"add engine.shard=-1, the default (recipes of LoRA set 1)"
            )
        if self.cpu_offload and self.shard == 1:
            raise ValueError("engine.cpu_offload needs sharded weights: set engine.shard=-1, or cpu_offload=false")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the micro-batches of a step, from the recipe."""

    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    accumulation: int
    """Micro-batches per step and rank."""
    micro_batch_size: int
    """Samples per micro-batch and rank."""
    lr: float
    """The recipe's peak learning rate; a DeepSpeed JSON must agree with it. Each `step` gets its own rate."""
    compute_dtype: str
    """`bfloat16` or `float32`."""
    fake_lr: float = 1.0
    """Learning rate of the fake score, if it is trained, as a multiple of the student's."""

    def rate(self, role: str, lr: float) -> float:
        """Learning rate of a trained role, when that of the student is `lr`."""
        return lr * self.fake_lr if role == "fake" else lr


Parameters = Callable[[str], Mapping[str, nn.Parameter]]
"""Parameters of a role (`student`, `ema_fast`, `ema_slow`, `fake`), fp32, by canonical name."""


@dataclass(frozen=True)
class Slot:
    """This rank's part of a tensor: elements `start` to `start + local.numel() - 1` of the flattened tensor."""

    local: Tensor
    """Live storage, contiguous; loading writes to it."""
    start: int = 0


class Layout(Protocol):
    """How the weights of the networks are distributed over the processes. It is made before the networks are loaded."""

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the weights."""
        ...

    def prepare(self, network: nn.Module, blocks: list[nn.Module], fill: Fill) -> None:
        """Distribute a network in place, and fill this process's part of it. Every rank calls it for the same networks.

        Args:
            network: the same on every rank; its parameters are on the meta device.
            blocks: its transformer blocks, each sharded as one unit.
            fill: writes the weights. It may raise a UserError on one rank; under an engine that communicates here, every rank
                raises it afterwards.
        """
        ...


class Engine(Protocol):
    """Backward, optimizer step, and the state that a checkpoint needs. Tensors are keyed by canonical names.

    A step is: for each micro-batch and in it for each trained role, in their order, `forward` and `backward` of its loss; then
    `reduce`, then `step` or `skip`. The roles are the student, and with distribution matching its fake score; each loss has gradients
    for the weights of one role.
    """

    checkpoint_kind: ClassVar[Literal["dcp", "zero"]]
    """Which files `save` writes: PyTorch's distributed checkpoint, or DeepSpeed's files with a DCP of the EMAs."""

    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        """Run the passes of a micro-batch for one trained role, which `call` computes; returns its loss, a scalar."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss.

        Each weight of the role gets one, on every process: zero, if the process has no row for the loss.
        """
        ...

    def reduce(self) -> Tensor:
        """After the last micro-batch: the L2 norm of the global batch's gradient, over all trained roles, the same on every rank. A
        scalar, fp32 or fp64, where the gradients are: the host need not wait for it."""
        ...

    def step(self, lr: float) -> None:
        """Clip the reduced gradient and update the weights at learning rate `lr`; the fake score's is a multiple of it."""
        ...

    def skip(self) -> None:
        """Drop the gradient. Weights, optimizer state and the optimizer's step count do not change."""
        ...

    def ema_tensors(self, role: str) -> dict[str, Tensor]:
        """This rank's part of a trained role in fp32 (`student`) or of an EMA, by name.

        The tensors are live storage: EMA updates write to them. A name has the same shape in all roles.
        """
        ...

    def ema_share(self, name: str) -> float:
        """The share of a weight's squares that this rank adds in a sum over all ranks: 1, or less for a weight that more ranks have than
        others."""
        return 1.0

    def after_ema_update(self) -> None:
        """Note that the EMAs' tensors have changed: the next forward must use the new values."""
        ...

    def save(self, folder: Path, world: World, *, on_thread: bool) -> Callable[[], Written]:
        """Write student, optimizer and EMAs into `folder`. Every rank calls it; the ranks communicate over `world`.

        Returns:
            a function that waits until the files are written, raises what the writing raised, and returns this rank's files;
            with `on_thread` a thread writes them in the background.
        """
        ...

    def slots(self) -> Mapping[str, Slot]:
        """Where to load a checkpoint's tensors on this rank, by `<group>.<name>`; the groups are `GROUPS`, and with a fake score `FAKE_GROUPS`."""
        ...

    def restored(self, updates: int) -> None:
        """Finish loading, after all slots were filled. The optimizer's step count becomes `updates`."""
        ...


MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's first and second moment, by torch's names."""
GROUPS = ("student", "ema_fast", "ema_slow", *MOMENTS)
"""The groups of tensors in every checkpoint; each has one tensor a trained parameter of the student."""
FAKE_GROUPS = ("fake", *(f"fake_{moment}" for moment in MOMENTS))
"""The groups of a fake score: weights and moments, by the student's names."""


def moment_group(role: str, moment: str) -> str:
    """The group of one of Adam's moments of a trained role."""
    return f"fake_{moment}" if role == "fake" else moment
