"""Memory of a run by part, on one GPU and in the host memory of one process, from the architecture alone."""

from dataclasses import dataclass

from torch import nn

from scfm_core.models.adapters import is_for_fp8
from scfm_core.models.protocol import ModelFamily
from scfm_core.train.config import RunConfig
from scfm_core.train.network import transformer_blocks

REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default
LIVE_PARAMETERS = 1_000_000_000  # ZeRO-3 gathers at most so many elements at a time; DeepSpeed's default


@dataclass(frozen=True)
class Memory:
    """Bytes by part."""

    gpu: dict[str, float]
    host: dict[str, float]
    """What offloading moves to host memory, for one process."""


@dataclass(frozen=True)
class Shares:
    """Over how many processes an engine spreads each kind of tensor."""

    weights: int
    gradients: int
    optimizer: int


def shares(config: RunConfig, world: int) -> Shares:
    """How `config.engine` spreads tensors over `world` processes."""
    engine = config.engine
    if engine.name == "fsdp2":
        shard = world if engine.shard == -1 else min(engine.shard, world)
        return Shares(shard, shard, shard)
    return Shares(*(world if engine.zero_stage >= stage else 1 for stage in (3, 2, 1)))


def has_folder(config: RunConfig) -> bool:
    """Whether images are read from a folder, so that the encoders run beside the network; shards may hold either."""
    return any(source.format == "folder" for source in config.data.mixture())


def estimate_memory(
    config: RunConfig, family: ModelFamily, network: nn.Module, base: int, trained: int, tokens: int, world: int
) -> Memory:
    """Bytes of one process of `world`.

    Weights, gradients and optimizer are exact up to padding; activations and gathered weights are guesses.

    Args:
        config: the run.
        family: its model.
        network: on the meta device, adapted if the run trains adapters.
        base: parameters of the pre-trained network.
        trained: trained parameters.
        tokens: image and text tokens of a sample.
        world: processes.
    """
    engine, lora, share = config.engine, config.train.weights == "lora", shares(config, world)
    width = 2 if config.train.compute_dtype == "bfloat16" else 4
    zero = engine.name == "deepspeed"
    has_teacher = lora or config.method.has_teacher
    weights = {
        "frozen base" if lora else "teacher": base * width * has_teacher / share.weights,
        "fp8 copies of it": float(
            sum(m.base_layer.weight.numel() for name, m in network.named_modules() if is_for_fp8(name, m))  # type: ignore[union-attr]
            if config.kernels.fp8
            else 0
        ),
        "student (fp32)": 4 * trained / share.weights,
        "EMAs, fast and slow (fp32)": 8 * trained / share.weights,
    }
    optimizer = {
        # Stages 1 and 2 update a slice of their own and copy it back; ZeRO-3's slices are the weights themselves.
        "optimizer's masters (fp32)": 4 * trained / world * (zero and (engine.zero_stage < 3 or engine.cpu_offload)),
        "gradients (fp32)": 4 * trained / share.gradients,
        "Adam (fp32)": 8 * trained / share.optimizer,
    }
    working = {
        "encoders (on the fly)": float(family.encoder_bytes * has_folder(config)),
        "gathered weights (a guess)": _gathered(config, network, share, width),
        "reduce bucket (fp32)": 4 * min(REDUCE_BUCKET, trained) * zero,
        "activations (a guess)": _activations(config, family, tokens, width),
    }
    if not engine.cpu_offload:
        return Memory({**weights, **optimizer, **working}, {})
    if zero:
        return Memory({**weights, **working}, optimizer)
    return Memory(working, {**weights, **optimizer})


def _gathered(config: RunConfig, network: nn.Module, share: Shares, width: int) -> float:
    """Whole weights during a pass: with FSDP2 a block, the next one, and what lies outside of blocks."""
    if share.weights == 1:
        return 0.0
    total = sum(p.numel() for p in network.parameters())
    if config.engine.name == "deepspeed":
        return float(width * min(LIVE_PARAMETERS, total))
    blocks = [sum(p.numel() for p in block.parameters()) for block in transformer_blocks(network)]
    return float(width * (total - sum(blocks) + 2 * max(blocks)))


def _activations(config: RunConfig, family: ModelFamily, tokens: int, width: int) -> float:
    arch = family.network_config
    dim = arch["num_attention_heads"] * arch["attention_head_dim"]
    blocks = arch["num_layers"] + arch.get("num_single_layers", 0)
    # Kept for the backward, per token and block, in units of D elements: block input, norm outputs, q, k, v, the
    # attention's output, the feed-forward's hidden activations and the gated residuals; for the eager step.
    mode = config.train.activation_checkpointing
    alive = {"none": 34, "selective": 16, "full": 1}[mode] * blocks + (34 if mode == "full" else 0)
    return float(config.train.micro_batch_size * tokens * dim * alive * width)
