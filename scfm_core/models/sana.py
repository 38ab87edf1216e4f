"""Sana on diffusers' `SanaTransformer2DModel`: linear attention, 32 x 32 pixels per token, Gemma's text with a mask.

Conventions are those of diffusers' `SanaPipeline`. The model: Xie et al., arXiv 2410.10629; Sana 1.5: arXiv 2501.18427.
"""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scfm_core.models.conditioning import Conditioning
from scfm_core.models.protocol import FieldKind, ModelFamily, dtype_of

_TRANSFORMER = {
    "attention_bias": False,
    "attention_head_dim": 32,
    "caption_channels": 2304,
    "cross_attention_dim": 2240,
    "cross_attention_head_dim": 112,
    "in_channels": 32,
    "mlp_ratio": 2.5,
    "num_attention_heads": 70,
    "num_cross_attention_heads": 20,
    "num_layers": 20,
    "out_channels": 32,
    "patch_size": 1,
    "sample_size": 32,
}
_MODELS = {
    "Sana_1600M_512px_diffusers": _TRANSFORMER | {"sample_size": 16},
    "Sana_1600M_1024px_diffusers": _TRANSFORMER,
    "SANA1.5_1.6B_1024px_diffusers": _TRANSFORMER | {"qk_norm": "rms_norm_across_heads"},
}


class Sana(ModelFamily):
    """Sana 1.0 and 1.5 in diffusers' format. Its pipeline has DPM-Solver on a grid of this shift; scfm has Euler."""

    pipelines = ("SanaPipeline",)
    noise_dtype = torch.float32
    fields: ClassVar[dict[str, FieldKind]] = {"text": "masked"}
    patch = 1
    static_shapes = False
    known: ClassVar[dict[str, dict[str, Any]]] = {
        f"Efficient-Large-Model/{name}": {
            "transformer": transformer,
            "scheduler": {"flow_shift": 3.0},
            # bf16: Gemma 2 2B without its head 2.614 B, DC-AE 0.312 B parameters
            "encoder_bytes": 2 * 2_926_000_000,
            "vae": {"encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024), "latent_channels": 32},
        }
        for name, transformer in _MODELS.items()
    }

    @property
    def network_class(self) -> Any:
        """See `ModelFamily`."""
        from diffusers import SanaTransformer2DModel

        return SanaTransformer2DModel

    @property
    def vae_class(self) -> Any:
        """See `ModelFamily`."""
        from diffusers import AutoencoderDC

        return AutoencoderDC

    @property
    def vae_factor(self) -> int:
        """See `ModelFamily`."""
        return int(2 ** (len(self.vae_config["encoder_block_out_channels"]) - 1))

    def shapes(self, text_length: int) -> dict[str, tuple[int, ...]]:
        """See `ModelFamily`."""
        return {"text": (text_length, self.network_config["caption_channels"])}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """See `ModelFamily`. The timestep is fp32, also for a bf16 network."""
        dtype = dtype_of(network)
        velocity: Tensor = network(
            hidden_states=x.to(dtype),
            encoder_hidden_states=cond.fields["text"].to(dtype),
            encoder_attention_mask=cond.mask_if_needed,
            timestep=1000 * sigma * self.network_config.get("timestep_scale", 1.0),
            return_dict=False,
        )[0]
        return velocity

    def guide(self, cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
        """See `ModelFamily`. In fp32, as in diffusers' pipeline."""
        return super().guide(cond.float(), uncond.float(), scale)

    def encode_prompt(
        self, pipeline: Any, captions: Sequence[str], device: torch.device, text_length: int
    ) -> tuple[dict[str, Tensor], tuple[int, ...] | None]:
        """See `ModelFamily`.

        The pipeline writes an instruction before a caption ("Given a user prompt, ..."), and keeps the first token and
        those from the instruction's last token on. The empty caption is the negative prompt, without instruction.
        """
        rows: list[Tensor] = [torch.empty(0)] * len(captions)
        for is_empty, instruction in ((False, _instruction()), (True, None)):
            places = [place for place, caption in enumerate(captions) if (caption == self.empty_caption) == is_empty]
            if not places:
                continue
            text, mask, _, _ = pipeline.encode_prompt(
                [captions[place] for place in places],
                do_classifier_free_guidance=False,
                device=device,
                max_sequence_length=text_length,
                complex_human_instruction=instruction,
            )
            for place, row, length in zip(places, text, mask.sum(1).tolist(), strict=True):
                rows[place] = row[:length]
        return {"text": nn.utils.rnn.pad_sequence(rows, batch_first=True)}, tuple(len(row) for row in rows)

    def count_tokens(self, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        """See `ModelFamily`. Gemma's first token, the instruction's last one, and the caption, in lower case."""
        instruction = "\n".join(_instruction())
        given = [instruction + caption.lower().strip() for caption in captions]
        behind = len(tokenizer(instruction).input_ids) - 2
        counts = super().count_tokens(tokenizer, given)
        return [1 if caption == self.empty_caption else n - behind for caption, n in zip(captions, counts, strict=True)]

    def encode_images(self, vae: Any, images: Tensor) -> Tensor:
        """See `ModelFamily`. The VAE is deterministic: it has no posterior."""
        latents: Tensor = vae.encode(images).latent
        return latents * vae.config.scaling_factor

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """See `ModelFamily`."""
        images: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return images

    def call_arguments(self, guidance: float, text_length: int) -> dict[str, Any]:
        """See `ModelFamily`. Without binning the pipeline makes images of the size that it is asked for."""
        return super().call_arguments(guidance, text_length) | {"use_resolution_binning": False}


def _instruction() -> list[str]:
    """The lines that `SanaPipeline` writes before a caption by default."""
    from diffusers import SanaPipeline

    return list(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
