"""The state of a run that training changes: saved, restored, and rolled back after skipped steps."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scfm_core.data.corpus import Corpus
from scfm_core.distributed.engine import Engine
from scfm_core.distributed.world import World
from scfm_core.errors import UserError, agreed_error
from scfm_core.files import Written
from scfm_core.models.student import ShortcutModel
from scfm_core.train.checkpoint import Checkpoint, CheckpointWriter, load_checkpoint, verify_checkpoint
from scfm_core.train.config import RunConfig
from scfm_core.train.guard import Guard
from scfm_core.train.parse import parse_config, to_plain, without_removed_keys
from scfm_core.train.resume import check_same_recipe
from scfm_core.train.run_dir import newest_complete, step_of


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Number of steps, including skipped ones."""
    updates: int = 0
    """Number of steps that were applied: the optimizer's count."""
    samples: int = 0
    """Samples consumed: the data cursor, and the next global sample index."""
    data_start: int = 0
    """Samples consumed before the current data recipe; its order starts there."""
    bad_samples: int = 0
    """Number of invalid samples, which were replaced."""
    seconds: float = 0.0
    """Time spent in steps, over all starts of the run."""
    rollbacks: int = 0
    """How often the run returned to an earlier checkpoint by itself."""


class RunState:
    """Progress, guard, weights, optimizer and EMAs of a run, on this process.

    Args:
        config: the run.
        model: for shapes and the base's fingerprint.
        engine: holds weights, optimizer and EMAs.
        corpus: for the data's fingerprint.
        world: the processes; all of them call each method at the same step.
    """

    def __init__(self, config: RunConfig, model: ShortcutModel, engine: Engine, corpus: Corpus, world: World) -> None:
        self.progress = Progress()
        self.guard = Guard(config.train.spike_factor, config.train.max_skips)
        self._config, self._model, self._engine, self._corpus, self._world = config, model, engine, corpus, world
        self._run_dir = Path(config.run.dir)
        self._writer = CheckpointWriter(
            self._run_dir, config.checkpoint.keep, world, on_thread=config.checkpoint.asynchronous
        )

    def save(self) -> Path:
        """Write a checkpoint of the current step. With `checkpoint.asynchronous` it appears later; `wait` waits for it."""
        # A rollback needs the one from before the skipped steps.
        return self._writer.save(
            self.progress.step, self._write, self._as_json(), needed_before=self.guard.first_skipped
        )

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            UserError: on every rank, if it could not be written.
        """
        self._writer.wait()

    def restore(self, checkpoint: Checkpoint, *, data_may_change: bool) -> dict[str, Any] | None:
        """Restore everything from a checkpoint.

        Args:
            checkpoint: verified.
            data_may_change: accept other data than the checkpoint's, starting with their first sample.

        Returns:
            the change of the data, for the log; None if there is none.

        Raises:
            UserError: if recipe, model or data differ from the checkpoint's.
        """
        changes = self._compare(checkpoint, data_may_change)
        self._load(checkpoint)
        if not changes:
            return None
        progress = self.progress
        progress.data_start, progress.bad_samples = progress.samples, 0
        return {"event": "data_changed", "step": progress.step, "samples": progress.samples, "changes": changes}

    def roll_back(self) -> dict[str, Any]:
        """Restore weights, optimizer and EMAs from before the consecutive skipped steps. The data continue after these steps.

        Returns:
            the rollback, for the log.

        Raises:
            UserError: on every rank, if there is no such checkpoint, or after `train.max_rollbacks` rollbacks.
        """
        train, before, first = self._config.train, self.progress, self.guard.first_skipped
        assert first is not None
        self.wait()
        target = self._intact_before(first)
        why = f"{train.max_skips + 1} consecutive steps, {first} to {before.step}, were skipped"
        advice = (
            f"{self._run_dir / 'incidents.jsonl'} lists the reasons and the samples. Look at these samples, lower train.lr or "
            f"train.clip_norm, or raise train.max_skips"
        )
        if target is None:
            raise agreed_error(f"{why}, and there is no checkpoint from before these steps. {advice}")
        if before.rollbacks >= train.max_rollbacks:
            raise agreed_error(f"{why}, and the run has already rolled back {before.rollbacks} times. {advice}")
        with self._world.together():
            self._load(load_checkpoint(target, verify=False))
        self.progress = dataclasses.replace(
            before, step=self.progress.step, updates=self.progress.updates, rollbacks=before.rollbacks + 1
        )
        return {
            "event": "rollback",
            "from_step": before.step,
            "to_step": self.progress.step,
            "next_sample": before.samples,
            "reason": why,
        }

    def _write(self, folder: Path, world: World) -> Callable[[], Written]:
        return self._engine.save(folder, world, on_thread=self._config.checkpoint.asynchronous)

    def _as_json(self) -> dict[str, Any]:
        engine = self._config.engine
        return {
            **dataclasses.asdict(self.progress),
            "guard": self.guard.state_dict(),
            "kind": self._engine.checkpoint_kind,
            "engine": f"ZeRO-{engine.zero_stage}" if engine.name == "deepspeed" else "fsdp2",
            "world_size": self._world.size,
            "shapes": {name: list(shape) for name, shape in self._model.shapes().items()},
            "data_fingerprint": self._corpus.fingerprint,
            "base_fingerprint": self._model.family.fingerprint,
            "config": to_plain(self._config),
        }

    def _compare(self, checkpoint: Checkpoint, data_may_change: bool) -> list[str]:
        """Check that recipe, model and data are the checkpoint's; returns the accepted differences in the data, one line each."""
        state, path = checkpoint.state, checkpoint.path
        # parse_config sets the defaults of keys that an earlier version did not have.
        saved = to_plain(parse_config(without_removed_keys(state["config"]), str(path)))
        changes = check_same_recipe(
            saved,
            to_plain(self._config),
            path,
            data_may_change=data_may_change,
            quiet=not self._world.is_main or state["step"] >= self._config.train.steps,
        )
        difference = self._model.family.different_network(state["base_fingerprint"])
        if difference is not None:
            raise UserError(
                f"checkpoint {path} was trained on another model than model.path={self._config.model.path} and model.adapters contain now: {difference}. "
                f"Resume with the same model, or start over with --resume never"
            )
        before, now = state["data_fingerprint"], self._corpus.fingerprint
        if before == now:
            return changes
        if not data_may_change:
            raise UserError(
                f"checkpoint {path} was trained on other data than the recipe's shards contain now (fingerprint {before[:12]} "
                f"and {now[:12]}). Resume with the same data; or continue with the new data, from their first sample, with "
                f"--allow-data-change; or start over with --resume never"
            )
        return [*changes, f"content: fingerprint {before[:12]} in the checkpoint, {now[:12]} now"]

    def _load(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self.progress = Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
        self.guard.load_state_dict(state["guard"])
        checkpoint.reader.fill(self._engine.slots())
        self._engine.restored(self.progress.updates)

    def _intact_before(self, step: int) -> Path | None:
        """The newest undamaged checkpoint of a step before `step`, the same on every rank; None if there is none."""
        while True:
            path: Path | None = self._world.from_main(newest_complete(self._run_dir, before=step))
            if path is None:
                return None
            try:
                verify_checkpoint(path, self._world)
                return path
            except UserError:
                step = step_of(path)
