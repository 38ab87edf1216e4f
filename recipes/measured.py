"""The figures of a run's evaluation, for the model card."""

import re
from pathlib import Path
from typing import Any

import yaml

from recipes.figures import FIGURES, Result, figure_rows, intact, read_evaluation, step_counts, title
from scfm_core.train.config import RunConfig
from scfm_core.train.parse import dump_config, with_absolute_paths
from scfm_core.train.runs import open_run
from scfm_core.wording import count

_KINDS = {"base": "undistilled", "student": "distilled"}


def is_evaluated(config: RunConfig, run_dir: Path, checkpoint: Path) -> bool:
    """Whether the run's evaluation is of these weights: the same checkpoint, average, fused adapters, guidance and shift.

    Raises:
        UserError: if `evaluation.yaml` is damaged.
    """
    settings = _settings_of_evaluation(run_dir, checkpoint)
    with intact(run_dir / "evaluation.yaml"):
        return settings is not None and _samples_alike(settings, config, run_dir)


def _settings_of_evaluation(run_dir: Path, checkpoint: Path) -> dict[str, Any] | None:
    """`evaluation.yaml`; None if the run has no evaluation of this checkpoint."""
    path = run_dir / "evaluation.yaml"
    if not path.is_file():
        return None
    with intact(path):
        text = path.read_text(encoding="utf-8")
        settings: dict[str, Any] = yaml.safe_load(text)
        name = re.match(r"# checkpoint (\S+)\n", text)
    return settings if name is not None and name[1] == checkpoint.name else None


def is_of_run(config: RunConfig, run_dir: Path) -> bool:
    """Whether `config` samples as the run itself does, so that the grids of the training show it."""
    return _samples_alike(_tree(open_run(run_dir, [])), config, run_dir)


def _samples_alike(other: dict[str, Any], config: RunConfig, run_dir: Path) -> bool:
    now = _tree(config)
    same = all(other.get("sample", {}).get(key) == now["sample"].get(key) for key in ("weights", "guidance", "shift"))
    adapters = other.get("model", {}).get("adapters", []), now["model"].get("adapters", [])
    return same and (adapters[0] == adapters[1] or _names(adapters[0]) == _names(adapters[1]) == _own_names(run_dir))


def _tree(config: RunConfig) -> dict[str, Any]:
    """The settings as `evaluation.yaml` has them."""
    return dict(yaml.safe_load(dump_config(with_absolute_paths(config))))


def _names(adapters: list[dict[str, Any]]) -> list[tuple[str, float]]:
    return [(Path(adapter["path"]).name, adapter["weight"]) for adapter in adapters]


def _own_names(run_dir: Path) -> list[tuple[str, float]]:
    """Names and weights of the adapters that the run was trained with. Others of these are refused unless their content is the same
    (`check_same_model`), so it does not matter in which folder they are."""
    return [(Path(adapter.path).name, adapter.weight) for adapter in open_run(run_dir, []).model.adapters]


def measured(config: RunConfig, run_dir: Path, checkpoint: Path) -> str:
    """The section of the card with the figures of `evaluation.json`; empty if there are none of these weights.

    Raises:
        UserError: if a file of the evaluation is damaged.
    """
    settings = _settings_of_evaluation(run_dir, checkpoint)
    if settings is None or not is_evaluated(config, run_dir, checkpoint):
        return ""
    path = run_dir / "evaluation.json"
    result = read_evaluation(path)
    with intact(path):
        return "" if result is None else _figures(result, settings)


def _figures(result: Result, settings: dict[str, Any]) -> str:
    """`settings`: those of the evaluation, which may differ from the run's own."""
    shown = {kind: result[kind] for kind in _KINDS if result.get(kind)}
    steps = step_counts(shown)
    rows = [f"| figure | model | {' | '.join(f'{n} steps' if n != '1' else '1 step' for n in steps)} |"]
    rows.append("|---" * (len(steps) + 2) + "|")
    for name, kind, cells in figure_rows(shown, list(FIGURES)):
        rows.append(f"| {title(name)} | {_KINDS[kind]} | {' | '.join(cell or '-' for cell in cells)} |")
    some = next(iter(result["student"].values()))
    (height, width), features = settings["data"]["resolution"], settings["evaluate"]["features"]
    teacher = "".join(f" The teacher is the base model at {steps} steps." for steps in result.get("teacher", {}))
    return (
        "## Measured\n\n"
        + "\n".join(rows)
        + f"\n\n{count(int(some['samples']), 'image')} of {height} x {width} pixels from the same "
        f"noise, {int(some['features'])} features ({features}); lower distances are better, and higher values of the "
        f"others.{teacher}"
    )
