"""The figures of a run's evaluation, for the model card."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from recipes.figures import FIGURES, Result, figure_rows, step_counts, title
from scfm_core.errors import UserError
from scfm_core.train.config import RunConfig
from scfm_core.train.parse import dump_config, with_absolute_paths
from scfm_core.wording import count

_KINDS = {"base": "undistilled", "student": "distilled"}


def is_evaluated(config: RunConfig, run_dir: Path, checkpoint: Path) -> bool:
    """Whether the run's evaluation is of these weights: the same checkpoint, average, fused adapters and guidance."""
    path = run_dir / "evaluation.yaml"
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    name = re.match(r"# checkpoint (\S+)\n", text)
    now = yaml.safe_load(dump_config(with_absolute_paths(config)))
    keys = (("sample", "weights"), ("sample", "guidance"), ("model", "adapters"))
    with _damage(path):
        then = yaml.safe_load(text)
        same = all(then.get(section, {}).get(key) == now[section].get(key) for section, key in keys)
    return same and name is not None and name[1] == checkpoint.name


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """A file of an evaluation that is not what `scfm evaluate` wrote is a UserError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, yaml.YAMLError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}). Run `scfm evaluate` again, or delete it"
        ) from error


def measured(config: RunConfig, run_dir: Path, checkpoint: Path) -> str:
    """The section of the card with the figures of `evaluation.json`; empty if there are none of these weights.

    Raises:
        UserError: if a file of the evaluation is damaged.
    """
    path = run_dir / "evaluation.json"
    if not path.is_file() or not is_evaluated(config, run_dir, checkpoint):
        return ""
    with _damage(path):
        return _figures(json.loads(path.read_text(encoding="utf-8")), config)


def _figures(result: Result, config: RunConfig) -> str:
    shown = {kind: result[kind] for kind in _KINDS if result.get(kind)}
    steps = step_counts(shown)
    rows = [f"| figure | model | {' | '.join(f'{n} steps' if n != '1' else '1 step' for n in steps)} |"]
    rows.append("|---" * (len(steps) + 2) + "|")
    for name, kind, cells in figure_rows(shown, list(FIGURES)):
        rows.append(f"| {title(name)} | {_KINDS[kind]} | {' | '.join(cell or '-' for cell in cells)} |")
    some = next(iter(result["student"].values()))
    height, width = config.data.resolution
    teacher = "".join(f" The teacher is the base model at {steps} steps." for steps in result.get("teacher", {}))
    return (
        "## Measured\n\n"
        + "\n".join(rows)
        + f"\n\n{count(int(some['samples']), 'image')} of {height} x {width} pixels from the same "
        f"noise, {int(some['features'])} features ({config.evaluate.features}); lower distances are better, and higher values of the "
        f"others.{teacher}"
    )
