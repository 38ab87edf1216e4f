"""Whether an evaluation can measure a figure: found out before the training, not after it."""

from collections.abc import Sequence
from pathlib import Path

import torch

from recipes.comparison import Comparison
from recipes.evaluate import planned, repeated
from recipes.figures import FIGURES
from scfm_core.errors import UserError
from scfm_core.train.config import EvaluateConfig, RunConfig
from scfm_core.train.figures import NEIGHBOURS
from scfm_core.train.prompts import read_prompts

_NO_REPEATS = (
    "the metric diversity compares images of the same prompt; {} has one image of each. Set evaluate.per_prompt=4"
)


def check_settings(names: Sequence[str], settings: EvaluateConfig, where: str) -> None:
    """Check all that the settings alone tell. Captions of the data are not read: they may not exist yet.

    Args:
        names: of the figures.
        settings: of the evaluation.
        where: whose settings they are, for messages.

    Raises:
        UserError: if a figure cannot be measured; it says which setting would mend that.
    """
    for name in names:
        needs = FIGURES[name].needs
        if needs is not None and getattr(settings, needs) is None:
            raise UserError(f"the metric {name} needs evaluate.{needs}; {where} has none")
        if name.startswith(("precision", "recall")) and settings.samples <= NEIGHBOURS:
            raise UserError(
                f"the metric {name} needs more than {NEIGHBOURS} images; {where} has evaluate.samples={settings.samples}"
            )
        if name == "prompt_following" and settings.features == "inception":
            raise UserError(
                f"the metric {name} needs a classifier that reads what an image shows; {where} has evaluate.features=inception. Set "
                f"evaluate.features=classifier, or MODULE:FUNCTION of a benchmark that has one"
            )
        if name == "diversity" and not _has_repeats(settings):
            raise UserError(_NO_REPEATS.format(where))


def check_ready(names: Sequence[str], config: RunConfig) -> None:
    """Check the rest, before the training of a run: networks and data of its evaluation are there, and enough of them.

    Args:
        names: of the figures.
        config: of the run.

    Raises:
        UserError: if a figure cannot be measured, a network's files are missing, or the data cannot be read.
    """
    settings = config.evaluate
    comparison = Comparison(settings, torch.device("cpu"))
    if "prompt_following" in names and comparison.accuracy is None:
        raise UserError(
            f"the metric prompt_following needs a classifier that reads what an image shows; evaluate.features={settings.features} has none"
        )
    _, items, prompts = planned(config, note=lambda text: None)
    if len(items) <= NEIGHBOURS and (found := [name for name in names if name in ("precision_data", "recall_data")]):
        raise UserError(
            f"the metric {found[0]} needs more than {NEIGHBOURS} images of the data, which have {len(items)}"
        )
    if "diversity" in names and len(set(prompts)) == len(prompts):
        raise UserError(_NO_REPEATS.format("the evaluation"))


def _has_repeats(settings: EvaluateConfig) -> bool:
    """Whether a prompt has several images. True where only the data or a file that does not exist yet could tell."""
    if settings.per_prompt > 1 or settings.prompts is None or not Path(settings.prompts).expanduser().is_file():
        return True
    prompts = repeated(read_prompts(settings.prompts, "evaluate.prompts"), settings)
    return len(set(prompts)) < len(prompts)
