"""A tiny `ChromaPipeline` of the real classes, saved in diffusers' format."""

from pathlib import Path
from typing import Any

import torch

from recipes.tiny import digit_words, tiny_t5


def vae() -> Any:
    """2x compression, 4 latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.6,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def write(folder: Path, *, seed: int = 0) -> None:
    """A complete pipeline: random weights, 2x compression, 4 latent channels, the fixed shift of Chroma1-HD."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, encoder = tiny_t5(digit_words())
        ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=ChromaTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=encoder.config.d_model,
                axes_dims_rope=(4, 6, 6),
                approximator_num_channels=16,
                approximator_hidden_dim=32,
                approximator_layers=2,
            ),
        ).save_pretrained(folder)
