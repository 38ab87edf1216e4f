"""Memory of a run by part, on one GPU and in host memory of one node, computed from the architecture."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from scfm_core.models.adapters import LoRALinear, is_for_fp8
from scfm_core.models.offload import offloaded_bytes
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.quantised import saved_bytes
from scfm_core.models.tensor_files import CHUNK
from scfm_core.train.activations import Activations, activations_of
from scfm_core.train.config import RunConfig
from scfm_core.train.from_cache import is_without_text
from scfm_core.train.rules import micro_batches

REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default
ENCODER_SHARES = {"bfloat16": 1.0, "int8": 0.5, "float8": 0.5, "nf4": 0.3}
"""Sizes of the encoders by `model.encoders`, roughly: the VAE, a few percent of them, stays in bfloat16."""
LIVE_PARAMETERS = 1_000_000_000  # elements that ZeRO-3 gathers at most at a time; DeepSpeed's default


@dataclass(frozen=True)
class Memory:
    """Bytes by part."""

    gpu: dict[str, float]
    host: dict[str, float]
    """Of a node: what its processes hold besides Python, CUDA's context and the data workers."""


@dataclass(frozen=True)
class Shares:
    """Over how many processes an engine shards each kind of tensor."""

    weights: int
    gradients: int
    optimizer: int


def shares(config: RunConfig, world: int) -> Shares:
    """How `config.engine` shards tensors over `world` processes."""
    engine = config.engine
    if engine.name == "fsdp2":
        shard = world if engine.shard == -1 else min(engine.shard, world)
        return Shares(shard, shard, shard)
    return Shares(*(world if engine.zero_stage >= stage else 1 for stage in (3, 2, 1)))


def needs_encoders(config: RunConfig) -> bool:
    """Whether the encoders run beside the network: for images of a folder, and for a cache of latents alone, if it is on this machine.

    Other shards may hold images, or a cache.
    """
    return any(source.format == "folder" or is_without_text(source) for source in config.data.mixture())


def encoders_on_gpu(config: RunConfig, family: ModelFamily) -> float:
    """Bytes of the text encoders and the VAE on a GPU. They are read into host memory in bfloat16."""
    return family.encoder_bytes * ENCODER_SHARES[config.model.encoders]


def estimate_memory(
    config: RunConfig,
    family: ModelFamily,
    network: nn.Module,
    rows: Mapping[str, int],
    base: int,
    trained: int,
    world: int,
    a_node: int = 1,
) -> Memory:
    """Bytes of one GPU out of `world`, and of a node of `a_node` of them.

    Weights, gradients and optimizer are exact up to padding. Activations are measured on a few blocks: see `activations_of`.

    Args:
        config: the run.
        family: its model.
        network: on the meta device, adapted if the run trains adapters.
        rows: input rows of each linear for one sample, by name.
        base: number of parameters of the pre-trained network.
        trained: number of trained parameters of the student; a fake score has as many.
        world: number of processes.
        a_node: number of processes of one node.
    """
    engine, lora, share = config.engine, config.train.weights == "lora", shares(config, world)
    width = 2 if config.train.compute_dtype == "bfloat16" else 4
    zero = engine.name == "deepspeed"
    has_teacher = lora or config.method.has_teacher
    model, blocks = config.model, family.blocks(network)
    on_host, slots = offloaded_bytes(network, blocks, model.offload_blocks, model.base, width)
    saved = sum(saved_bytes(network, blocks, model.base, width).values()) + on_host - slots
    roles = 1 + config.method.has_matching
    weights = {
        "frozen base" if lora else "teacher": (base * width - saved) * has_teacher / share.weights,
        "fp8 copies of it": _fp8_copies(network, rows) * (config.kernels.fp8 and config.model.base == "bfloat16"),
        "student (fp32)": 4 * trained / share.weights,
        "EMAs, fast and slow (fp32)": 8 * trained / share.weights,
        **({"fake score (fp32)": 4 * trained / share.weights} if roles > 1 else {}),
    }
    optimizer = _of_optimizer(config, roles * trained, world)
    activations, size = activations_of(config, family), micro_batches(config, world).size
    copies = 2.0 * trained * (1 + config.method.is_student_first)  # the student's own beside those of the other passes
    working = {
        "adapter in the compute dtype": copies * (lora and width == 2 and share.weights == 1),
        "encoders (on the fly)": encoders_on_gpu(config, family) * needs_encoders(config),
        **_gathered(config, family, network, share, width),
        "reduce bucket (fp32)": 4 * min(REDUCE_BUCKET, trained) * zero,
        "saved activations": size * activations.saved,
        "temporaries of a pass": size * _temporary(config, activations),
    }
    offloaded: dict[str, float] = {}
    if engine.cpu_offload:
        offloaded = optimizer if zero else {**weights, **optimizer}
    on_gpu = {name: size for name, size in {**weights, **optimizer}.items() if name not in offloaded}
    host = _of_a_node(config, family, trained, world, a_node, {**offloaded, "blocks of the base": float(on_host)})
    return Memory({**on_gpu, **working}, host)


