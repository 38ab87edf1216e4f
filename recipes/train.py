"""`scfm train`: parse, build, loop."""

import contextlib
import signal
from pathlib import Path

from recipes.export import export_adapter
from scfm_core.errors import UserError
from scfm_core.models.weights import ADAPTER_FILE
from scfm_core.train.build import build_family, read_prompts
from scfm_core.train.checkpoint import find_checkpoint
from scfm_core.train.config import RunConfig, dump_config, load_config
from scfm_core.train.estimate import estimate, format_estimate
from scfm_core.train.trainer import Trainer, fit

# What belongs to one attempt at a run; `--resume never` moves it aside.
_ATTEMPT = (
    "config.yaml",
    "metrics.jsonl",
    "checkpoints",
    "samples",
    "adapter",
    "evaluation.json",
    "report.html",
    "wandb_id",
    "wandb",
)


def train(config_path: str, overrides: list[str], *, resume: str = "auto", dry_run: bool = False) -> int:
    """Run a recipe; returns the exit code: 0 when done, 128 + signal when stopped by one (as a shell would)."""
    config = load_config(config_path, overrides)
    if dry_run:
        print(describe(config))
        return 0
    run_dir = Path(config.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        start = _starting_point(run_dir, resume)
        trainer = Trainer(config, start)
        (run_dir / "config.yaml").write_text(dump_config(config))
    except OSError as error:
        raise UserError(
            f"run.dir: {run_dir} cannot be written ({error.strerror}). Choose another with run.dir=PATH"
        ) from error
    if start is not None:
        print(f"resuming from {start} at step {trainer.progress.step}")
    adapter = run_dir / "adapter" / ADAPTER_FILE
    if trainer.progress.step < config.train.steps:
        stopped_by = fit(trainer)
        if stopped_by is not None:
            name = signal.Signals(stopped_by).name
            print(f"stopped by {name} after step {trainer.progress.step}; the same command goes on from there")
            return 128 + stopped_by
    else:
        print(f"nothing to do: {run_dir} has all {config.train.steps} steps")
        if adapter.is_file():
            return 0
    if config.train.weights == "lora":
        print(f"adapter: {export_adapter(run_dir, config, trainer.model)}")
    return 0


def describe(config: RunConfig) -> str:
    """The dry run: the configuration is valid; this is what it will cost."""
    if not config.sample.prompts and config.sample.every:
        raise UserError("sample.every asks for grids, but sample.prompts is empty. Give prompts, or set sample.every=0")
    read_prompts(config.sample.prompts, "sample.prompts")
    return format_estimate(estimate(config, build_family(config, offline=True)), config)


def _starting_point(run_dir: Path, resume: str) -> Path | None:
    if resume == "auto":
        return find_checkpoint(run_dir)
    if resume == "never":
        _move_aside(run_dir)
        return None
    path = Path(resume)
    if not path.is_dir():
        raise UserError(
            f"--resume {resume}: there is no such checkpoint folder. Use auto, never, or a path to step_XXXXXXXX"
        )
    if (path / "checkpoints").is_dir():
        found = find_checkpoint(path)
        if found is None:
            raise UserError(f"--resume {resume}: that run has no complete checkpoint")
        return found
    return path


def _move_aside(run_dir: Path) -> None:
    """Nothing of an earlier attempt is deleted: it goes to `previous-1`, `previous-2`, ..."""
    present = [name for name in _ATTEMPT if (run_dir / name).exists()]
    if not present:
        return
    number = 1
    while (run_dir / f"previous-{number}").exists():
        number += 1
    target = run_dir / f"previous-{number}"
    target.mkdir()
    for name in present:
        with contextlib.suppress(FileNotFoundError):
            (run_dir / name).rename(target / name)
    print(f"moved the earlier attempt to {target}")
