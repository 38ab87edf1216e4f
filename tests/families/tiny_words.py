"""A vocabulary for the tiny text encoders: some whole words, and single characters for everything else."""

import re

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

SPLIT = r"\n|\w+|[^\w\s]"


def word_tokenizer(template: str, special: tuple[str, ...]) -> Tokenizer:
    """A tokenizer in which every word, sign and line break of `template` is one token, and other words are spelt.

    Args:
        template: text.
        special: tokens that are taken whole, wherever they stand; the first one pads.
    """
    words = sorted(
        {word for part in re.split("|".join(map(re.escape, special)), template) for word in re.findall(SPLIT, part)}
    )
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*special, "<unk>", *dict.fromkeys([*words, *letters, *(f"##{letter}" for letter in letters)])]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix="##"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True)
    core.add_special_tokens(list(special))
    return core
