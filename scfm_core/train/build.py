"""From configuration to the parts of a run: device, family, model, engine, encoders."""

import contextlib
import gc
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from scfm_core.data.corpus import Corpus
from scfm_core.data.schema import BadData, Batch
from scfm_core.distributed.deepspeed import ZeroEngine, ZeroLayout
from scfm_core.distributed.deepspeed_config import deepspeed_config
from scfm_core.distributed.engine import OptimizerConfig
from scfm_core.distributed.fsdp2 import Fsdp2Engine, Fsdp2Layout
from scfm_core.distributed.world import World, launched_size
from scfm_core.errors import UserError
from scfm_core.flow.schedule import dynamic_shift, shift_of_grid, sigma_grid
from scfm_core.models.adapters import ADAPTERS
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.families import open_family
from scfm_core.models.protocol import Conditioning, ModelFamily
from scfm_core.models.student import FullModel, LoRAModel
from scfm_core.models.weights import encoder_fingerprint, network_fingerprint
from scfm_core.scfm.plan import PlanConfig
from scfm_core.train.config import RunConfig, SampleConfig, TrainConfig
from scfm_core.train.kernels import Kernels

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# What selective checkpointing keeps: results that are dear to recompute. The rest of a block is elementwise.
_KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "scfm::lora_linear",
    "scfm::flash_attention",
}
_KEPT_LIBRARIES = {"xformers", "xformers_flash", "xformers_flash3", "flash_attn_3"}  # attention and nothing else


def resolve_device(name: str) -> torch.device:
    """`run.device` as a device; of several processes on a machine, each takes the GPU of its LOCAL_RANK.

    Raises:
        UserError: if it is not there.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"run.device is {name!r}, but torch sees no GPU. Set run.device=cpu, or mend the driver")
    if launched_size() == 1:
        device = torch.device("cuda", torch.device("cuda" if name == "auto" else name).index or 0)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"run.device={name}, but this machine has {torch.cuda.device_count()} GPUs, from cuda:0 on")
        torch.cuda.set_device(device)  # Triton launches on the current one, whatever its tensors lie on
        return device
    if ":" in name:
        raise UserError(
            f"run.device={name} names one GPU, but the launcher started {launched_size()} processes. Set it to auto"
        )
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"the launcher started a process of local rank {local_rank}, but this machine has {count} GPUs. "
            f"Start at most {count} processes on it"
        )
    return torch.device("cuda", local_rank)


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Dtype of activations and of the frozen base."""
    return _DTYPES[config.train.compute_dtype]


def build_family(config: RunConfig, *, offline: bool = False) -> ModelFamily:
    """The model family of `config.model`, its folder resolved; UserError if it is not there, or cannot pack a size."""
    family = open_family(config.model.path, offline=offline)
    for size in {config.data.resolution, *config.data.sizes()}:
        family.latent_shape(*size)
    if config.method.step_embedding and not family.network_config.get("guidance_embeds"):
        raise UserError(
            f"method.step_embedding tells the step size to the network's embedded guidance, which {config.model.path} has "
            f"not (guidance_embeds in transformer/config.json). Take an architecture that has it"
        )
    _check_guidance(config, family)
    return family


def _check_guidance(config: RunConfig, family: ModelFamily) -> None:
    method = config.method
    if family.passes == 1 and method.distil_guidance:
        raise UserError(
            f"method.distil_guidance is for models that are guided by a second pass of the network; {config.model.path} needs one "
            f"pass as it is. Set it to false"
        )
    draws_guidance = method.has_pairs or method.trajectory_steps is not None
    if family.passes == 2 and draws_guidance and method.guidance[0] < 1:
        raise UserError(
            f"method.guidance is the scale of classifier-free guidance for this model, and begins at "
            f"{method.guidance[0]:g}: rows below 1 would teach to leave the caption out. Set it, for SD3.5 to [3.5, 5]"
        )


Layout = Fsdp2Layout | ZeroLayout


def micro_batches(train: TrainConfig, world: World) -> int:
    """Micro-batches that each process runs in a step.

    Raises:
        UserError: if the global batch cannot be divided so.
    """
    together = train.micro_batch_size * world.size
    if train.global_batch_size % together:
        raise UserError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {world.size} processes. Change the micro-batch or the number of processes"
        )
    return train.global_batch_size // together


def build_layout(config: RunConfig, world: World, device: torch.device, accumulation: int) -> Layout:
    """How `config.engine` puts networks on the processes; UserError if it cannot."""
    if config.engine.name == "fsdp2":
        return Fsdp2Layout(config.engine, world, device, compute_dtype(config))
    settings = optimizer_config(config.train, accumulation)
    if config.train.compile and config.engine.zero_stage == 3:
        raise UserError(
            "train.compile=true does not go with engine.zero_stage=3, which fetches the weights of every layer by hooks. "
            "Set train.compile=false, zero_stage 1 or 2, or engine.name=fsdp2"
        )
    return ZeroLayout(deepspeed_config(config.engine, settings, world.size, config.train.weights), device)


