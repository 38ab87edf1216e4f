"""Tiny FLUX.2 pipelines of the real classes: klein-base (Qwen3) and dev (Mistral3 and its processor)."""

from pathlib import Path
from typing import Any

import torch

from recipes.tiny import digit_words

# Of the real templates, what matters here: the roles, and the empty thought that `enable_thinking=False` writes.
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def write(folder: Path, *, variant: str = "klein", seed: int = 0) -> None:
    """A complete pipeline.

    Args:
        folder: where.
        variant: `klein`, as klein-base is: not distilled, guided by two passes; or `dev`: guidance is an input, padding comes
            before the caption.
        seed: of every initialisation.
    """
    from diffusers import Flux2KleinPipeline, Flux2Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, encoder = _qwen3() if variant == "klein" else _mistral3()
        parts = {
            "text_encoder": encoder,
            "tokenizer": tokenizer,
            **_common(3 * _TEXT["hidden_size"], guidance_embeds=variant == "dev"),
        }
        pipe = Flux2KleinPipeline(**parts, is_distilled=False) if variant == "klein" else Flux2Pipeline(**parts)
        pipe.save_pretrained(folder)


def _common(text_dim: int, *, guidance_embeds: bool) -> dict[str, Any]:
    """Scheduler, VAE and transformer. An image of 16 x 16 pixels has latents of [8, 4, 4]."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    # Latents of random weights are small; each channel has its own mean and variance, so that a mix-up shows.
    vae.bn.running_mean.normal_(std=0.2)
    vae.bn.running_var.uniform_(0.2, 0.8)
    transformer = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_dim,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"vae": vae, "transformer": transformer, "scheduler": scheduler}


def _qwen3() -> tuple[Any, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocabulary = {token: number for number, token in enumerate([*special, "user", "assistant", *digit_words()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=core, additional_special_tokens=special[1:], model_max_length=512, chat_template=_CHATML
    )
    config = Qwen3Config(
        vocab_size=len(vocabulary), num_hidden_layers=28, tie_word_embeddings=True, **_TEXT
    )  # the pipeline reads hidden states up to number 27
    return tokenizer, Qwen3ForCausalLM(config)


def _mistral3() -> tuple[Any, Any]:
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaTokenizerFast,
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralImageProcessor,
        PixtralProcessor,
        PixtralVisionConfig,
    )

    special = ["<unk>", "<s>", "</s>", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
    special += [
        "[IMG]",
        "[IMG_BREAK]",
        "[IMG_END]",
        SYSTEM_MESSAGE,
    ]  # the whole message is one token: the template takes 6
    vocabulary = {token: number for number, token in enumerate([*special, *digit_words()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = LlamaTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", additional_special_tokens=special[4:], padding_side="left",
        model_max_length=512, chat_template=_MISTRAL,
    )  # fmt: skip
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(), tokenizer=tokenizer, patch_size=14, spatial_merge_size=2,
        chat_template=_MISTRAL,
    )  # fmt: skip
    config = Mistral3Config(
        text_config=MistralConfig(vocab_size=len(vocabulary), num_hidden_layers=31, **_TEXT).to_dict(),
        vision_config=PixtralVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8, patch_size=14
        ).to_dict(),
        image_token_index=special.index("[IMG]"),
    )
    return processor, Mistral3ForConditionalGeneration(config)


_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # random weights must still tell captions apart
}
