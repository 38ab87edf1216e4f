"""Qwen-Image on diffusers' `QwenImageTransformer2DModel`: masked text, guidance that keeps the norm of each token.

Conventions are those of diffusers' `QwenImagePipeline`. The model: arXiv 2508.02324.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scfm_core.models import original_names
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.flux import PATCH, pack_latents, unpack_latents
from scfm_core.models.protocol import FieldKind, dtype_of, rounded
from scfm_core.models.qwen_vae import ARCHITECTURE, PARAMETERS, QwenVAE

_NETWORK = {
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}
_SMALL = 1e-6  # norm of a token of the velocity, which is about 10


class QwenImage(QwenVAE):
    """Qwen-Image in diffusers' format.

    Its scheduler stretches every grid to end at sigma 0.02 (`shift_terminal`), which no shift can express, and which divides by
    zero in one step. Our sampler uses the plain shifted grid. In diffusers, a student's pipeline therefore needs a scheduler
    without it: `FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift_terminal=None)`.
    """

    pipelines = ("QwenImagePipeline",)
    fields: ClassVar[dict[str, FieldKind]] = {"text": "masked"}
    empty_caption = " "
    mu_points = ((256, 0.5), (8192, 0.9))
    in_channels_per_latent = PATCH**2
    static_shapes = False
    other_tools = original_names.QWEN_IMAGE
    known: ClassVar[dict[str, dict[str, Any]]] = {
        f"Qwen/Qwen-Image{version}": {
            "transformer": _NETWORK,
            # bf16: Qwen2.5-VL-7B with its vision tower and output layer, which the pipeline loads too, and the VAE
            "encoder_bytes": 2 * (8_292_166_656 + PARAMETERS),
            "vae": ARCHITECTURE,
        }
        for version in ("", "-2512")
    }

    @property
    def network_class(self) -> Any:
        """See `ModelFamily`."""
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel

    def shapes(self, text_length: int) -> dict[str, tuple[int, ...]]:
        """See `ModelFamily`."""
        return {"text": (text_length, self.network_config["joint_attention_dim"])}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """See `ModelFamily`. As in the pipeline, there is no mask if all captions are equally long."""
        height, width = x.shape[-2:]
        with torch.inference_mode(False):  # diffusers caches this table, and passes with gradient save slices of it
            network.pos_embed._get_device_freqs(x.device)  # type: ignore[operator, union-attr]
        dtype = dtype_of(network)
        packed = network(
            hidden_states=pack_latents(x).to(dtype),
            encoder_hidden_states=cond.fields["text"].to(dtype),
            encoder_hidden_states_mask=cond.mask_if_needed,
            # The network multiplies by 1000. The pipeline rounds 1000 sigma to bf16, and the quotient again.
            timestep=rounded(1000 * sigma, dtype) / 1000,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(x),
            return_dict=False,
        )[0]
        return unpack_latents(packed, height, width)

    def guide(self, cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
        """See `ModelFamily`. Each token of the guided velocity gets the norm that it has with the caption alone. In fp32."""
        conditional, unconditional = pack_latents(cond.float()), pack_latents(uncond.float())
        guided = unconditional + scale[..., 0].float() * (conditional - unconditional)
        norm = guided.norm(dim=-1, keepdim=True)
        ratio = conditional.norm(dim=-1, keepdim=True) / norm.clamp_min(_SMALL)
        # The velocity of a new network is 0, where a ratio has no slope: it would never learn.
        return unpack_latents(guided * torch.where(norm > _SMALL, ratio, 1.0), *cond.shape[-2:])

    def encode_prompt(
        self, pipeline: Any, captions: Sequence[str], device: torch.device, text_length: int
    ) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """See `ModelFamily`. The pipeline puts a caption into a template and drops the 34 tokens before the caption."""
        text, mask = pipeline.encode_prompt(list(captions), device=device, max_sequence_length=text_length)
        lengths = [text.shape[1]] * len(captions) if mask is None else mask.sum(1).tolist()
        return {"text": text}, tuple(lengths)

    def count_tokens(self, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        """See `ModelFamily`. The 5 tokens of the template behind a caption count."""
        from diffusers import QwenImagePipeline

        template = QwenImagePipeline(None, None, None, None, None)
        counts = super().count_tokens(tokenizer, [template.prompt_template_encode.format(text) for text in captions])
        return [count - template.prompt_template_encode_start_idx for count in counts]

    def call_arguments(self, guidance: float, text_length: int) -> dict[str, Any]:
        """See `ModelFamily`. The pipeline does not guide without a negative prompt."""
        arguments = {"true_cfg_scale": guidance, "max_sequence_length": text_length}
        return arguments | ({"negative_prompt": self.empty_caption} if guidance > self.neutral_guidance else {})
