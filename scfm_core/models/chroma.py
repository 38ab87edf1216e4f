"""Chroma on diffusers' `ChromaTransformer2DModel`: a pruned Flux with T5's text alone, a mask of text, and guidance in two passes.

Conventions are those of diffusers' `ChromaPipeline`. The model: https://huggingface.co/lodestones/Chroma1-HD.
"""

import warnings
from collections.abc import Sequence
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scfm_core.models import original_names
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.flux import PATCH, image_ids, pack_latents, unpack_latents
from scfm_core.models.protocol import FieldKind, ModelFamily, dtype_of, rounded


class Chroma(ModelFamily):
    """Chroma in diffusers' format.

    The mask of text, `seen`, is 1 on a caption's tokens and on the first padding token, and 0 behind. diffusers' attention adds it to
    its scores (https://github.com/huggingface/diffusers/issues/12116). So the other padding tokens get less weight, but they count,
    and the text is stored with its padding. The authors' code hides them. scfm follows diffusers, where its students are used.
    """

    pipelines = ("ChromaPipeline",)
    fields: ClassVar[dict[str, FieldKind]] = {"text": "tokens", "seen": "vector"}
    in_channels_per_latent = PATCH**2
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    other_tools = original_names.CHROMA
    known: ClassVar[dict[str, dict[str, Any]]] = {
        "lodestones/Chroma1-HD": {
            "transformer": {
                "approximator_hidden_dim": 5120,
                "approximator_layers": 5,
                "approximator_num_channels": 64,
                "attention_head_dim": 128,
                "axes_dims_rope": (16, 56, 56),
                "in_channels": 64,
                "joint_attention_dim": 4096,
                "num_attention_heads": 24,
                "num_layers": 19,
                "num_single_layers": 38,
                "patch_size": 1,
            },
            # bf16: T5-XXL's encoder, and the VAE, which is that of Flux.1
            "encoder_bytes": 2 * (4_762_310_656 + 83_819_683),
            "vae": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16},
            "scheduler": {"shift": 3.0},
        }
    }

    @property
    def network_class(self) -> Any:
        """See `ModelFamily`."""
        from diffusers import ChromaTransformer2DModel

        # diffusers warns of a class that it uses itself.
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
        return ChromaTransformer2DModel

    def shapes(self, text_length: int) -> dict[str, tuple[int, ...]]:
        """See `ModelFamily`."""
        return {"text": (text_length, self.network_config["joint_attention_dim"]), "seen": (text_length,)}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """See `ModelFamily`."""
        height, width = x.shape[-2:]
        dtype = dtype_of(network)
        embedding: Any = network.time_text_embed
        embedding.forward = MethodType(_time_embedding, embedding)
        packed, seen = pack_latents(x).to(dtype), cond.fields["seen"].to(dtype)
        velocity = network(
            hidden_states=packed,
            encoder_hidden_states=cond.fields["text"].to(dtype),
            attention_mask=torch.cat([seen, seen.new_ones(packed.shape[:2])], dim=1),
            # The network multiplies by 1000. The pipeline rounds 1000 sigma to bf16, and the quotient again.
            timestep=rounded(1000 * sigma, dtype) / 1000,
            img_ids=image_ids(height, width, x.device),
            txt_ids=torch.zeros(seen.shape[1], 3, device=x.device),
            return_dict=False,
        )[0]
        return unpack_latents(velocity, height, width)

    def encode_prompt(
        self, pipeline: Any, captions: Sequence[str], device: torch.device, text_length: int
    ) -> tuple[dict[str, Tensor], None]:
        """See `ModelFamily`."""
        text, _, seen, *_ = pipeline.encode_prompt(
            list(captions), device=device, do_classifier_free_guidance=False, max_sequence_length=text_length
        )
        return {"text": text, "seen": seen}, None

    @property
    def masks_attention(self) -> bool:
        """See `ModelFamily`: by `seen`."""
        return True


def _time_embedding(embedding: Any, timestep: Tensor) -> Tensor:
    """diffusers' embedding of time, of guidance 0 and of the layers' numbers, [B, layers, D], without its copy from the host.

    For this copy the host waits for the GPU in each pass, and a CUDA graph cannot hold it.
    """
    guidance = embedding.guidance_proj(torch.zeros_like(timestep)).to(timestep.dtype)
    inputs = torch.cat([embedding.time_proj(timestep).to(timestep.dtype), guidance], dim=1)
    layers = embedding.mod_proj.to(inputs)
    return torch.cat([inputs[:, None].expand(-1, len(layers), -1), layers.expand(len(inputs), -1, -1)], dim=-1)
