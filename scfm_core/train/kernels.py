"""From the section `kernels` of the configuration to the kernels of a run on its device."""

import re
from dataclasses import dataclass, field

import torch
from torch import nn

from scfm_core.distributed.world import launched_size
from scfm_core.errors import UserError
from scfm_core.kernels.attention import BACKENDS, SDPA, AttentionChoice, AttentionShape, choose_attention
from scfm_core.kernels.launch import why_no_triton
from scfm_core.kernels.lora_choice import ProductChoice, choose_products
from scfm_core.kernels.lora_products import MIN_ROWS, use_tiles
from scfm_core.models.protocol import ModelFamily
from scfm_core.train.config import KernelConfig, RunConfig
from scfm_core.train.device import compute_dtype
from scfm_core.train.rules import check_kernels, micro_batches
from scfm_core.train.trace import forward_of


@dataclass(frozen=True)
class Kernels:
    """The kernels of a network's blocks."""

    fused: str
    """`triton`, `reference` or `none`."""
    why: str
    """The reason for `fused`."""
    attention: AttentionChoice | None
    """None: diffusers' own processor, with PyTorch's default attention."""
    products: ProductChoice = field(default_factory=ProductChoice)
    """Of adapted linears."""

    def apply(self, family: ModelFamily, network: nn.Module) -> None:
        """Use these kernels in a network of `family` with diffusers' blocks, with or without adapters.

        The choice of products holds for all networks of the process.
        """
        use_tiles(self.products.tiles)
        if self.attention is None:
            return
        from scfm_core.kernels.ops import REFERENCE, triton_ops

        ops = triton_ops() if self.fused == "triton" else REFERENCE
        family.fuse(network, ops, self.attention.backend, blocks=self.fused != "none")

    def __str__(self) -> str:
        blocks = {"triton": "fused Triton kernels", "reference": "fused blocks in plain PyTorch"}
        name = f"{blocks.get(self.fused, 'the blocks of diffusers')} ({self.why})"
        name += str(self.products)
        if self.attention is None:
            return f"{name}, PyTorch's default attention"
        times = ", ".join(f"{backend} {time:.2f} ms" for backend, time in self.attention.milliseconds.items())
        why = self.attention.why + (f": {times}" if times else "")
        return f"{name}, {self.attention.backend} attention ({why})"


def choose_kernels(config: RunConfig, family: ModelFamily, device: torch.device, *, training: bool = True) -> Kernels:
    """The kernels of `config.kernels` on `device`. `kernels.attention: auto` may measure the GPU for about a second.

    Args:
        config: the run.
        family: its model.
        device: where the network runs.
        training: False for sampling, which may run on a CPU although the run was trained on a GPU.

    Raises:
        UserError: if a requested kernel is unavailable; the message gives the reason.
    """
    requested = config.kernels if training or device.type == "cuda" else KernelConfig()
    if training:
        check_kernels(config, device)
    if not family.has_kernels and requested.fused in ("triton", "reference"):
        raise UserError(f"there are no fused blocks for the network of {family.pipeline}. Set kernels.fused to auto")
    reason = why_no_triton(device)
    if requested.fused == "triton" and reason is not None:
        raise UserError(
            f"kernels.fused=triton cannot run here: {reason}. Set kernels.fused to auto, reference or none (with TRITON_INTERPRET=1 "
            f"the kernels run on a CPU, for tests)"
        )
    if not family.has_kernels:
        fused, why = "none", "there are no fused ones for this network"
    elif requested.fused == "auto":
        fused = "triton" if reason is None and device.type == "cuda" else "none"
        why = "a GPU that supports them" if fused == "triton" else reason or "on a CPU kernels would be interpreted"
    else:
        fused, why = requested.fused, "as configured"
    products = _products(config, family, device) if training and requested.lora == "auto" else ProductChoice()
    if fused == "none" and requested.attention == "auto" and device.type != "cuda":
        return Kernels(fused, why, None, products)
    try:
        backends = BACKENDS if family.has_kernels else tuple(SDPA)
        choice = choose_attention(requested.attention, _shape(config, family, device), backends=backends)
        return Kernels(fused, why, choice, products)
    except ValueError as error:
        raise UserError(str(error)) from error


def _products(config: RunConfig, family: ModelFamily, device: torch.device) -> ProductChoice:
    """The choice for the adapted linears of a training step."""
    if config.train.weights != "lora":
        return ProductChoice("there are no adapters")
    size = micro_batches(config, launched_size()).size
    rows = forward_of(family, family.latent_shape(*config.data.resolution), config.model.text_length).rows
    linears = [
        (size * rows.get(name, 0), module.in_features, module.out_features)
        for name, module in family.meta_network().named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(config.lora.targets, name)
    ]
    shapes = [shape for shape in linears if shape[0] >= MIN_ROWS]
    return choose_products(shapes, config.lora.rank, compute_dtype(config), device)


def _shape(config: RunConfig, family: ModelFamily, device: torch.device) -> AttentionShape:
    """Shape of the attention in a training step at the run's resolution."""
    _, rows, columns = family.latent_shape(*config.data.resolution)
    dtype = torch.bfloat16 if config.train.compute_dtype == "bfloat16" else torch.float32
    return AttentionShape(
        batch=micro_batches(config, launched_size()).size,
        tokens=rows * columns // family.patch**2 + family.text_tokens(config.model.text_length),
        heads=family.heads,
        head_dim=family.width // family.heads,
        dtype=dtype,
        device=device,
        kv_heads=family.kv_heads,
        masked=family.masks_attention,
    )
