"""A tiny `QwenImagePipeline` of the real classes, saved in diffusers' format."""

from pathlib import Path

import torch
from qwen_tokens import write_tokenizer


def write(folder: Path, *, seed: int = 0) -> None:
    """A complete pipeline: random weights, 2x compression, 4 latent channels, latents normalised per channel."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = write_tokenizer(folder / "tokenizer", Qwen2Tokenizer)
        special = tokenizer.convert_tokens_to_ids(
            ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
        )
        config = Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "initializer_range": 0.4,  # random weights must tell captions apart
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "patch_size": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [0],
            },
            **dict(
                zip(
                    ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
                    special,
                    strict=True,
                )
            ),
        )
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        )
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                base_image_seq_len=256,
                base_shift=0.5,
                max_image_seq_len=8192,
                max_shift=0.9,
                shift_terminal=0.02,
                use_dynamic_shifting=True,
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 2],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[-0.2, 0.1, 0.3, 0.0],
                latents_std=[0.5, 0.8, 1.2, 0.6],
            ),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config),
            tokenizer=tokenizer,
            transformer=transformer,
        ).save_pretrained(folder)
