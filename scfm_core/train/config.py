"""A run's configuration: typed sections, each validated when it is constructed. Rules across sections are in `rules.py`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scfm_core.data.recipe import DataConfig
from scfm_core.distributed.engine import EngineConfig
from scfm_core.models.adapters import LoRAConfig
from scfm_core.models.fused_base import FusedAdapter
from scfm_core.models.quantised import Base
from scfm_core.scfm.ema import EMAConfig
from scfm_core.scfm.method import PlanConfig

Role = Literal["student", "ema_fast", "ema_slow"]


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """The run's folder, seed and device."""

    dir: str
    """Folder of the run: configuration, metrics, checkpoints, samples. A second start in the same folder resumes the run."""
    seed: int = 0
    """Seed of data order, plans, noise and adapter initialisation."""
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
    adapters: tuple[FusedAdapter, ...] = ()
    """LoRA files, such as a style's, that are fused into the pre-trained weights in fp32 before anything else happens:
    `[{path: style.safetensors, weight: 0.8}]`. Teacher, student and evaluation start from the fused model."""
    base: Base = "bfloat16"
    """How the frozen base of adapters is stored while they are trained; products are computed in `train.compute_dtype`. `bfloat16`: in
    `train.compute_dtype`; `int8`: one byte for each weight of the blocks; `float8`: one byte too, and `kernels.fp8` needs no copy; `nf4`: half a
    byte. The teacher of the run is this base. Needs an unsharded base."""
    offload_blocks: int = 0
    """This number of blocks keep the base's weights in host memory, and on the GPU only while they run: for a base that does not fit even
    in nf4, or for an exact base on a small GPU. Each pass copies them over PCIe while other blocks compute, so large micro-batches
    hide the copies. 0: none; else at least 2."""
    encoders: Base = "bfloat16"
    """How text encoders of more than a gigabyte are stored, as `base`. The largest of them do not fit a GPU otherwise: with a cache of
    `scfm data encode` they are loaded at the start, for the prompts of the grids, and freed before the base is loaded."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` trains the network from scratch: architecture and encoders of `path`, random weights."""
    text_length: int = 256
    """Number of T5 tokens."""

    def __post_init__(self) -> None:
        if not 1 <= self.text_length <= 512:
            raise ValueError(f"model.text_length must be in 1..512, got {self.text_length}")
        if self.offload_blocks < 0 or self.offload_blocks == 1:
            raise ValueError(f"model.offload_blocks must be 0 or at least 2, got {self.offload_blocks}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation."""

    weights: Literal["lora", "full"] = "lora"
    """`lora`: train adapters on a frozen base; `full`: train all weights."""
    steps: int = 3000
    """Optimizer steps."""
    global_batch_size: int = 16
    """Samples of an optimizer step, over all processes."""
    micro_batch_size: int = 8
    """At most this many samples in one forward pass. A process takes the largest number up to it that divides its share of the
    global batch; gradients accumulate over the micro-batches."""
    lr: float = 2e-5
    """AdamW's learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: constant (the paper), or cosine decay to zero."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    clip_norm: float = 10.0
    """Maximum of the global gradient norm (the paper: 10 for Flux, 2 for SD3.5)."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of activations and of the frozen base; trained weights, EMAs and Adam's state are always fp32."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """`full` recomputes each block in the backward pass; `selective` saves its matrix products and attention."""
    compile: bool = False
    """`torch.compile` on each transformer block."""
    spike_factor: float | None = 10.0
    """Skip a step whose loss exceeds this multiple of the median of the last 50 applied steps. none: skip only steps whose loss
    or gradient norm is not finite."""
    max_skips: int = 5
    """Number of consecutive skipped steps that are tolerated. After one more the run returns to the checkpoint before them."""
    max_rollbacks: int = 1
    """How often a run returns to a checkpoint by itself before it stops with an error."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if not (self.lr > 0 and self.clip_norm > 0):
            raise ValueError(f"train.lr and train.clip_norm must be positive, got {self.lr} and {self.clip_norm}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"train.warmup_steps must be in 0..train.steps, got {self.warmup_steps} of {self.steps} steps. "
                f"A run with fewer steps than its recipe needs a shorter warmup too, for example train.warmup_steps={self.steps // 10}"
            )
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
    """Kernels of the network's blocks. The dry run prints the choice and the reason."""

    fused: Literal["auto", "triton", "reference", "none"] = "auto"
    """`triton`: fused kernels; `reference`: the same blocks in plain PyTorch; `none`: diffusers' own blocks; `auto`:
    `triton` on a GPU, `none` on a CPU."""
    attention: Literal["auto", "cudnn", "flash3", "flash4", "flash", "xformers", "triton", "efficient", "math"] = "auto"
    """Backend of attention; `auto` measures the available ones, once for each device, shape and dtype. Networks without fused blocks
    have those of PyTorch: cudnn, flash, efficient, math."""
    lora: Literal["library", "auto"] = "library"
    """Matrix products of adapted linears. `library`: those of the GPU's vendor, base and adapter one after the other; `auto`: also
    measure a Triton kernel that computes both at once, for each device and shape, and use it where it is faster. A run that resumes on
    another machine may measure otherwise, and then its last bits differ. Nobody has measured the kernel on a GPU yet."""
    fp8: bool = False
    """Use fp8 matrix products with the base in the near and far passes. Needs adapters on a base that is not sharded, and an
    H100 or later. It takes one byte of memory for each parameter, and adds rounding errors of some per cent: on
    the digits one step is as good as without, 4 and 8 steps are two and three times as far from the teacher (docs/speed.md)."""
    cuda_graphs: bool = False
    """Replay the near and far passes as CUDA graphs. Needs adapters on a base that is not sharded. It helps with micro-batches
    so small that launching kernels takes longer than running them."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written. A run also writes one at its end, and on SIGTERM or Ctrl-C."""

    every: int = 250
    """Steps between checkpoints."""
    keep: int = 2
    """How many of the newest checkpoints are kept."""
    asynchronous: bool = False
    """Copy the tensors to host memory and write them while training continues; fsdp2 only."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every and checkpoint.keep must be at least 1, got {self.every}, {self.keep}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How images are sampled: in validation during training, and by `scfm sample` and `scfm evaluate`."""

    every: int = 250
    """Steps between validation grids; 0: none."""
    prompts: str | tuple[str, ...] = ()
    """Prompts of the grid: a list, a text file with one prompt on each line, or one prompt."""
    steps: tuple[int, ...] = (1, 2, 3, 4, 8)
    """Step counts; the grid has one row for each."""
    seed: int = 1234
    """Image i starts from the noise of `torch.Generator().manual_seed(seed + i)`, as in a diffusers pipeline."""
    shift: float | Literal["dynamic"] = 3.25
    """Timestep shift; `dynamic` is the shift of the model's own scheduler: for most it depends on the image's size (and, for some, on
    the step count), for some it is fixed."""
    guidance: float = 3.5
    """Guidance, in the convention of the model's pipeline in diffusers: embedded, or the scale of classifier-free guidance."""
    weights: Role = "student"
    """Which weights to sample from and to export."""
    base: Base = "bfloat16"
    """As `model.base`, for `scfm sample`, `scfm evaluate`, `scfm play` and the Python interface: by default they use adapters on the base
    as it is, as other tools do. Grids during training use `model.base`."""
    teacher_steps: int = 0
    """Also sample the prompts of the grid with the teacher in this number of steps, and log the distance of the student's
    latents from the teacher's. On prompts that are not in the data it shows overfitting. 0: off."""

    def __post_init__(self) -> None:
        if self.every < 0 or not self.steps or min(self.steps) < 1:
            raise ValueError(f"sample.every must be >= 0 and sample.steps positive, got {self.every}, {self.steps}")
        if self.teacher_steps < 0:
            raise ValueError(f"sample.teacher_steps must be at least 0, got {self.teacher_steps}")
        if self.shift != "dynamic" and not float(self.shift) > 0:
            raise ValueError(f"sample.shift must be positive or 'dynamic', got {self.shift}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measurements of `scfm evaluate`."""

    steps: tuple[int, ...] = (1, 2, 3, 4, 8)
    """Step counts of student and base."""
    teacher_steps: int = 32
    """Step count of the teacher's own samples, the reference."""
    samples: int = 1000
    """Number of images for each measurement. Their prompts are captions of the data; from local data they are taken at 64
    evenly spaced positions."""
    per_prompt: int = 1
    """Images of each prompt, of `samples`. With more than one, diversity is measured: how much the images of a prompt differ."""
    prompts: str | None = None
    """Text file with one prompt on each line, JSON lines with the key `prompt` (`.jsonl`), or captions in COCO's JSON format, in place of
    the data's captions."""
    data: str | None = None
    """Folder of the data of the comparison, for example held-out images or a cache of them. none: the data of the run."""
    batch_size: int = 8
    """Images of one forward pass."""
    keep: str | None = None
    """Folder where the frozen model's samples are saved for other runs, which then only sample their students."""
    noise_floor: bool = False
    """Also compare two independent sets of the teacher's samples. A student below their distance follows the teacher for each
    noise, not only in distribution."""
    features: str = "inception"
    """Feature extractor of Frechet distance, precision, recall and diversity: `classifier` (of digits, small and local), `inception`
    (torchmetrics'), or `MODULE:FUNCTION` of a benchmark. FUNCTION gets `features_path` and a device, and returns an `Extractor`
    (scfm_core/train/features.py), which may also measure prompt following."""
    features_path: str | None = None
    """The classifier's folder, or Inception's weights file (weights-inception-2015-12-05-6726825d.pth)."""
    clip_path: str | None = None
    """Local folder of a CLIP model (transformers' format) for the CLIP score; none: no score."""
    cmmd_path: str | None = None
    """Local folder of CLIP ViT-L/14-336 (transformers' format) for CMMD; none: no CMMD."""
    pick_score_path: str | None = None
    """Local folder of PickScore's CLIP model (transformers' format), with its processor; none: no PickScore."""

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("evaluate.steps is empty: name at least one step count")
        if min(*self.steps, self.teacher_steps, self.batch_size, self.per_prompt) < 1 or self.samples < 2:
            raise ValueError(
                "evaluate.steps, teacher_steps, batch_size and per_prompt must be >= 1 and evaluate.samples >= 2"
            )
        if not re.fullmatch(r"classifier|inception|[\w.]+:\w+", self.features):
            raise ValueError(
                f"evaluate.features must be classifier, inception or MODULE:FUNCTION of a benchmark, got {self.features!r}"
            )


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online with a key in WANDB_API_KEY or ~/.netrc, else offline; disabled if wandb is not installed."""
    project: str = "scfm"
    """Name of the project."""


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
