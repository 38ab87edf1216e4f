"""A tiny Krea 2 of the real classes: 16 x 16 pixels are 8 x 8 latents of 4 channels, and 4 x 4 tokens."""

from pathlib import Path

import torch
from tiny_words import word_tokenizer

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""Qwen's, around an empty caption. The pipeline drops 34 tokens of it and keeps 5, so each word must be one token."""


def write(folder: Path, *, seed: int = 0) -> None:
    """A complete `Krea2Pipeline` folder with random weights."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        Krea2Pipeline,
        Krea2Transformer2DModel,
    )
    from transformers import Qwen2TokenizerFast, Qwen3VLConfig, Qwen3VLModel

    core = word_tokenizer(TEMPLATE, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Qwen3VLConfig(
            text_config={
                "vocab_size": core.get_vocab_size(),
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
                "initializer_range": 0.5,  # random weights must still tell captions apart
            },
            vision_config={
                "depth": 1,
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_heads": 1,
                "out_hidden_size": 16,
                "num_position_embeddings": 4,
                "deepstack_visual_indexes": [0],
            },
        )
        transformer = Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=12,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 4, 4),
        )
        for name, parameter in transformer.named_parameters():
            if name.endswith(("scale_shift_table", "norm1.weight", "norm2.weight", "norm_q.weight", "norm_k.weight")):
                torch.nn.init.normal_(parameter, std=0.3)  # zero otherwise
        Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=6400,
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 2],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[-0.3, 0.2, 0.0, 0.5],
                latents_std=[1.5, 0.7, 1.0, 2.0],
            ),
            text_encoder=Qwen3VLModel(encoder),
            tokenizer=Qwen2TokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>"),
            transformer=transformer,
            text_encoder_select_layers=(1, 2, 4),
        ).save_pretrained(folder)
