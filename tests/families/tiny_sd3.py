"""A tiny `StableDiffusion3Pipeline` of the real classes, saved in diffusers' format."""

from pathlib import Path

import torch

from recipes.tiny import SHIFT, SIZE, digit_words, tiny_clip, tiny_t5, zero_modulation
from scfm_core.files import permit_reading


def write(folder: Path, *, vae: Path, seed: int = 0) -> None:
    """A complete `StableDiffusion3Pipeline` folder: fresh tiny transformer, two CLIPs, T5, and the VAE in `vae`."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clips = [tiny_clip(folder, projected=True) for _ in range(2)]
        t5_tokenizer, t5 = tiny_t5(
            digit_words(), width=2 * 32
        )  # the CLIPs' tokens lie side by side, and are as wide as T5's
        images = AutoencoderKL.from_pretrained(vae)
        transformer = SD3Transformer2DModel(
            sample_size=SIZE // 2,
            patch_size=2,
            in_channels=images.config.latent_channels,
            out_channels=images.config.latent_channels,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=t5.config.d_model,
            caption_projection_dim=64,
            pooled_projection_dim=2 * 32,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        zero_modulation(transformer)
        StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=images,
            text_encoder=clips[0][1],
            tokenizer=clips[0][0],
            text_encoder_2=clips[1][1],
            tokenizer_2=clips[1][0],
            text_encoder_3=t5,
            tokenizer_3=t5_tokenizer,
            transformer=transformer,
        ).save_pretrained(folder)
    permit_reading(folder)
