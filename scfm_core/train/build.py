"""From configuration to the parts of a run: device, family, model, encoders."""

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

from scfm_core.data.schema import Batch, Dataset
from scfm_core.data.webdataset import CachedDataset
from scfm_core.errors import UserError
from scfm_core.flow.schedule import dynamic_shift
from scfm_core.models.encoders import Autoencoder, TextEncoders
from scfm_core.models.flux import Flux
from scfm_core.models.protocol import Conditioning
from scfm_core.models.student import FullModel, LoRAModel
from scfm_core.models.weights import encoder_fingerprint
from scfm_core.train.config import RunConfig, SampleConfig

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# What selective checkpointing keeps: results that are dear to recompute. The rest of a block is elementwise.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def resolve_device(name: str) -> torch.device:
    """`run.device` as a device.

    Raises:
        UserError: if it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"run.device is {name!r}, but torch sees no GPU. Set run.device=cpu, or mend the driver")
    return device


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Dtype of activations and of the frozen base."""
    return _DTYPES[config.train.compute_dtype]


def build_family(config: RunConfig, *, offline: bool = False) -> Flux:
    """The model family of `config.model`, its folder resolved; UserError if it is not there."""
    return Flux(config.model.path, offline=offline)


def build_model(config: RunConfig, family: Flux, device: torch.device, *, train: bool = True) -> LoRAModel | FullModel:
    """Student, EMAs and teacher.

    Args:
        config: the run.
        family: how to load and call the network.
        device: where the weights go.
        train: apply activation checkpointing and compilation.
    """
    dtype = compute_dtype(config)
    model: LoRAModel | FullModel
    loaded = dtype if config.train.weights == "lora" else torch.float32
    if config.model.init == "random":
        network = family.random_network(loaded, device, config.run.seed)
    else:
        network = family.load_network(loaded, device)
    if config.train.weights == "lora":
        try:
            model = LoRAModel(family, network, config.lora, config.run.seed)
        except ValueError as error:
            raise UserError(str(error)) from error
    else:
        teacher = family.load_network(dtype, device) if config.method.teacher_fraction > 0 else None
        model = FullModel(family, network, dtype, teacher=teacher)
    if train:
        set_activation_checkpointing(network, config.train.activation_checkpointing)
        if config.train.compile:
            compile_blocks(model)
    return model


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
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: LoRAModel | FullModel) -> None:
    """`torch.compile` on every transformer block: one graph a kind of block, reused by all of them."""
    # Graphs of one function: two kinds of block x three adapters x first and later blocks' strides; the default is 8,
    # beyond which dynamo gives up and runs eagerly.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for network in model.networks.values():
        for block in transformer_blocks(network):
            block.compile()


class BatchEncoder:
    """Batch -> latents and conditioning on the device: a copy for cached samples, else VAE and text encoders run.

    Raises:
        UserError: if a cache does not belong to this model, text length or resolution.
    """

    def __init__(self, config: RunConfig, family: Flux, dataset: Dataset, device: torch.device) -> None:
        self.device = device
        self.text: TextEncoders | None = None
        self.vae: Autoencoder | None = None
        family.latent_shape(*config.data.resolution)  # refuses resolutions that cannot be packed
        if isinstance(dataset, CachedDataset):
            check_cache(config, family, dataset)
        else:
            self.text = TextEncoders(family.folder, config.model.text_length, compute_dtype(config), device)
            self.vae = Autoencoder(family.folder, compute_dtype(config), device)

    def encode(self, batch: Batch) -> tuple[Tensor, Conditioning]:
        """Latents fp32 [B, C, H, W] and conditioning."""
        if batch.latents is not None:
            assert batch.text is not None and batch.pooled is not None
            cond = Conditioning(text=batch.text, pooled=batch.pooled).to(self.device)
            return batch.latents.to(self.device, torch.float32), cond
        assert batch.images is not None and self.vae is not None and self.text is not None
        return self.vae.encode(batch.images.to(self.device)).float(), self.text.encode(batch.captions)


def check_cache(config: RunConfig, family: Flux, dataset: CachedDataset) -> None:
    """Hold a cache's manifest against the run's model; UserError names both sides."""
    manifest = dataset.manifest
    for key, cached, wanted in (
        ("model.text_length", manifest.text_length, config.model.text_length),
        ("data.resolution", tuple(manifest.resolution), tuple(config.data.resolution)),
    ):
        if cached != wanted:
            raise UserError(
                f"data.path: the cache {dataset.folder} was encoded with {key} {cached}, this run asks for {wanted}. "
                f"Set {key} to match, or encode again"
            )
    fingerprint = encoder_fingerprint(family.folder)
    if manifest.encoder != fingerprint:
        raise UserError(
            f"data.path: the cache {dataset.folder} was encoded by another model (encoder {manifest.encoder[:12]}) "
            f"than {family.folder} (encoder {fingerprint[:12]}). Encode it again with this model's encoders"
        )


def sampling_shift(config: SampleConfig, family: Flux, height: int, width: int) -> float:
    """The timestep shift of a sampler for images of `height` x `width` pixels."""
    if config.shift == "dynamic":
        _, rows, columns = family.latent_shape(height, width)
        return dynamic_shift(rows * columns // 4)
    return float(config.shift)


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
    """Prompts as given, or the lines of a text file.

    Raises:
        UserError: if the file is missing or empty.
    """
    if not isinstance(source, str):
        return list(source)
    path = Path(source).expanduser()
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(
            f"{where}: the prompt file {source!r} cannot be read ({error.strerror}). A prompt itself goes into brackets: "
            f"[{source}]"
        ) from error
    if not prompts:
        raise UserError(f"{where}: the prompt file {source!r} has no prompt; put one on each line")
    return prompts
