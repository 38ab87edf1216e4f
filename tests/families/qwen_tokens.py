"""A tiny byte-level BPE tokenizer for the classes of Qwen, with whole words of the digits' captions and of Qwen-Image's template."""

import json
from pathlib import Path
from typing import Any

from recipes.tiny import DIGITS, caption

_FIRST = ("system", "Describe", "user", "assistant")
_INNER = "the image by detailing color shape size texture quantity text spatial relationships of objects and background"
"""Words of `QwenImagePipeline.prompt_template_encode` without and with a space before them. Each is one token, so the
template's prefix has 34 tokens, as with the real tokenizer."""
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def write_tokenizer(folder: Path, kind: Any, **settings: Any) -> Any:
    """Write `vocab.json` and `merges.txt`, and make a tokenizer of class `kind` of them. Any text can be encoded.

    Args:
        folder: created if missing.
        kind: `Qwen2Tokenizer` or `Qwen2TokenizerFast`.
        settings: for `kind`.
    """
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = sorted({word for digit in range(len(DIGITS)) for word in caption(digit).split()} | set(_INNER.split()))
    # A word's merges add one letter each. Words after a space come first, so no merge of another word cuts them.
    merges: dict[tuple[str, str], str] = {}
    for word in [*(f"Ġ{word}" for word in words), *_FIRST]:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = word[: end + 1]
    folder.mkdir(parents=True, exist_ok=True)
    tokens = dict.fromkeys([*letters, *merges.values()])
    (folder / "vocab.json").write_text(
        json.dumps({token: number for number, token in enumerate(tokens)}), encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return kind(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(_SPECIAL[1:]),
        **settings,
    )
