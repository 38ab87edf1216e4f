"""`python -m recipes.models_docs`: write the computed table of docs/models.md, from the families and the recipes."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from scfm_core.models.families import FAMILIES
from scfm_core.models.protocol import ModelFamily
from scfm_core.models.published import PUBLISHED
from scfm_core.train.parse import load_config

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
_RECIPES = Path(__file__).parent / "configs"
_TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)
_TEXT_LENGTH = 512
_GUIDANCE = {"input": "embedded", "passes": "two passes", "none": "none"}


def page(text: str) -> str:
    """The page with its table, between `<!-- table -->` and `<!-- end -->`, computed anew."""
    table = "\n".join(_rows())
    return _TABLE.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def _rows() -> Iterator[str]:
    yield (
        "| model | parameters | linears | guidance | text of a sample | tokens of 1024 x 1024 | own shift, 512 / 1024 "
        "| licence | recipes |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    recipes: dict[str, list[str]] = {}
    for path in sorted(_RECIPES.glob("*.yaml")):
        recipes.setdefault(load_config(path.name, []).model.path, []).append(f"`{path.stem}`")
    for family in FAMILIES:
        for name in family.known:
            yield _row(family(Path(name), family.known[name]), ", ".join(recipes.get(name, ["-"])))


def _row(family: ModelFamily, recipes: str) -> str:
    network = family.meta_network()
    parameters = sum(p.numel() for p in network.parameters()) / 1e9
    linears = sum(isinstance(module, nn.Linear) for module in network.modules())
    text = 2 * sum(math.prod(shape) for shape in family.shapes(_TEXT_LENGTH).values()) / 1e6
    tokens = [
        family.image_tokens(torch.empty(1, *family.latent_shape(side, side), device="meta")) for side in (512, 1024)
    ]
    shifts = " / ".join(f"{family.shift(number, 4):.2f}" for number in tokens)
    guidance = _GUIDANCE[family.guidance_kind]
    if family.guidance_kind == "passes" and family.neutral_guidance == 0:
        guidance += ", `1 + s`"
    masked = "up to " if "masked" in family.fields.values() else ""
    return (
        f"| {family.folder} | {parameters:.1f} B | {linears} | {guidance} | {masked}{text:.1f} MB | {tokens[1]:,} | {shifts} "
        f"| {_licence(str(family.folder))} | {recipes} |"
    )


def _licence(hub_id: str) -> str:
    published = PUBLISHED.get(hub_id)
    return "other" if published is None else published.license_name or published.license


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
