"""What the visitors of `scfm play` write into the page, checked."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from scfm_core.errors import UserError

MOST_STEPS = 16
TEACHER_STEPS = 32
MOST_SEEDS = 8
"""Columns of a grid."""
MOST_ROWS = 8
"""Step counts of a grid."""
_LARGEST_SEED = 2**62
_LONGEST_PROMPT = 10_000
"""Characters. It bounds the work of the tokenizer."""
_LARGEST_AREA = 4
"""Pixels of an image, as a multiple of those of the training: four times the area needs about 16 times the memory of attention."""


@dataclass(frozen=True)
class Ask:
    """What a visitor wants, checked."""

    prompt: str
    seed: int
    strength: float | None = None
    """None: the one of the step count."""
    guidance: float | None = None
    """None: the one of the training."""
    height: int | None = None
    width: int | None = None
    notes: tuple[str, ...] = ()
    """What was changed, for the visitor."""


def checked_prompt(prompt: Any) -> tuple[str, tuple[str, ...]]:
    """A prompt, and notes on what was changed.

    Raises:
        UserError: with a message for the visitor.
    """
    text = prompt.strip() if isinstance(prompt, str) else ""
    if not text:
        raise UserError("There is no prompt. Write what the image should show.")
    if re.search(r"[\ud800-\udfff]", text):
        raise UserError(
            "The prompt has half of a character (a lone surrogate). Delete it, or write the whole character."
        )
    if len(text) > _LONGEST_PROMPT:
        return text[:_LONGEST_PROMPT], (f"The prompt was cut to its first {_LONGEST_PROMPT} characters.",)
    return text, ()


def checked_seed(seed: Any) -> int:
    """A seed.

    Raises:
        UserError: with a message for the visitor.
    """
    text = "" if seed is None else str(seed).strip()
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) > _LARGEST_SEED:
        raise UserError(f"The seed must be an integer from 0 to 2^62, got {text[:40]!a}.")
    return int(text)


def checked_size(height: Any, width: Any, usual: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels; None: those of `usual`.

    Raises:
        UserError: with a message for the visitor.
    """
    sides = [usual[name] if value is None else value for name, value in (("height", height), ("width", width))]
    if not all(is_number(side) and side == int(side) and side >= 1 for side in sides):
        raise UserError(
            f"Width and height must be positive integers, got {str(sides[1])[:20]!a} x {str(sides[0])[:20]!a}."
        )
    if sides[0] * sides[1] > _LARGEST_AREA * usual["height"] * usual["width"]:
        raise UserError(
            f"{sides[1]:g} x {sides[0]:g} pixels are more than {_LARGEST_AREA} times the {usual['width']} x {usual['height']} of the "
            "training. Choose a smaller size."
        )
    return int(sides[0]), int(sides[1])


def is_number(value: Any) -> bool:
    """Whether a value of the page is a finite number."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and (
        (isinstance(value, float) and math.isfinite(value)) or (isinstance(value, int) and abs(value) < 1e18)
    )


def checked_steps(value: Any) -> int:
    """A step count of the page.

    Raises:
        UserError: with a message for the visitor.
    """
    if not is_number(value) or value != int(value) or not 1 <= value <= MOST_STEPS:
        raise UserError(f"The steps must be an integer from 1 to {MOST_STEPS}, got {str(value)[:40]!a}.")
    return int(value)


def checked_rows(text: Any) -> list[int]:
    """Step counts of a grid, such as `1, 2, 4`.

    Raises:
        UserError: with a message for the visitor.
    """
    words = re.split(r"[,\s]+", text.strip() if isinstance(text, str) else "")
    rows = [checked_steps(int(word) if re.fullmatch(r"[0-9]{1,9}", word) else word) for word in words]
    rows = list(dict.fromkeys(rows))
    if len(rows) > MOST_ROWS:
        raise UserError(f"A grid has at most {MOST_ROWS} step counts, got {len(rows)}.")
    return rows


def seeds_of(ask: Ask, count: Any) -> list[Ask]:
    """The columns of a grid: `count` seeds from the visitor's.

    Raises:
        UserError: with a message for the visitor.
    """
    if not is_number(count) or count != int(count) or not 1 <= count <= MOST_SEEDS:
        raise UserError(f"The number of seeds must be an integer from 1 to {MOST_SEEDS}, got {str(count)[:40]!a}.")
    return [replace(ask, seed=ask.seed + number) for number in range(int(count))]
