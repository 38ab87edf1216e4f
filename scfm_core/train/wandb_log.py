"""The run in Weights & Biases. W&B never ends a run: after the start, its failure is one warning."""

import contextlib
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scfm_core.errors import UserError, missing_extra
from scfm_core.files import written_whole
from scfm_core.secrets import scrub
from scfm_core.train.config import WandbConfig

_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
"""Values of WANDB_MODE, with W&B's older names."""
_OURS = ("WANDB_MODE", "WANDB_DISABLED", "WANDB_RUN_ID", "WANDB_RESUME")
"""Variables that scfm decides by itself: W&B does not see them."""
_PLACES = ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
_TRUE = ("1", "true", "yes", "on")


class WandbLog:
    """The run in W&B, unless it is disabled. The id is stored in the run's folder, so a resumed run continues the same one.

    W&B's own steps only increase, and it drops rows of earlier ones. After a resume or a rollback steps come again. So the
    rows have a step metric of their own, `step`, which is the x-axis of all charts.

    Args:
        config: mode and project.
        run_dir: the run's folder, for W&B's files and the id.
        settings: the run's configuration as plain values.

    Raises:
        UserError: if W&B is not installed; if it should be online and cannot; if WANDB_MODE is invalid.
    """

    def __init__(self, config: WandbConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        self._run: Any = None
        mode = _mode(config)
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            problem = missing_extra(f"wandb.mode={config.mode}", "wandb", error, "set wandb.mode=disabled")
            if config.mode != "auto":
                raise problem from error
            print(f"nothing is logged to W&B: {problem}")
            return
        self._wandb = wandb
        identifier = _identifier(run_dir)
        try:
            with _environment(mode, run_dir):
                self._run = wandb.init(
                    project=config.project,
                    name=run_dir.name,
                    id=identifier,
                    resume="allow",
                    dir=str(run_dir),
                    config=settings,
                    mode=mode,  # type: ignore[arg-type]
                    settings=wandb.Settings(silent=True, console="off"),
                )
                self._run.define_metric("step")
                self._run.define_metric("*", step_metric="step")
        except Exception as error:  # of W&B, pydantic, the operating system
            if mode == "online":
                raise UserError(
                    f"W&B is unreachable or rejects the key ({_first_line(error)}). Set wandb.mode=offline and run "
                    f"`wandb sync` later"
                ) from error
            self._lost(error, "It could not start")

    def log(self, row: dict[str, Any]) -> None:
        """Send one step's numbers; `row` has the `step`."""
        self._safely(lambda run: run.log(row))

    def image(self, name: str, path: Path, step: int) -> None:
        """Send a picture."""
        self._safely(lambda run: run.log({name: self._wandb.Image(str(path)), "step": step}))

    def close(self) -> None:
        """Finish the run."""
        self._safely(lambda run: run.finish())

    def _safely(self, act: Callable[[Any], object]) -> None:
        if self._run is not None:
            try:
                act(self._run)
            except Exception as error:
                self._lost(error, "Its service has ended")

    def _lost(self, error: Exception, what: str) -> None:
        self._run = None
        with contextlib.suppress(Exception):  # now, and not at the exit, where it would print a traceback
            self._wandb.teardown()
        print(
            f"scfm: warning: the run goes on without W&B. {what} ({_first_line(error)}). metrics.jsonl has all rows",
            file=sys.stderr,
        )


def _first_line(error: Exception) -> str:
    lines = scrub(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _identifier(run_dir: Path) -> str:
    """The run's id in W&B: a new run in a sweep has the sweep's, any other one its own."""
    file = run_dir / "wandb_id"
    given = os.environ.get("WANDB_RUN_ID")
    if not file.is_file():
        in_sweep = given and os.environ.get("WANDB_SWEEP_ID") and re.fullmatch(r"[\w-]+", given)
        with written_whole(file, "run.dir", "Make room") as partial:
            partial.write_text(given if in_sweep and given else uuid.uuid4().hex, encoding="utf-8")
    own = file.read_text(encoding="utf-8").strip()
    if given and given != own:
        print(f"scfm: warning: WANDB_RUN_ID={given} is ignored: {file} has this run's id", file=sys.stderr)
    return own


def _mode(config: WandbConfig) -> str:
    if config.mode != "auto":
        return config.mode
    if os.environ.get("WANDB_DISABLED", "").lower() in _TRUE:
        return "disabled"
    if given := os.environ.get("WANDB_MODE"):
        if (mode := _MODES.get(given.strip().lower())) is None:
            raise UserError(
                f"WANDB_MODE={given} is not a mode of W&B: use online, offline or disabled, or set wandb.mode in the recipe"
            )
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") or _has_key() else "offline"


def _has_key() -> bool:
    """Whether ~/.netrc has a key. A home that is unknown or cannot be read has none."""
    with contextlib.suppress(OSError, RuntimeError):
        return b"api.wandb.ai" in Path("~/.netrc").expanduser().read_bytes()
    return False


@contextlib.contextmanager
def _environment(mode: str, run_dir: Path) -> Iterator[None]:
    """W&B's variables as scfm understands them. Without WANDB_MODE=offline W&B would send telemetry of an offline run.

    Its cache and log are in the home folder; if that cannot be written, they are in the run's folder.
    """
    before = {name: os.environ.pop(name) for name in _OURS if name in os.environ}
    changes = {"WANDB_MODE": mode}
    if not _has_home():
        place = str((run_dir / "wandb" / "home").absolute())
        changes |= {name: place for name in _PLACES if name not in os.environ}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name in changes:
            del os.environ[name]
        os.environ.update(before)


def _has_home() -> bool:
    with contextlib.suppress(RuntimeError):
        return os.access(Path.home(), os.W_OK)
    return False
