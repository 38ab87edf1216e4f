"""A run's configuration: typed sections, each validated at construction. Rules between sections are in `rules.py`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scfm_core.data.recipe import DataConfig
from scfm_core.distributed.engine import EngineConfig
from scfm_core.models.adapters import LoRAConfig
from scfm_core.scfm.ema import EMAConfig
from scfm_core.scfm.plan import PlanConfig

Role = Literal["student", "ema_fast", "ema_slow"]


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where the run lives."""

    dir: str
    """Folder of the run: configuration, metrics, checkpoints, samples. Starting again in it resumes."""
    seed: int = 0
    """Of data order, plans, noise and adapter initialisation."""
    device: str = "auto"
    """`auto` (cuda if there is one, else cpu), `cuda`, `cuda:1`, `cpu`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dir", str(Path(self.dir).expanduser()))
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"run.seed must be in 0..2**63-1, got {self.seed}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"run.device must be auto, cpu, cuda or cuda:N, got {self.device!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pre-trained model."""

    path: str
    """Hub id, or local folder in diffusers' format."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` trains the network from scratch: the architecture and the encoders of `path`, fresh weights."""
    text_length: int = 256
    """T5 tokens."""

    def __post_init__(self) -> None:
        if not 1 <= self.text_length <= 512:
            raise ValueError(f"model.text_length must be in 1..512, got {self.text_length}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation."""

    weights: Literal["lora", "full"] = "lora"
    """Train adapters over a frozen base, or all weights."""
    steps: int = 3000
    """Optimizer steps."""
    global_batch_size: int = 16
    """Samples a step."""
    micro_batch_size: int = 8
    """Samples a forward; divides the global batch, the rest is gradient accumulation."""
    lr: float = 2e-5
    """AdamW's learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: constant (the paper), or cosine to zero."""
    warmup_steps: int = 0
    """Linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    weight_decay: float = 0.0
    """AdamW's."""
    clip_norm: float = 10.0
    """Global gradient norm to clip at (the paper: 10 for Flux, 2 for SD3.5)."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and the frozen base; trained weights, EMAs and Adam's state are always fp32."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """`full` recomputes each block in the backward; `selective` keeps its matrix products and attention."""
    compile: bool = False
    """`torch.compile` on each transformer block."""
    spike_factor: float | None = 10.0
    """A step whose loss exceeds this multiple of the median of the last 50 steps is not applied; none: only a loss or
    gradient that is no finite number is skipped."""
    max_skips: int = 5
    """Skipped steps in a row that are tolerated; one more, and the run goes back to the checkpoint before them."""
    max_rollbacks: int = 1
    """How often a run goes back on its own before it stops."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size {self.global_batch_size} is not a multiple of train.micro_batch_size "
                f"{self.micro_batch_size}"
            )
        if not (self.lr > 0 and self.clip_norm > 0):
            raise ValueError(f"train.lr and train.clip_norm must be positive, got {self.lr} and {self.clip_norm}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"train.warmup_steps must be in 0..train.steps, got {self.warmup_steps}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas must be in [0, 1), got {list(self.betas)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"train.weight_decay must be at least 0, got {self.weight_decay}")
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise ValueError(f"train.spike_factor must be above 1 or none, got {self.spike_factor}")
        for name in ("max_skips", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """What the network's blocks are computed with. The dry run says what is chosen, and why."""

    fused: Literal["auto", "triton", "reference", "none"] = "auto"
    """`triton`: fused kernels; `reference`: the same blocks in plain PyTorch; `none`: diffusers' own blocks; `auto`:
    triton on a GPU, none elsewhere."""
    attention: Literal["auto", "cudnn", "flash3", "flash", "xformers", "triton", "math"] = "auto"
    """Attention's backend; `auto` measures those that are there, once for a device, shape and dtype."""
    fp8: bool = False
    """Adapters over a base that is not sharded: multiply it in fp8 in the two passes that make the target. It costs a
    byte a parameter of memory, and the target is off by some per cent; needs an H100 or later."""
    cuda_graphs: bool = False
    """Adapters over a base that is not sharded: replay the two passes that make the target as CUDA graphs. For
    micro-batches so small that launching takes longer than the work."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints are also written at the end, and on SIGTERM or Ctrl-C."""

    every: int = 250
    """Steps between checkpoints."""
    keep: int = 2
    """How many of the newest are kept."""
    asynchronous: bool = False
    """fsdp2: copy the tensors to host memory and write them while the training goes on."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every and checkpoint.keep must be at least 1, got {self.every}, {self.keep}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How images are sampled: in validation during training, and by `scfm sample` and `scfm evaluate`."""

    every: int = 250
    """Steps between validation grids; 0: none."""
    prompts: str | tuple[str, ...] = ()
    """Prompts of the grid: a list, or a text file with one a line."""
    steps: tuple[int, ...] = (1, 2, 3, 4, 8)
    """Step counts: one row of the grid each."""
    seed: int = 1234
    """Image i starts from the noise of `torch.Generator().manual_seed(seed + i)`, as a diffusers pipeline's."""
    shift: float | Literal["dynamic"] = 3.25
    """Timestep shift; `dynamic` is Flux's, by image size."""
    guidance: float = 3.5
    """Flux's embedded guidance, or SD3's scale of classifier-free guidance."""
    weights: Role = "student"
    """Which weights to sample from and to export."""
    teacher_steps: int = 0
    """Sample the prompts of the grid with the teacher too, in so many steps, and log how far the student's latents are from
    its: on prompts that are not the data's, it shows over-fitting. 0: do not."""

    def __post_init__(self) -> None:
        if self.every < 0 or not self.steps or min(self.steps) < 1:
            raise ValueError(f"sample.every must be >= 0 and sample.steps positive, got {self.every}, {self.steps}")
        if self.teacher_steps < 0:
            raise ValueError(f"sample.teacher_steps must be at least 0, got {self.teacher_steps}")
        if self.shift != "dynamic" and not float(self.shift) > 0:
            raise ValueError(f"sample.shift must be positive or 'dynamic', got {self.shift}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `scfm evaluate` measures."""

    steps: tuple[int, ...] = (1, 2, 3, 4, 8)
    """Step counts of student and base."""
    teacher_steps: int = 32
    """Step count of the teacher's own samples, the reference."""
    samples: int = 1000
    """Images a figure; prompts are the data's captions, of local data from 64 places all over them."""
    prompts: str | None = None
    """Text file with one prompt a line, in place of the data's captions."""
    batch_size: int = 8
    """Images a forward."""
    keep: str | None = None
    """Folder where the frozen model's own samples are kept for other runs: a row of a table then costs its student alone."""
    noise_floor: bool = False
    """Measure too how far two independent sets of the teacher's samples are apart: smaller distances mean that samples agree
    noise by noise."""
    features: Literal["classifier", "inception"] = "inception"
    """Feature extractor of the Frechet distance: a small local classifier, or torchmetrics' Inception."""
    features_path: str | None = None
    """The classifier's folder, or Inception's weights file (weights-inception-2015-12-05-6726825d.pth)."""
    clip_path: str | None = None
    """Folder of a CLIP model (transformers' format) for the CLIP score; none: no score."""

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("evaluate.steps is empty: name at least one step count")
        if min(*self.steps, self.teacher_steps, self.batch_size) < 1 or self.samples < 2:
            raise ValueError("evaluate.steps, teacher_steps and batch_size must be >= 1 and evaluate.samples >= 2")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online with a key in WANDB_API_KEY or ~/.netrc, else offline."""
    project: str = "scfm"
    """Project name."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One complete run."""

    run: RunSection
    model: ModelConfig
    data: DataConfig
    method: PlanConfig = field(default_factory=PlanConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
