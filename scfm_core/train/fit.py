"""A complete run: the training loop with logs, checkpoints, validation grids and rollbacks."""

from scfm_core.distributed.watchdog import is_connection_error
from scfm_core.errors import PeerLost, UserError
from scfm_core.progress import beat, counting_io
from scfm_core.train.grid import Validation
from scfm_core.train.metrics import RunLog
from scfm_core.train.trainer import SkippedTooOften, Trainer


def fit(trainer: Trainer) -> int | None:
    """Train to `train.steps`; every rank calls it, rank 0 writes.

    Returns:
        the number of the signal that stopped the run; None if all steps are done.
    """
    config, world = trainer.config, trainer.world
    validation = None
    if trainer.encoder.prompts:
        with world.together(), counting_io("the validation grids"):
            validation = Validation(config, trainer.model, trainer.engine, trainer.encoder, world)
    # Lost ranks are named while this rank still handles SIGTERM, which the launcher sends when a rank has ended.
    with RunLog(config, trainer.progress.step, world) as log, trainer.stop.listening(), world.naming_lost_ranks():
        if trainer.data_change is not None:
            log.incident(trainer.data_change)
        if validation and validation.is_missing(trainer.progress.step):  # killed between checkpoint and grid
            validation.save_grid(trainer.progress.step)
        while True:
            try:
                stopped_by = _run_steps(trainer, validation, log)
                trainer.state.wait()
                return stopped_by
            except SkippedTooOften:
                log.rolled_back(trainer.state.roll_back())
            except Exception as error:
                # A rank that is lost writes nothing any more.
                if not isinstance(error, PeerLost) and not is_connection_error(error):
                    _finish_checkpoint(trainer)
                raise


def _finish_checkpoint(trainer: Trainer) -> None:
    """Wait for the checkpoint that is written in the background, which an error that ends the process would lose."""
    try:
        trainer.state.wait()
    except UserError as error:
        if trainer.world.is_main:
            print(f"warning: {error}", flush=True)


def _run_steps(trainer: Trainer, validation: Validation | None, log: RunLog) -> int | None:
    config, total = trainer.config, trainer.config.train.steps
    for row in trainer.train_steps():
        beat(f"step {row['step'] + 1}")
        log.step(row)
        step, stopping = row["step"], trainer.stopping
        # Not during consecutive skipped steps: a new checkpoint could replace the one that a rollback needs.
        due = step % config.checkpoint.every == 0 and trainer.state.guard.first_skipped is None
        if due or step == total or stopping is not None or trainer.data_error is not None:
            beat(f"the checkpoint of step {step}")
            trainer.state.save()
            beat(f"step {step + 1}")
        if validation and validation.is_due(step):
            log.picture(validation.save_grid(step), step)
            beat(f"step {step + 1}")
        if stopping is not None and step < total:
            break
    return trainer.stopping if trainer.progress.step < total else None
