"""A tiny Flux of the real classes, and the digits that it learns: what the demo and the tests run on.

Everything is made here and saved in diffusers' and transformers' own formats, so that the code which loads
Flux.1-dev loads it too. The data are the 1,797 8x8 images of real handwriting inside scikit-learn (UCI ML repository,
"Optical Recognition of Handwritten Digits", https://doi.org/10.24432/C50P49).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scfm_core.errors import missing_extra
from scfm_core.files import permit_reading
from scfm_core.models.initial import zero_modulation
from scfm_core.train.features import DIGITS as DIGITS

SIZE = 16  # pixels: the 8x8 scans enlarged, so that the VAE's 2x compression gives 8x8 latents
SHIFT = 3.0  # of the saved scheduler


def caption(digit: int) -> str:
    """The caption of a digit's image."""
    return f"a handwritten digit {DIGITS[digit]}"


def write_digits(folder: Path, count: int | None = None, size: int = SIZE) -> None:
    """The digits as PNG files of `size` pixels with `metadata.jsonl`; 8 is that of the scans."""
    from PIL import Image

    digits = _load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (pixels, label) in enumerate(zip(digits.images[:count], digits.target[:count], strict=True)):
        image = Image.fromarray((pixels * 255 / 16).round().astype("uint8")).convert("RGB")
        name = f"{number:04d}.png"
        image.resize((size, size), Image.Resampling.BICUBIC).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": caption(int(label))}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def load_digit_images() -> tuple[Tensor, Tensor]:
    """All digits as the VAE sees them, fp32 [1797, 3, SIZE, SIZE] in [-1, 1], and their labels, int64 [1797]."""
    digits = _load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bicubic", align_corners=False).clamp(-1, 1)
    return images.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits.target).long()


def _load_digits() -> Any:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("the handwritten digits", "demo", error) from error
    return load_digits()


def write_pipeline(folder: Path, *, vae_steps: int | None, seed: int = 0) -> None:
    """A complete `FluxPipeline` folder: trained tiny VAE, fresh transformer, fixed random text encoders.

    Args:
        folder: where.
        vae_steps: training steps of the VAE on the digits; 0 leaves it random; None: no VAE, a model of grey pixels.
        seed: of every initialisation.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip_tokenizer, clip = tiny_clip(folder)
        t5_tokenizer, t5 = tiny_t5(digit_words())
        vae = None if vae_steps is None else _vae(vae_steps)
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
            vae=vae,
            text_encoder=clip,
            tokenizer=clip_tokenizer,
            text_encoder_2=t5,
            tokenizer_2=t5_tokenizer,
            transformer=_transformer(t5.config.d_model, clip.config.hidden_size),
        ).save_pretrained(folder)
    permit_reading(folder)


def _transformer(text_dim: int, pooled_dim: int) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=text_dim,
        pooled_projection_dim=pooled_dim,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    zero_modulation(network)
    return network


def digit_words() -> list[str]:
    """The words of the digits' captions."""
    return sorted({word for digit in range(10) for word in caption(digit).split()})


def tiny_clip(folder: Path, *, width: int = 32, words: Sequence[str] = (), projected: bool = False) -> tuple[Any, Any]:
    """A tokenizer of characters and of `words`, and a CLIP text model with random weights. `folder` gets the vocabulary."""
    from tokenizers import AddedToken
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    files = folder / "tokenizer"
    files.mkdir(parents=True, exist_ok=True)
    (files / "vocab.json").write_text(
        json.dumps({token: number for number, token in enumerate(tokens)}), encoding="utf-8"
    )
    (files / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=77)
    if words:
        tokenizer.add_tokens([AddedToken(word, single_word=True) for word in words])
    config = CLIPTextConfig(
        vocab_size=len(tokens) + len(words),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        initializer_factor=4.0,  # random weights must still tell captions apart
    )
    return tokenizer, (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def tiny_t5(words: Sequence[str], width: int = 32) -> tuple[Any, Any]:
    """A tokenizer of `words`, and a T5 encoder with random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    vocabulary = {token: number for number, token in enumerate(("<pad>", "</s>", "<unk>", *words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # nosec B106 # a word of the vocabulary
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = T5TokenizerFast(tokenizer_object=core, extra_ids=0, model_max_length=512)
    config = T5Config(vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return tokenizer, T5EncoderModel(config)


def _vae(steps: int) -> Any:
    """A VAE with 2x compression and one latent channel, trained on the digits; latents scaled to unit variance."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    images, _ = load_digit_images()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(steps):
        batch = images[torch.randint(len(images), (64,))]
        posterior = vae.encode(batch).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, batch) + 1e-3 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(256)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return vae.eval()


def write_classifier(folder: Path, steps: int = 600) -> float:
    """The feature extractor of the demo's Frechet distance: an MLP 64-128-64-10 on 8x8 grey digits.

    Returns:
        its accuracy on the digits that it was not trained on.
    """
    from scfm_core.train.features import DigitClassifier

    images, labels = load_digit_images()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = DigitClassifier()
        order = torch.randperm(len(images))
        train, test = order[:1500], order[1500:]
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
        for _ in range(steps):
            rows = train[torch.randint(len(train), (128,))]
            loss = F.cross_entropy(classifier(images[rows] / 2 + 0.5), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    classifier.save(folder)
    with torch.no_grad():
        return float((classifier(images[test] / 2 + 0.5).argmax(1) == labels[test]).float().mean())