def _of_optimizer(config: RunConfig, trained: int, world: int) -> dict[str, float]:
    """Of what is trained, in all roles together."""
    engine, share = config.engine, shares(config, world)
    # Stages 1 and 2 update a copy of their shard and write it back; ZeRO-3's shards are the weights themselves.
    has_masters = engine.name == "deepspeed" and (engine.zero_stage < 3 or engine.cpu_offload)
    return {
        "optimizer's masters (fp32)": 4 * trained / world * has_masters,
        "gradients (fp32)": 4 * trained / share.gradients,
        "Adam (fp32)": 8 * trained / share.optimizer,
    }


def _temporary(config: RunConfig, activations: Activations) -> float:
    """What passes need for a sample beyond the saved activations: the backward, or a pass for the target. That comes before anything
    is saved, or after it if a target is computed from the student's velocity."""
    method = config.method
    saved = 0.0 if method.is_student_first else activations.saved
    rows = method.flow_map.rows_of_a_call if method.has_flow_map else 1  # all rows may be flow-map rows
    return max(activations.temporary, rows * activations.without_gradient - saved)


def _fp8_copies(network: nn.Module, rows: Mapping[str, int]) -> float:
    return float(
        sum(
            layer.base_layer.in_features * layer.base_layer.out_features
            for name, layer in network.named_modules()
            if isinstance(layer, LoRALinear) and is_for_fp8(layer, rows.get(name, 0))
        )
    )


def _of_a_node(
    config: RunConfig, family: ModelFamily, trained: int, world: int, a_node: int, offloaded: dict[str, float]
) -> dict[str, float]:
    """Host memory of a node. `offloaded` is that of one process."""
    is_zero_3 = config.engine.name == "deepspeed" and config.engine.zero_stage == 3
    readers = 1 if is_zero_3 else a_node  # DeepSpeed sends every weight from rank 0 to the others
    needs_captions = bool(config.sample.every) or config.method.caption_dropout > 0 or family.passes == 2
    # With a cache, rank 0 alone encodes the prompts. Data that are no cache are encoded by every process.
    encoders = a_node if needs_encoders(config) else int(needs_captions)
    state = (
        (32 if config.method.has_matching else 20)
        * trained
        / shares(config, world).weights
        * config.checkpoint.asynchronous
    )
    return {
        **{name: a_node * size for name, size in offloaded.items()},
        "weights while loading": float(readers * min(CHUNK, 4 * trained)),
        "encoders while loading": float(encoders * family.encoder_bytes),
        "copy of a checkpoint": a_node * state,
    }


def _gathered(
    config: RunConfig, family: ModelFamily, network: nn.Module, share: Shares, width: int
) -> dict[str, float]:
    """What sharding needs during a pass. With FSDP2: the weights of a block, of the next block, and outside of blocks; a block's
    gradients, and their sum over the processes in fp32."""
    if share.weights == 1:
        return {}
    total = sum(p.numel() for p in network.parameters())
    if config.engine.name == "deepspeed":
        return {"gathered weights": float(width * min(LIVE_PARAMETERS, total))}
    blocks = family.blocks(network)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    trained = max(sum(p.numel() for p in block.parameters() if p.requires_grad) for block in blocks)
    trained //= 1 + config.method.has_matching  # a backward has gradients of one role
    return {
        "gathered weights": float(width * (total - sum(sizes) + 2 * max(sizes))),
        "gradients of a block, and their sum (fp32)": float((width + 4) * trained),
    }
