"""A tiny Sana of the real classes: 32 x 32 pixels are 8 x 8 latents of 4 channels, and as many tokens."""

import inspect
from pathlib import Path

import torch
from tiny_words import word_tokenizer


def write(folder: Path, *, seed: int = 0) -> None:
    """A complete `SanaPipeline` folder with random weights."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from tokenizers import processors
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

    instruction = "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
    core = word_tokenizer(instruction, ("<pad>", "<eos>", "<bos>"))
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Gemma2Config(
            vocab_size=core.get_vocab_size(),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
            query_pre_attn_scalar=12,
            initializer_range=0.5,  # random weights must still tell captions apart
        )
        SanaPipeline(
            tokenizer=GemmaTokenizerFast(tokenizer_object=core),
            text_encoder=Gemma2Model(encoder),
            vae=AutoencoderDC(
                latent_channels=4,
                attention_head_dim=4,
                encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                encoder_block_out_channels=(4, 8, 8),
                decoder_block_out_channels=(4, 8, 8),
                encoder_layers_per_block=(1, 1, 1),
                decoder_layers_per_block=(1, 1, 1),
                encoder_qkv_multiscales=((), (), (5,)),
                decoder_qkv_multiscales=((), (), (5,)),
                upsample_block_type="interpolate",
                downsample_block_type="Conv",
                scaling_factor=0.41407,
            ),
            transformer=SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=4,
                attention_head_dim=8,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=16,
                cross_attention_dim=32,
                caption_channels=24,
                sample_size=8,
            ),
            scheduler=DPMSolverMultistepScheduler(
                use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
            ),
        ).save_pretrained(folder)
