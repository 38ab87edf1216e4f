"""The training loop: data, gradients, a common decision of all ranks, optimizer step, EMAs."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scfm_core.data.loader import batches
from scfm_core.data.schema import Batch
from scfm_core.data.workers import Stopped
from scfm_core.distributed.world import World, same_patience
from scfm_core.errors import UserError, agreed_error
from scfm_core.files import disk_problem
from scfm_core.progress import beat, counting_io
from scfm_core.readback import to_device
from scfm_core.scfm.ema import DualEMA
from scfm_core.scfm.meter import LossMeter
from scfm_core.scfm.restart import restart_due
from scfm_core.train.assemble import build_engine, build_layout, build_model
from scfm_core.train.checkpoint import load_checkpoint
from scfm_core.train.config import RunConfig, TrainConfig
from scfm_core.train.inputs import check_paths
from scfm_core.train.kernels import Kernels
from scfm_core.train.prompts import validation_prompts
from scfm_core.train.rules import micro_batches
from scfm_core.train.sources import Sources
from scfm_core.train.start import find_start
from scfm_core.train.state import Progress, RunState
from scfm_core.train.step import Objective
from scfm_core.train.stop import SIGNALS, StopRequest

_MIN_SAMPLES = 1000
"""The fraction of invalid samples is computed over at least this number of samples: over a few it would mean little."""


class SkippedTooOften(RuntimeError):
    """More than `train.max_skips` consecutive steps were skipped; raised on every rank."""


class Trainer:
    """One run: its model, data, engine, EMAs and their state.

    Args:
        config: the run.
        resume: the checkpoint to resume from, if any; already verified.
        world: the processes; each of them has a trainer.
        data_may_change: allow other data than the checkpoint's, starting with their first sample.
        sources: of data, weights and kernels, if they are not the configuration's own.

    Raises:
        UserError: on every rank, if model, data, prompts, engine or checkpoint do not match the configuration.
    """

    def __init__(
        self,
        config: RunConfig,
        resume: Path | None = None,
        world: World | None = None,
        *,
        data_may_change: bool = False,
        sources: Sources | None = None,
    ) -> None:
        self.config = config
        self._sources = sources = sources or Sources()
        self.world = world or World()
        self.run_dir = Path(config.run.dir)
        self.device = sources.device(config.run.device)
        self.stop = StopRequest()
        self.stopping: int | None = None
        """The signal that requested a stop on any rank; the same on every rank at the same step."""
        self.data_error: Exception | None = None
        """Why there are no data for the next step; every rank has one at the same step."""
        # Each phase is local work, after which the ranks agree; only then comes one with collectives. A rank that fails
        # alone would leave the others in a collective.
        with self.world.together():
            self._open_data()  # before the model is downloaded, which may take an hour
        with self.world.together(), counting_io("the model's files"):
            self.family = sources.family(config)
            kernels = sources.kernels(config, self.family, self.device)
            if config.method.has_stored_paths:
                check_paths(config, self.family, self.corpus)
        self.kernels: Kernels = self.world.from_main(kernels)  # rank 0 decides: measured times differ between GPUs
        with self.world.together(), counting_io("the text encoders"):
            self.encoder = sources.encoder(config, self.family, self.corpus, self.device, self._prompts, self.world)
        beat("the layout")
        with self.world.together():
            layout = build_layout(config, self.world, self.device)
        beat("the networks")
        given = config.lora.start if resume is None and sources.fill is None else None
        start = None if given is None else find_start(given, self.world)
        with self.world.together():
            self.model = build_model(
                config,
                self.family,
                self.device,
                kernels=self.kernels,
                layout=layout,
                world=self.world,
                fill=sources.fill,
                adapters_from=start,
            )
        with self.world.together():
            beat("the engine")
            self.engine = build_engine(config, self.model, layout, self.world)
        same_patience()  # of the groups that layout and engine made
        self.objective = Objective(config, self.model, self.encoder, is_sharded=layout.is_sharded)
        self.emas = DualEMA(
            *(self.engine.ema_tensors(role) for role in ("student", "ema_fast", "ema_slow")), config=config.ema
        )
        self.engine.after_ema_update()
        self.state = RunState(config, self.model, self.engine, self.corpus, self.world)
        self.data_change = None if resume is None else self._restore(resume, data_may_change)
        """Change of the data since the checkpoint, for the log."""

    def _open_data(self) -> None:
        config = self.config
        self._prompts = validation_prompts(config.sample)
        micro_batches(config, self.world.size)  # an error comes here, before the data are opened
        self.corpus = self._sources.corpus(config.data, with_paths=config.method.has_stored_paths)
        if self.world.is_main:
            for note in self.corpus.notes:
                print(f"data, left out: {note}", flush=True)
        self.corpus.order(config.train.global_batch_size, config.run.seed)  # checks that partitions divide the batch

    def _restore(self, checkpoint: Path, data_may_change: bool) -> dict[str, Any] | None:
        with self.world.together():
            change = self.state.restore(load_checkpoint(checkpoint, verify=False), data_may_change=data_may_change)
        # Otherwise a job that is requeued would train on to the next invalid sample, again and again.
        if self.progress.step < self.config.train.steps and (error := self._too_many_invalid()):
            raise error
        return change

    @property
    def progress(self) -> Progress:
        """Progress of the run."""
        return self.state.progress

    def train_steps(self) -> Iterator[dict[str, Any]]:
        """Train to `train.steps`. Yields the metrics of each step after it, the same on every rank.

        The data of a step are loaded before the previous step ends, so that all ranks learn of missing data together, at a
        step boundary.

        Raises:
            SkippedTooOften: if more than `train.max_skips` consecutive steps were skipped.
            UserError: on every rank, if one has no data, or if too many samples were invalid. After another error of the
                loader on one rank, which that rank raises, the others raise PeerLost.
        """
        train, world, progress = self.config.train, self.world, self.progress
        left = train.steps - progress.step
        stream = batches(
            self.corpus,
            seed=self.config.run.seed,
            global_batch_size=train.global_batch_size,
            micro_batch_size=micro_batches(self.config, world.size).size,
            start=progress.samples - progress.data_start,
            stop=progress.samples - progress.data_start + left * train.global_batch_size,
            rank=world.rank,
            world_size=world.size,
            sample_offset=progress.data_start,
            is_stopping=lambda: self.stop.signal is not None,
        )
        with contextlib.closing(stream):
            upcoming = self._next_micro_batches(stream, left)
            world.agree(upcoming if isinstance(upcoming, Exception) else None)
            assert not isinstance(upcoming, Exception)
            stopped = world.gather(self.stop.signal if left and not upcoming else None)
            self.stopping = next((number for number in stopped if number is not None), None)
            if self.stopping is not None:
                return
            for number in range(left):
                assert not isinstance(upcoming, Exception)
                began, data = time.perf_counter(), upcoming
                meter = self._backward(data)
                waited = time.perf_counter()
                upcoming = self._next_micro_batches(stream, left - number - 1)
                waited = time.perf_counter() - waited
                yield self._finish_step(meter, data, upcoming, began) | {"data_seconds": round(waited, 4)}
                if self.data_error is not None:
                    raise self.data_error
                if self.state.guard.is_exhausted:
                    raise SkippedTooOften

    def _next_micro_batches(self, stream: Iterator[Batch], steps_left: int) -> list[Batch] | Exception:
        """The micro-batches of the next step; or any error of the loader: the other ranks must learn of it before it ends this one.

        If the run stops, no data are waited for.
        """
        if not steps_left:
            return []
        try:
            return [next(stream) for _ in range(micro_batches(self.config, self.world.size).number)]
        except Stopped:
            return []
        except OSError as error:
            problem = UserError(f"data: the samples of the next step cannot be read: {disk_problem(error)}")
            problem.__cause__ = error
            return problem
        except Exception as error:
            return error

    def _backward(self, data: list[Batch]) -> LossMeter:
        """Accumulate the gradients of a step's micro-batches; returns their losses."""
        meter = LossMeter(self.device)
        for batch in data:
            loss = self.engine.forward(lambda batch=batch: self.objective.micro_step(batch, meter))  # type: ignore[misc]
            self.engine.backward(loss)
            beat()
            if self.config.method.has_matching:  # a second backward: each of them reads the selection of one adapter
                self.engine.backward(self.engine.forward(lambda: self.objective.fake_step(meter)))
                beat()
        return meter

    def _finish_step(
        self, meter: LossMeter, data: list[Batch], upcoming: list[Batch] | Exception, began: float
    ) -> dict[str, Any]:
        """From the gradients to the row of metrics: the ranks exchange their status, then apply or skip the step."""
        train, progress = self.config.train, self.progress
        bad, grad_norm = self._exchange_status(meter, self.engine.reduce(), data, upcoming)
        losses = meter.compute()
        lr = learning_rate(train, progress.step)
        first_sample = progress.samples
        progress.step += 1
        progress.samples += train.global_batch_size
        skipped = self.state.guard.judge(progress.step, meter.regression(), grad_norm)
        averages: dict[str, Any] = {}
        if skipped is None:
            self.engine.step(lr)
            progress.updates += 1
            averages = self._update_averages()
        else:
            self.engine.skip()
        seconds = time.perf_counter() - began
        progress.seconds += seconds
        row: dict[str, Any] = {
            "step": progress.step,
            **losses,
            "grad_norm": grad_norm,
            "lr": lr,
            "samples": progress.samples,
            "seconds": round(progress.seconds, 4),
            "samples_per_second": round(train.global_batch_size / seconds, 3),
            **averages,
        }
        if skipped is not None:
            ids = list(range(first_sample, progress.samples))
            row |= {"skipped": skipped, "sample_ids": ids, "suspects": self._suspects(meter)}
        if bad:
            row["bad_samples"] = bad
            self.data_error = self.data_error or self._too_many_invalid()
        return row

    def _update_averages(self) -> dict[str, Any]:
        """Update both EMAs, and restart them if it is due; returns the entries for the row of metrics."""
        self.emas.update()
        due, ratio = restart_due(self.emas, self.progress.updates, self.world.sum_, self.engine.ema_share)
        if due:
            self.emas.restart()
        self.engine.after_ema_update()
        return ({} if ratio is None else {"ema_lag_ratio": ratio}) | ({"ema_restart": True} if due else {})

    def _exchange_status(
        self, meter: LossMeter, norm: Tensor, data: list[Batch], upcoming: list[Batch] | Exception
    ) -> tuple[list[str], float]:
        """Exchange losses, stop requests, invalid samples and missing data in one all-reduce of some 300 bytes.

        This is the only place of a step where the host waits for the device.

        Returns:
            why samples of this step were invalid, of all ranks; and the gradient norm.
        """
        bad = [reason for batch in data for reason in batch.bad]
        own = [*(self.stop.signal == number for number in SIGNALS), len(bad), isinstance(upcoming, Exception)]
        status = to_device(torch.tensor(own, dtype=meter.sums.dtype), meter.sums.device)
        total = self.world.sum_(torch.cat([meter.sums.flatten(), status]))
        sums, status = total.split([meter.sums.numel(), len(own)])
        losses, (*requested, bad_samples, failed), (grad_norm,) = self._sources.read_back(sums, status, norm)
        meter.sums = torch.tensor(losses, dtype=meter.sums.dtype).view(meter.sums.shape)
        self.stopping = next((number for number, count in zip(SIGNALS, requested, strict=True) if count), None)
        if failed:
            try:
                self.world.agree(upcoming if isinstance(upcoming, Exception) else None)
            except Exception as error:
                self.data_error = error
        if bad_samples:
            bad = [reason for rank in self.world.gather(bad) for reason in rank]
            self.progress.bad_samples += len(bad)
        return bad, grad_norm

    def _too_many_invalid(self) -> UserError | None:
        """The error that stops the run if more samples of these data were invalid than the recipe tolerates."""
        limit, bad = self.config.data.max_bad_fraction, self.progress.bad_samples
        samples = self.progress.samples - self.progress.data_start
        if limit == 0 or bad <= limit * max(samples, _MIN_SAMPLES):  # with 0 the loader raises
            return None
        return agreed_error(
            f"data: {bad} of {samples} samples were invalid, more than data.max_bad_fraction={limit} tolerates; "
            f"{self.run_dir / 'incidents.jsonl'} lists them. Check the data with `scfm data validate`, or raise the limit"
        )

    def _suspects(self, meter: LossMeter) -> list[int]:
        """Samples that may have caused a skipped step: those whose loss is not finite, else the four with the largest losses."""
        rows = sorted((row for rank in self.world.gather(meter.by_sample()) for row in rank), key=lambda row: row[0])
        bad = [sample for sample, loss in rows if not math.isfinite(loss)]
        return bad or [sample for sample, _ in sorted(rows, key=lambda row: -row[1])[:4]]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
