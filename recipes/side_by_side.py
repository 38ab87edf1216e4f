"""One picture of several students of one teacher: a block of columns for each, a row for each step count, the same prompts and noise.

python -m recipes.side_by_side RUN_DIR [RUN_DIR ...] -o FILE.png [--prompt TEXT ...] [--per-prompt 2] [--steps 1 2 4 8]

The first block is the undistilled model, the last row the teacher, which is the same model at its own number of steps. The teacher's
images are repeated below each block, so that each student can be compared with them.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from scfm_core.api import RunModel
from scfm_core.errors import UserError
from scfm_core.files import written_whole
from scfm_core.wording import count

UNDISTILLED = "undistilled"
_ADVICE = "Choose another file with --output"
_GAP = 8
_INK = "#333333"


def main() -> None:
    """Sample, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="e.g. runs/study/emoji/paper/seed-0")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="FILE")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="default: the first run's sample.prompts")
    parser.add_argument(
        "--per-prompt", type=int, default=2, help="images of each prompt, from different noise (default 2)"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8], help="default 1 2 4 8")
    parser.add_argument("--cell", type=int, default=48, help="pixels of an image's side (default 48)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image's noise")
    given = parser.parse_args()
    try:
        side_by_side(
            given.runs, given.output, given.prompt, per_prompt=given.per_prompt, steps=given.steps, cell=given.cell, seed=given.seed
        )  # fmt: skip
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def side_by_side(
    runs: Sequence[Path],
    output: Path,
    prompts: Sequence[str] | None = None,
    *,
    per_prompt: int = 2,
    steps: Sequence[int] = (1, 2, 4, 8),
    cell: int = 48,
    seed: int = 0,
) -> None:
    """Sample from all runs, and write the picture.

    Args:
        runs: folders of runs, with the same model and teacher.
        output: the picture, a PNG.
        prompts: None: `sample.prompts` of the first run.
        per_prompt: images of each prompt.
        steps: Euler steps, one row each.
        cell: side of an image in the picture, in pixels.
        seed: image i of a row starts from the noise of `seed + i`.

    Raises:
        UserError: if the runs have different teachers, sizes or shifts, or there is no prompt.
    """
    if per_prompt < 1 or cell < 1 or min(steps) < 1:
        raise UserError("--per-prompt, --cell and --steps must be at least 1")
    blocks: dict[str, list[list[Image.Image]]] = {}
    first: RunModel | None = None
    for run in runs:
        model = RunModel(run)
        if first is None:
            first, told = model, _prompts(model, prompts)
            texts = [text for text in told for _ in range(per_prompt)]
            teacher_steps = model.config.evaluate.teacher_steps
            blocks[UNDISTILLED] = [
                model.sample(texts, steps=n, seed=seed, undistilled=True) for n in (*steps, teacher_steps)
            ]
        _check_same(first, model)
        name = name_of(run)
        if name in blocks:
            raise UserError(f"two of the runs have the name {name!r}: {run} is the second")
        blocks[name] = [model.sample(texts, steps=n, seed=seed) for n in steps] + [blocks[UNDISTILLED][-1]]
    labels = [*(count(n, "step") for n in steps), f"teacher, {teacher_steps}"]
    picture = _draw(blocks, labels, cell)
    with written_whole(output, "the picture", _ADVICE) as partial:
        picture.save(partial, optimize=True)
    print(f"{output}; in each block, from left to right, {count(per_prompt, 'image')} of each of:")
    print("\n".join(f"  {text}" for text in told))


def name_of(run: Path) -> str:
    """What the run is called in the picture: its folder; of a study's run ARM/seed-K its arm."""
    folder = run.absolute()
    return folder.parent.name if re.fullmatch(r"seed-\d+", folder.name) else folder.name


def _prompts(model: RunModel, given: Sequence[str] | None) -> list[str]:
    found = given or model.config.sample.prompts
    if not found or isinstance(found, str):
        raise UserError("there is no prompt: give --prompt TEXT, or set sample.prompts of the first run to a list")
    return list(found)


def _check_same(first: RunModel, other: RunModel) -> None:
    """UserError unless the teachers of both runs make the same images."""
    for section, key in (
        ("model", "path"),
        ("model", "adapters"),
        ("data", "resolution"),
        ("sample", "shift"),
        ("sample", "guidance"),
    ):
        values = [getattr(getattr(model.config, section), key) for model in (first, other)]
        if values[0] != values[1]:
            raise UserError(
                f"{other.config.run.dir} has another teacher than {first.config.run.dir}: {section}.{key} is {values[1]} and {values[0]}. "
                f"Give runs of one model, shift, guidance and size"
            )


def _draw(blocks: dict[str, list[list[Image.Image]]], labels: Sequence[str], cell: int) -> Image.Image:
    """Blocks side by side, each with its name above."""
    font = ImageFont.load_default(size=13)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max(int(probe.textlength(label, font=font)) for label in labels) + 2 * _GAP
    top = 24
    columns = len(next(iter(blocks.values()))[0])
    width = columns * cell + _GAP
    lines = [top + row * (cell + 2) for row in range(len(labels))]
    lines[-1] += _GAP  # the teacher's row is set apart
    canvas = Image.new("RGB", (left + len(blocks) * width, lines[-1] + cell + _GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for y, label in zip(lines, labels, strict=True):
        pen.text((_GAP, y + cell // 2 - 8), label, fill=_INK, font=font)
    for number, (name, rows) in enumerate(blocks.items()):
        x = left + number * width
        pen.text((x, 4), name, fill=_INK, font=font)
        for y, images in zip(lines, rows, strict=True):
            for column, image in enumerate(images):
                canvas.paste(image.resize((cell, cell), Image.Resampling.LANCZOS), (x + column * cell, y))
    return canvas


if __name__ == "__main__":
    main()
