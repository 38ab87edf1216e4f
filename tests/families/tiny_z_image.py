"""A tiny `ZImagePipeline` of the real classes, saved in diffusers' format."""

from pathlib import Path

import torch
from qwen_tokens import write_tokenizer
from tiny_chroma import vae

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The parts of Qwen3's chat template that matter for one message."""


def write(folder: Path, *, seed: int = 0, shift: float = 6.0) -> None:
    """A complete pipeline: random weights, 2x compression, 4 latent channels, the fixed `shift` of Z-Image's scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = write_tokenizer(folder / "tokenizer", Qwen2Tokenizer, chat_template=CHAT)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.4,  # random weights must tell captions apart
        )
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=48,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[8, 8, 8],
            axes_lens=[256, 64, 64],
        )
        for pad in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(pad)  # a new network's are zero
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=vae(),
            text_encoder=Qwen3Model(config),
            tokenizer=tokenizer,
            transformer=transformer,
        ).save_pretrained(folder)
