"""`scfm sample --layout`: many images where other tools read them, made by several processes, and resumed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.image_files import ADVICE, read_settings, save_image
from scfm_core.api import RunModel
from scfm_core.errors import UserError
from scfm_core.files import written_whole
from scfm_core.train.metrics import progress_bar
from scfm_core.wording import count

_METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Layout:
    """Where the images of a set are."""

    image: str
    """The place of an image, from the number of its prompt and its own among those of the prompt."""
    pattern: str
    """Matches all images."""
    metadata_per_prompt: bool
    """`metadata.jsonl` is in the folder of each prompt and has its record. Otherwise there is one file, with a line for each image, which
    also names it (`file_name`), as in an image folder of the datasets library."""
    required: tuple[str, ...] = ()
    """Keys that the tool needs in each record."""

    def check(self, records: Sequence[dict[str, Any]]) -> None:
        """UserError if the tool would fail on a record."""
        for number, record in enumerate(records, 1):
            if missing := [key for key in self.required if key not in record]:
                raise UserError(
                    f"--layout: record {number} of the prompts has no {', '.join(missing)}, which the tool needs. Give the tool's own "
                    f"file of prompts with --prompts, or use --layout flat"
                )


LAYOUTS = {
    # https://github.com/djghosh13/geneval, README and evaluation/evaluate_images.py
    "geneval": Layout("{prompt:05d}/samples/{number:04d}.png", "*/samples/*.png", True, required=("tag",)),
    "flat": Layout("{prompt:05d}_{number:04d}.png", "*.png", False),
}


@dataclass(frozen=True)
class ImageSet:
    """A set of images: `per_prompt` of each record's `prompt`.

    Image number i of the set, counted prompt by prompt, starts from the noise of `seed + i`. Images are made in batches that do not depend
    on the number of processes, so neither do the images.
    """

    folder: Path
    layout: Layout
    records: Sequence[dict[str, Any]]
    per_prompt: int
    settings: dict[str, Any]
    """Of all images, without prompt and seed."""
    seed: int

    def make(self, model: RunModel, strength: float | None, batch_size: int, rank: int, size: int) -> int:
        """Make the images of this process that are missing; returns how many of its images there are now.

        Raises:
            UserError: if the folder has images or metadata that are not of this set.
        """
        self._refuse_others()
        at_once = max(1, batch_size // self.per_prompt)
        blocks = [
            range(first, min(first + at_once, len(self.records))) for first in range(0, len(self.records), at_once)
        ]
        own = blocks[rank::size]
        missing = [(block, absent) for block in own if (absent := self._absent(block))]
        self._write_metadata(own, is_first=rank == 0)
        total = sum(len(block) for block in own) * self.per_prompt
        left = sum(len(absent) for _, absent in missing)
        with progress_bar("sample", total, total - left, unit="image") as bar:
            for block, absent in missing:
                self._make_block(model, strength, block, absent)
                bar.update(len(absent))
        return total

    def _make_block(self, model: RunModel, strength: float | None, block: range, absent: set[int]) -> None:
        """Make all images of a block, as at the first start, and write those that are `absent`."""
        numbers = self._numbers(block)
        prompts = [self._prompt(number) for number in numbers]
        seeds = [self.seed + number for number in numbers]
        images = model.sample(prompts, steps=self.settings["steps"], seed=seeds, strength=strength)
        for number, image in zip(numbers, images, strict=True):
            if number in absent:
                with written_whole(self._path(number), "the images", ADVICE) as partial:
                    save_image(partial, image, self._settings(number))

    def _numbers(self, block: range) -> range:
        return range(block.start * self.per_prompt, block.stop * self.per_prompt)

    def _prompt(self, number: int) -> str:
        return str(self.records[number // self.per_prompt]["prompt"])

    def _settings(self, number: int) -> dict[str, Any]:
        return self.settings | {"prompt": self._prompt(number), "seed": self.seed + number}

    def _name(self, number: int) -> str:
        prompt, own = divmod(number, self.per_prompt)
        return self.layout.image.format(prompt=prompt, number=own)

    def _path(self, number: int) -> Path:
        return self.folder / self._name(number)

    def _absent(self, block: range) -> set[int]:
        """The images of a block that are not there.

        Raises:
            UserError: if an image was made with other settings.
        """
        absent = set()
        for number in self._numbers(block):
            path, wanted = self._path(number), self._settings(number)
            if not path.exists():
                absent.add(number)
            elif (found := read_settings(path)) != wanted:
                found = found or {}
                different = [key for key in wanted if found.get(key) != wanted[key]]
                raise UserError(
                    f"{path} was made with other settings ({', '.join(different)}). Choose another folder with --output, or delete it"
                )
        return absent

    def _refuse_others(self) -> None:
        """UserError if there are images that another tool would take for images of this set."""
        names = {self._name(number) for number in range(len(self.records) * self.per_prompt)}
        found = (
            path for path in self.folder.glob(self.layout.pattern) if not path.name.startswith(".")
        )  # being written
        there = {path.relative_to(self.folder).as_posix() for path in found}
        if others := sorted(there - names):
            raise UserError(
                f"{self.folder} has {count(len(others), 'image')} that {len(self.records)} prompts with --per-prompt {self.per_prompt} "
                f"do not have, such as {others[0]}. Choose another folder with --output, or delete them"
            )

    def _write_metadata(self, own: Sequence[range], *, is_first: bool) -> None:
        """Write `metadata.jsonl` for the prompts of this process; the first process writes the file of all images."""
        if self.layout.metadata_per_prompt:
            for prompt in (prompt for block in own for prompt in block):
                self._write(self._path(prompt * self.per_prompt).parents[1] / _METADATA, [self.records[prompt]])
        elif is_first:
            numbers = self._numbers(range(len(self.records)))
            # Records of an image folder have names of their own.
            rows = [{**self.records[n // self.per_prompt], "file_name": self._name(n)} for n in numbers]
            self._write(self.folder / _METADATA, rows)

    def _write(self, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return
        if path.exists():
            raise UserError(f"{path} is of other prompts. Choose another folder with --output, or delete it")
        with written_whole(path, "the images", ADVICE) as partial:
            partial.write_text(text, encoding="utf-8")