def optimizer_config(train: TrainConfig, accumulation: int) -> OptimizerConfig:
    """What an engine needs of `train`."""
    return OptimizerConfig(
        betas=train.betas,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        accumulation=accumulation,
        micro_batch_size=train.micro_batch_size,
        lr=train.lr,
        compute_dtype=train.compute_dtype,
    )


def build_engine(
    config: RunConfig, model: LoRAModel | FullModel, layout: Layout, world: World, accumulation: int
) -> Fsdp2Engine | ZeroEngine:
    """The engine of a run, over the model that was built with `layout`."""
    settings = optimizer_config(config.train, accumulation)
    if isinstance(layout, ZeroLayout):
        return ZeroEngine(model.parameters, model.networks, layout, world, settings)
    return Fsdp2Engine(model.parameters, model.networks, layout, world, settings)


def build_model(
    config: RunConfig,
    family: ModelFamily,
    device: torch.device,
    *,
    kernels: Kernels,
    layout: Layout | None = None,
    with_teacher: bool = True,
) -> LoRAModel | FullModel:
    """Student, EMAs and teacher; to sample, the role of `sample.weights` and the teacher.

    Args:
        config: the run.
        family: how to load and call the network.
        device: where the weights go.
        kernels: what the blocks are computed with.
        layout: build it for training on these processes, with activation checkpointing and compilation. A network that
            is sharded is loaded into host memory, one after the other, and leaves it block by block. None: to sample, with
            full weights in the compute dtype, as an exported pipeline has them.
        with_teacher: load the teacher of full weights, if the run has one (to sample: also if it made the stored paths).
    """
    dtype = compute_dtype(config)
    target = torch.device("cpu") if layout is not None and layout.is_sharded else device
    prepare = _preparation(config, kernels, layout)
    model: LoRAModel | FullModel
    loaded = dtype if config.train.weights == "lora" or layout is None else torch.float32
    roles = ADAPTERS if layout is not None else (config.sample.weights,)
    if config.model.init == "random":
        network = family.random_network(loaded, target, config.run.seed)
    else:
        network = family.load_network(loaded, target)
    if config.train.weights == "lora":
        try:
            model = LoRAModel(family, network, config.lora, config.run.seed)
        except ValueError as error:
            raise UserError(str(error)) from error
        if config.kernels.fp8 and layout is not None:
            model.bank.quantise()
        prepare(network, True)
    else:
        teacher = None
        if with_teacher and (config.method.has_teacher if layout is not None else config.method.follows_teacher):
            teacher = family.load_network(dtype, target)
            prepare(teacher, False)
        model = FullModel(family, network, dtype, teacher=teacher, roles=roles, prepare=prepare)
    return model


def _preparation(config: RunConfig, kernels: Kernels, layout: Layout | None) -> Callable[[nn.Module, bool], None]:
    """What is done to each network: fuse; for training, recompute (the trained one), compile, shard."""

    def prepare(network: nn.Module, trained: bool) -> None:
        kernels.apply(network)
        if layout is None:
            return
        if trained:
            set_activation_checkpointing(network, config.train.activation_checkpointing)
        if config.train.compile:
            compile_blocks(network)
        layout.prepare(network.requires_grad_(False) if not trained else network, transformer_blocks(network))

    return prepare


