"""From `kernels` in the configuration to what a run uses on its device, and why."""

from dataclasses import dataclass

import torch
from torch import nn

from scfm_core.errors import UserError
from scfm_core.kernels.attention import AttentionChoice, AttentionShape, choose_attention
from scfm_core.kernels.launch import why_no_triton
from scfm_core.models.fused import fuse
from scfm_core.models.protocol import ModelFamily
from scfm_core.train.config import KernelConfig, RunConfig
from scfm_core.train.rules import check_kernels


@dataclass(frozen=True)
class Kernels:
    """What the blocks of a network are computed with."""

    fused: str
    """`triton`, `reference` or `none`."""
    why: str
    attention: AttentionChoice | None
    """None: diffusers' own processor, with PyTorch's default."""

    def apply(self, network: nn.Module) -> None:
        """Put them into a network of diffusers' own blocks, adapted or not."""
        if self.attention is None:
            return
        from scfm_core.kernels.ops import REFERENCE, triton_ops

        ops = triton_ops() if self.fused == "triton" else REFERENCE
        fuse(network, ops, self.attention.backend, blocks=self.fused != "none")

    def __str__(self) -> str:
        blocks = {"triton": "fused Triton kernels", "reference": "fused blocks in plain PyTorch"}
        name = f"{blocks.get(self.fused, 'the blocks of diffusers')} ({self.why})"
        if self.attention is None:
            return f"{name}, PyTorch's default attention"
        times = ", ".join(f"{backend} {time:.2f} ms" for backend, time in self.attention.milliseconds.items())
        why = self.attention.why + (f": {times}" if times else "")
        return f"{name}, {self.attention.backend} attention ({why})"


def choose_kernels(config: RunConfig, family: ModelFamily, device: torch.device, *, training: bool = True) -> Kernels:
    """What `config.kernels` means on `device`; with `kernels.attention: auto` a GPU may be measured for a second.

    Args:
        config: the run.
        family: its model.
        device: where it runs.
        training: off: for sampling, which may happen on a CPU whatever the run was trained with.

    Raises:
        UserError: if what is asked for is not there; the message says why.
    """
    asked = config.kernels if training or device.type == "cuda" else KernelConfig()
    if training:
        check_kernels(config, device)
    if not family.has_kernels:
        if asked.fused in ("triton", "reference") or asked.attention != "auto":
            raise UserError(
                f"kernels.fused and kernels.attention are for Flux's blocks, not those of {family.pipeline}. Set both to auto"
            )
        return Kernels("none", "fused ones are Flux's", None)
    reason = why_no_triton(device)
    if asked.fused == "triton" and reason is not None:
        raise UserError(
            f"kernels.fused=triton cannot run here: {reason}. Set it to auto, reference or none (with TRITON_INTERPRET=1 "
            f"the kernels run on a CPU, for tests)"
        )
    if asked.fused == "auto":
        fused = "triton" if reason is None and device.type == "cuda" else "none"
        why = "a GPU that runs them" if fused == "triton" else reason or "a CPU, where kernels are interpreted"
    else:
        fused, why = asked.fused, "asked for"
    if fused == "none" and asked.attention == "auto" and device.type != "cuda":
        return Kernels(fused, why, None)
    try:
        return Kernels(fused, why, choose_attention(asked.attention, _shape(config, family, device)))
    except ValueError as error:
        raise UserError(str(error)) from error


def _shape(config: RunConfig, family: ModelFamily, device: torch.device) -> AttentionShape:
    """Attention of a training step at the run's resolution."""
    _, rows, columns = family.latent_shape(*config.data.resolution)
    arch = family.network_config
    dtype = torch.bfloat16 if config.train.compute_dtype == "bfloat16" else torch.float32
    return AttentionShape(
        batch=config.train.micro_batch_size,
        tokens=rows * columns // 4 + config.model.text_length,
        heads=arch["num_attention_heads"],
        head_dim=arch["attention_head_dim"],
        dtype=dtype,
        device=device,
    )
