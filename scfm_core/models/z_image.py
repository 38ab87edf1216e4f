"""Z-Image on diffusers' `ZImageTransformer2DModel`: masked text, time that runs from noise to data.

Conventions are those of diffusers' `ZImagePipeline`. The model: arXiv 2511.22699.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scfm_core.models import original_names
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.protocol import FieldKind, ModelFamily, dtype_of

_NETWORK = {
    "all_f_patch_size": (1,),
    "all_patch_size": (2,),
    "axes_dims": (32, 48, 48),
    "axes_lens": (1024, 512, 512),
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}


class ZImage(ModelFamily):
    """Z-Image in diffusers' format.

    Guidance s means `cond + s (cond - uncond)`. The pipeline's `cfg_normalization` and `cfg_truncation` are used at their defaults,
    which change nothing.
    """

    pipelines = ("ZImagePipeline",)
    noise_dtype = torch.float32
    fields: ClassVar[dict[str, FieldKind]] = {"text": "masked"}
    neutral_guidance = 0.0
    block_lists = ("noise_refiner", "context_refiner", "layers")
    static_shapes = False
    other_tools = original_names.Z_IMAGE
    known: ClassVar[dict[str, dict[str, Any]]] = {
        f"Tongyi-MAI/{name}": {
            "transformer": _NETWORK,
            # bf16: Qwen3-4B without an output layer, and the VAE, which is that of Flux.1
            "encoder_bytes": 2 * (4_022_468_096 + 83_819_683),
            "vae": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16},
            "scheduler": {"shift": shift},
        }
        for name, shift in (("Z-Image", 6.0), ("Z-Image-Turbo", 3.0))
    }

    @property
    def network_class(self) -> Any:
        """See `ModelFamily`."""
        from scfm_core.models.z_image_network import ZImageNetwork

        return ZImageNetwork

    @property
    def heads(self) -> int:
        """See `ModelFamily`."""
        return int(self.network_config["n_heads"])

    @property
    def width(self) -> int:
        """See `ModelFamily`."""
        return int(self.network_config["dim"])

    def shapes(self, text_length: int) -> dict[str, tuple[int, ...]]:
        """See `ModelFamily`."""
        return {"text": (text_length, self.network_config["cap_feat_dim"])}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """See `ModelFamily`. Unlike other pipelines, this one does not round the timestep, 1 - sigma, to bf16."""
        dtype = dtype_of(network)
        timestep = (1000 - 1000 * sigma) / 1000
        output: Tensor = network(x.to(dtype), timestep, cond.fields["text"].to(dtype), cond.lengths)
        return -output

    def guide(self, cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
        """See `ModelFamily`. In fp32, as in the pipeline."""
        return cond.float() + scale.float() * (cond.float() - uncond.float())

    def encode_prompt(
        self, pipeline: Any, captions: Sequence[str], device: torch.device, text_length: int
    ) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """See `ModelFamily`. A caption is a message to the text encoder, in its chat template, which counts in `text_length`."""
        rows, _ = pipeline.encode_prompt(
            list(captions), device=device, do_classifier_free_guidance=False, max_sequence_length=text_length
        )
        return {"text": nn.utils.rnn.pad_sequence(rows, batch_first=True)}, tuple(len(row) for row in rows)

    def count_tokens(self, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        """See `ModelFamily`."""
        chats = [[{"role": "user", "content": caption}] for caption in captions]
        settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        return super().count_tokens(tokenizer, [tokenizer.apply_chat_template(chat, **settings) for chat in chats])