def transformer_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a diffusers transformer: the unit of checkpointing and compilation."""
    return [
        block for name in ("transformer_blocks", "single_transformer_blocks") for block in getattr(network, name, ())
    ]


def set_activation_checkpointing(network: nn.Module, mode: str) -> None:
    """Recompute each block in the backward: `none`, `selective` (matrix products and attention are kept) or `full`.

    Done inside the block's forward, not around the block as diffusers' own hook does, so that a compiled block
    contains its checkpoint: a compiled block inside a selective checkpoint would fall back to eager.
    """
    if mode == "none":
        return
    forward = {"selective": _forward_selective, "full": _forward_full}[mode]
    for block in transformer_blocks(network):
        block.forward = MethodType(forward, block)  # type: ignore[method-assign]


# Plain functions of the block, without closures: torch.compile shares their code between blocks.
def _forward_full(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return type(block).forward(block, *args, **kwargs)
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)


def _forward_selective(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return type(block).forward(block, *args, **kwargs)
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, context_fn=_selective_contexts, **kwargs)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_dear_results)


def _keep_dear_results(context: object, op: object, *_: object, **__: object) -> CheckpointPolicy:
    dear = isinstance(op, torch._ops.OpOverload) and (op.name() in _KEPT or op.namespace in _KEPT_LIBRARIES)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(network: nn.Module) -> None:
    """`torch.compile` on every transformer block: one graph a kind of block, reused by all of them."""
    # Graphs of one function: two kinds of block x three adapters and none x all, some or one of the rows x first and later
    # blocks' strides; the default is 8, beyond which dynamo gives up and runs eagerly.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in transformer_blocks(network):
        block.compile()


class BatchEncoder:
    """Batch -> latents and conditioning on the device: a copy for cached samples, else VAE and text encoders run.

    Args:
        prompts: of the validation grid, encoded here: on a cache the text encoders are gone before the network comes.

    Raises:
        UserError: if a cache does not belong to this model or text length.
    """

    def __init__(
        self,
        config: RunConfig,
        family: ModelFamily,
        corpus: Corpus,
        device: torch.device,
        prompts: Sequence[str] = (),
    ) -> None:
        self.device = device
        self.text: TextEncoders | None = None
        self.vae: Autoencoder | None = None
        self.prompts: Conditioning | None = None
        """The validation prompts, at `sample.guidance`."""
        self.paddings = [None if padding is None else padding.to(device) for padding in corpus.paddings]
        if corpus.is_cached:
            check_cache(config, family, corpus)
        needs_empty_caption = family.passes == 2 or config.method.caption_dropout > 0
        if prompts or needs_empty_caption or not corpus.is_cached:
            self.text = TextEncoders(family, config.model.text_length, compute_dtype(config), device)
            if prompts:
                self.prompts = self.text.encode(prompts, guidance=config.sample.guidance)
            if corpus.is_cached:
                self.text = None
                gc.collect()  # cycles would keep them
        if not corpus.is_cached:
            self.vae = Autoencoder(family, compute_dtype(config), device)

    def encode(self, batch: Batch) -> tuple[Tensor, Conditioning]:
        """Latents fp32 [B, C, H, W] and conditioning."""
        if batch.latents is not None:
            assert batch.text is not None and batch.pooled is not None
            text = batch.text.padded(self.paddings, self.device)
            cond = Conditioning(text=text, pooled=batch.pooled.to(self.device, non_blocking=True))
            return batch.latents.to(self.device, non_blocking=True).float(), cond
        assert batch.images is not None and self.vae is not None and self.text is not None
        images = batch.images.to(self.device, non_blocking=True)
        return self.vae.encode(images).float(), self.text.encode(batch.captions)


def check_paths(config: RunConfig, family: ModelFamily, corpus: Corpus) -> None:
    """Hold stored paths, by the first of each source, against model, method and sampler; UserError names the source."""
    method, scale = config.method, config.method.guidance[0]
    if config.model.init != "random":  # whose network is no teacher
        _refuse_other_teachers(family, corpus)
    knows_guidance = family.passes == 2 or bool(family.network_config.get("guidance_embeds"))
    intervals: dict[str, int] = {}
    others: dict[str, str] = {}
    """Sources that were not taken as the sampler samples, and how they were."""
    for name, item in corpus.first_items().items():
        with contextlib.suppress(BadData):  # the loader has its way with those
            record = corpus.record(item, padded=False)
            path, latents = record.path, record.latents
            assert path is not None and latents is not None
            intervals[name] = path["velocities"].shape[0]
            refuse_other_intervals(method, intervals[name], f"of source {name!r} ")
            guidance = float(path["guidance"])  # kept in fp32
            if method.distil_guidance and not math.isclose(guidance, scale, rel_tol=1e-6):
                raise UserError(
                    f"data: the stored paths of source {name!r} were guided at scale {guidance:g}, but "
                    f"method.distil_guidance learns method.guidance={scale:g} alone. Set it and sample.guidance to that scale, "
                    f"or make paths with `scfm data generate --trajectories --guidance {scale:g}`"
                )
            wanted = _shift_of_latents(config.sample, latents)
            is_shift = torch.allclose(path["sigmas"].float(), sigma_grid(intervals[name], wanted), atol=1e-4)
            is_guidance = not knows_guidance or math.isclose(guidance, config.sample.guidance, rel_tol=1e-6)
            if not (is_shift and is_guidance):
                shift = wanted if is_shift else shift_of_grid(path["sigmas"])
                others[name] = f"shift {shift:.4g} and guidance {guidance:g}"
    if len(set(intervals.values())) > 1:
        raise UserError(
            f"data: the sources' paths have different numbers of intervals, {intervals}, which no batch can hold together. "
            f"Store them alike with `scfm data generate --trajectories --steps N --intervals K`"
        )
    if others and len(others) == len(intervals):
        sample = config.sample
        raise UserError(
            f"data: the stored paths were taken at {' or '.join(sorted(set(others.values())))}, but sample.shift is {sample.shift} "
            f"and sample.guidance {sample.guidance:g}: a student of them is to be sampled at theirs. Set both to it, or store paths "
            f"with `scfm data generate --trajectories --shift {sample.shift} --guidance {sample.guidance:g}`"
        )


def _refuse_other_teachers(family: ModelFamily, corpus: Corpus) -> None:
    own = network_fingerprint(family.folder)
    for name, network in corpus.networks().items():
        if network not in (None, own):
            raise UserError(
                f"data: the stored paths of source {name!r} were taken by another network ({str(network)[:12]}) than that of "
                f"{family.folder} ({own[:12]}). Take them with this one: `scfm data generate --trajectories`"
            )


def _shift_of_latents(config: SampleConfig, latents: Tensor) -> float:
    if config.shift == "dynamic":
        return dynamic_shift(latents.shape[-2] * latents.shape[-1] // 4)
    return float(config.shift)


def refuse_other_intervals(method: PlanConfig, intervals: int, where: str = "") -> None:
    """UserError unless the nodes of every grid of `method` are nodes of stored paths of so many intervals."""
    if any(intervals % grid for grid in method.trajectory_grids):
        divisors = [grid for grid in method.trajectory_grids if intervals % grid == 0] or [1]
        raise UserError(
            f"data: the stored paths {where}have {intervals} intervals, of which "
            f"method.trajectory_grids={list(method.trajectory_grids)} are not all divisors. Set "
            f"method.trajectory_grids={divisors}, or store paths of another number of intervals"
        )


def check_cache(config: RunConfig, family: ModelFamily, corpus: Corpus) -> None:
    """Hold cached sources against the run's model; UserError names both sides."""
    fingerprint = encoder_fingerprint(family.folder)
    if corpus.encoder != fingerprint:
        raise UserError(
            f"data: the cache was encoded by another model (encoder {str(corpus.encoder)[:12]}) than {family.folder} "
            f"(encoder {fingerprint[:12]}). Encode it again with this model's encoders"
        )
    if corpus.text_length != family.text_tokens(config.model.text_length):
        cached = (corpus.text_length or 0) - family.clip_tokens
        raise UserError(
            f"data: the cache was encoded with model.text_length {cached}, this run asks for "
            f"{config.model.text_length}. Set it to match, or encode again"
        )


def sampling_shift(config: SampleConfig, family: ModelFamily, height: int, width: int) -> float:
    """The timestep shift of a sampler for images of `height` x `width` pixels."""
    return _shift_of_latents(config, torch.empty(family.latent_shape(height, width), device="meta"))


def validation_prompts(config: RunConfig) -> list[str]:
    """Prompts of the grids; none if grids are off.

    Raises:
        UserError: if grids are asked for without prompts.
    """
    if not config.sample.every:
        return []
    prompts = read_prompts(config.sample.prompts, "sample.prompts")
    if not prompts:
        raise UserError("sample.every asks for grids, but sample.prompts is empty. Give prompts, or set sample.every=0")
    return prompts


def read_prompts(source: str | tuple[str, ...], where: str) -> list[str]:
    """Prompts as given, the lines of a text file, or the captions of a JSON file in COCO's format, the first of each image
    (https://cocodataset.org/#format-data).

    Raises:
        UserError: if the file is missing, empty, or JSON of another kind.
    """
    if not isinstance(source, str):
        return list(source)
    path = Path(source).expanduser()
    try:
        content = path.read_text(encoding="utf-8")
        lines = _coco_captions(content) if path.suffix == ".json" else content.splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = 'JSON of COCO\'s format, {"annotations": [{"image_id": ..., "caption": ...}]}'
        expected = kind if path.suffix == ".json" else "a text file in UTF-8"
        raise UserError(f"{where}: the prompt file {source!r} is not {expected} ({error})") from error
    except OSError as error:
        raise UserError(
            f"{where}: the prompt file {source!r} cannot be read ({error.strerror}). A prompt itself goes into brackets: "
            f"[{source}]"
        ) from error
    if not prompts:
        raise UserError(f"{where}: the prompt file {source!r} has no prompt; put one on each line")
    return prompts


def _coco_captions(content: str) -> list[str]:
    """The caption of the lowest id of each image, by the images' ids."""
    first: dict[int, tuple[int, str]] = {}
    for row in json.loads(content)["annotations"]:
        candidate = (row.get("id", 0), row["caption"])
        first[row["image_id"]] = min(first.get(row["image_id"], candidate), candidate)
    return [caption for _, (_, caption) in sorted(first.items())]
