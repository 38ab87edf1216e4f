"""`scfm play`: the models of a page to play with, and what its visitors may ask of them. The page is in `play_page.py`."""

import io
import queue
import secrets
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recipes.image_files import save_image
from recipes.play_checks import Ask, checked_prompt, checked_seed, checked_size, is_number
from recipes.sample import file_name, origin
from scfm_core.api import AdapterModel, FewStepModel, RunModel, load
from scfm_core.errors import UserError
from scfm_core.models.encoders import load_tokenizer
from scfm_core.models.fused_base import adapter_file
from scfm_core.models.student import FullModel
from scfm_core.train.config import RunConfig
from scfm_core.train.prompts import read_prompts

_KEPT_BYTES = 256 * 2**20
"""PNG files that are kept for the pages that show them."""


@dataclass(frozen=True)
class Picture:
    """An image that was made."""

    id: str
    """Part of its address, which nobody can guess."""
    png: bytes = field(repr=False)
    """The file, with `settings` in its metadata."""
    settings: dict[str, Any]
    seconds: float
    """Text encoder, network and VAE, without the wait for other visitors."""

    @property
    def address(self) -> str:
        """Relative to the page's."""
        return f"images/{self.id}/{self.name}"

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{file_name(self.settings)}_{self.settings['steps']}steps.png"


class Stopped(Exception):
    """Nobody waits for the images of a job any more."""


class Job:
    """What a visitor waits for, image by image. It can be stopped from other threads."""

    def __init__(self) -> None:
        self._lock, self._is_stopped = threading.Lock(), False
        self._future: Future[Any] = Future()

    def check(self) -> None:
        """Raise `Stopped` if it was stopped. Called before each step of an image."""
        if self._is_stopped:
            raise Stopped

    def wait(self, future: Future[Any]) -> Any:
        """The result of a future; `Stopped` as soon as the job is stopped."""
        with self._lock:
            self._future = future
            if self._is_stopped:
                _fail(future, Stopped())
        return future.result()

    def stop(self) -> None:
        """End the wait, and the image that is being made at its next step."""
        with self._lock:
            self._is_stopped = True
            _fail(self._future, Stopped())


class Entry:
    """A run or an adapter that visitors can choose."""

    def __init__(self, path: Path, overrides: Sequence[str] = (), base: str | None = None) -> None:
        if (path / "config.yaml").is_file():
            words = [*overrides, *([] if base is None else [f"model.path={base}"])]
            self.model: FewStepModel = load(path, overrides=words)
        else:
            self.model = load(path, base=base)
        self.name = path.absolute().name
        model = self.model
        if isinstance(model, RunModel):
            config = model.config
            self.origin = origin(path, config)
            self.text_length = config.model.text_length
            self.has_strength = config.train.weights != "full"
            self.has_teacher = not isinstance(model.model, FullModel) or "teacher" in model.model.networks
            self.prompt = _first_prompt(config)
        elif isinstance(model, AdapterModel):
            self.name, found = adapter_file(path).stem, model.base
            self.origin = {"model": Path(found).name if Path(found).is_dir() else found, "adapter": self.name}
            self.text_length = model.header.text_length
            self.has_strength = self.has_teacher = True
            self.prompt = ""
        self._tokenizer = load_tokenizer(model.family)

    @property
    def first_steps(self) -> int:
        """The step count of a new page."""
        return self.folded_steps or 4

    @property
    def folded_steps(self) -> int | None:
        """The only step count of an adapter that was exported for one."""
        return self.model.header.folded_steps if isinstance(self.model, AdapterModel) else None

    @property
    def usual(self) -> dict[str, Any]:
        """Settings of the training, for `first_steps` steps."""
        return self.model.settings(steps=self.first_steps)

    def strength(self, steps: int) -> float:
        """Of the adapter, for a step count."""
        return float(self.model.settings(steps=steps)["strength"])

    def facts(self) -> dict[str, str]:
        """What the images come from, for people."""
        usual, model, rows = self.usual, self.model, {}
        shift: float | str
        if isinstance(model, RunModel):
            config = model.config
            rows["Run"] = f"{self.name}, {self.origin['checkpoint']}, weights {self.origin['weights']}"
            lora = config.lora
            rows["Adapter"] = (
                f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}" if self.has_strength else "none: full weights"
            )
            rows["Fused into the base"] = ", ".join(
                f"{name} ({weight:g})" for name, weight in self.origin["adapters"].items()
            )
            gain = config.method.step_gain
            gamma, shift = (gain.gamma if gain else None), config.sample.shift
            device = str(next(next(iter(model.model.networks.values())).parameters()).device)
        else:
            assert isinstance(model, AdapterModel)
            rows["Adapter"] = self.name
            gamma, shift, device = model.header.step_gain_gamma, model.header.shift, str(model.pipe.device)
            if model.header.folded_steps is not None:
                rows["Folded for"], gamma = f"{model.header.folded_steps} steps", None
        rows["Base model"] = str(self.origin["model"])
        rows["Strength"] = "1 for every step count" if gamma is None else f"1 / steps^{gamma:g}"
        rows["Shift"] = str(shift) if isinstance(shift, str) else f"{shift:g}"
        if model.family.has_guidance:
            rows["Guidance"] = f"{usual['guidance']:g}"
        rows["Size"] = f"{usual['width']} x {usual['height']}, sides are multiples of {model.family.pixel_multiple}"
        rows["Text"] = f"the first {self.text_length} tokens of the prompt"
        rows["Device"] = device
        return {name: text for name, text in rows.items() if text}

    def tokens(self, prompt: str) -> int:
        """Number of tokens of a prompt."""
        return self.model.family.count_tokens(self._tokenizer, [prompt])[0]


class Player:
    """The models, one thread that uses them, and the images that were made."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        self._worker = _Worker()
        self._by_settings: OrderedDict[tuple[Any, ...], Picture] = OrderedDict()
        self._by_id: dict[str, Picture] = {}
        self._jobs: dict[tuple[str | None, str], Job] = {}
        self._lock = threading.Lock()

    @contextmanager
    def job(self, session: str | None, tab: str) -> Iterator[Job]:
        """A visitor's job of a tab. It stops the job before it: a visitor has one in each tab."""
        job, key = Job(), (session, tab)
        with self._lock:
            before, self._jobs[key] = self._jobs.get(key), job
        if before is not None:
            before.stop()
        try:
            yield job
        finally:
            job.stop()
            with self._lock:
                if self._jobs[key] is job:
                    del self._jobs[key]

    def leave(self, session: str | None) -> None:
        """Stop the jobs of a visitor who has closed the page."""
        with self._lock:
            jobs = [job for (own, _), job in self._jobs.items() if own == session]
        for job in jobs:
            job.stop()

    def check(
        self,
        entry: Entry,
        prompt: Any,
        seed: Any,
        *,
        strength: Any = None,
        guidance: Any = None,
        height: Any = None,
        width: Any = None,
    ) -> Ask:
        """What a visitor wrote into the page.

        Raises:
            UserError: with a message for the visitor.
        """
        usual = entry.usual
        (text, notes), number = checked_prompt(prompt), checked_seed(seed)
        size = checked_size(height, width, usual)
        entry.model.family.latent_shape(*size)
        if strength is not None and not (is_number(strength) and abs(strength) <= 10):
            raise UserError(f"The strength must be a number from -10 to 10, got {str(strength)[:20]!a}.")
        if guidance is not None and not (is_number(guidance) and 0 <= guidance <= 100):
            raise UserError(f"The guidance must be a number from 0 to 100, got {str(guidance)[:20]!a}.")
        count = self._worker.call(lambda: entry.tokens(text))
        if count > entry.text_length:
            notes = (*notes, f"The prompt has {count} tokens. The model reads the first {entry.text_length}.")
        return Ask(
            prompt=text,
            seed=number,
            strength=strength if entry.has_strength else None,
            guidance=None if guidance == usual["guidance"] else guidance,
            height=size[0],
            width=size[1],
            notes=notes,
        )

    def picture(self, entry: Entry, ask: Ask, steps: int, job: Job, *, undistilled: bool = False) -> Picture:
        """Make an image, or take one that was made with these settings. Visitors take turns, image by image.

        Raises:
            UserError: with a message for the visitor.
            Stopped: if the job was stopped.
        """
        settings = entry.model.settings(
            steps=steps,
            guidance=ask.guidance,
            height=ask.height,
            width=ask.width,
            strength=None if undistilled else ask.strength,
            undistilled=undistilled,
        )
        source = {"model": entry.origin["model"], "weights": "teacher"} if undistilled else entry.origin
        settings = settings | source | {"prompt": ask.prompt, "seed": ask.seed}
        key = (self.entries.index(entry), undistilled, repr(settings))
        return self._worker.call(lambda: self._made(key, entry, ask, settings, job, undistilled=undistilled), job)

    def _made(
        self, key: tuple[Any, ...], entry: Entry, ask: Ask, settings: dict[str, Any], job: Job, *, undistilled: bool
    ) -> Picture:
        if key in self._by_settings:
            self._by_settings.move_to_end(key)
            return self._by_settings[key]
        names = ("steps", "guidance", "height", "width")
        chosen = {name: settings[name] for name in names} | ({} if undistilled else {"strength": settings["strength"]})
        start = time.perf_counter()
        [image] = entry.model.sample(
            ask.prompt, seed=ask.seed, undistilled=undistilled, before_step=job.check, **chosen
        )
        seconds = time.perf_counter() - start
        file = io.BytesIO()
        save_image(file, image, settings)
        picture = Picture(secrets.token_urlsafe(16), file.getvalue(), settings, seconds)
        self._by_settings[key] = self._by_id[picture.id] = picture
        while len(self._by_settings) > 1 and sum(len(each.png) for each in self._by_settings.values()) > _KEPT_BYTES:
            _, oldest = self._by_settings.popitem(last=False)
            del self._by_id[oldest.id]
        return picture

    def named(self, name: Any) -> Entry:
        """The entry of a name; None: the first.

        Raises:
            UserError: with a message for the visitor.
        """
        for entry in self.entries:
            if name in (None, entry.name):
                return entry
        raise UserError("This run is not on the page.")

    def find(self, id: str) -> Picture | None:
        """The image of an address."""
        return self._by_id.get(id)

    def warm_up(self) -> None:
        """Make an image of one step with each model: a fault is found here, and the first visitor does not wait for kernels."""
        for entry in self.entries:
            entry.model.sample("a", steps=entry.first_steps, seed=0)

    def stop(self) -> bool:
        """End all waits; returns whether an image is being made."""
        return self._worker.stop()


class _Worker:
    """A thread that uses the models: one image at a time, first come, first served. It ends with the process."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._waiting: set[Future[Any]] = set()
        threading.Thread(target=self._work, daemon=True, name="scfm play").start()

    def call(self, function: Callable[[], Any], job: Job | None = None) -> Any:
        """The result of a function in the thread; `Stopped` as soon as the job is stopped."""
        future: Future[Any] = Future()
        self._waiting.add(future)
        self._tasks.put((future, function))
        try:
            return (job or Job()).wait(future)
        finally:
            self._waiting.discard(future)

    def stop(self) -> bool:
        """Fail all that wait; returns whether there were any."""
        waiting = list(self._waiting)
        for future in waiting:
            _fail(future, UserError("The page was stopped."))
        return bool(waiting)

    def _work(self) -> None:
        while True:
            future, function = self._tasks.get()
            if future.done():
                continue
            try:
                result = function()
            except Exception as error:
                _fail(future, _for_visitors(error))
            else:
                with suppress(InvalidStateError):
                    future.set_result(result)


def _fail(future: Future[Any], error: Exception) -> None:
    """End the wait for a future, unless it has ended."""
    with suppress(InvalidStateError):
        future.set_exception(error)


def _first_prompt(config: RunConfig) -> str:
    with suppress(UserError):  # its file may be missing here
        return next(iter(read_prompts(config.sample.prompts, "sample.prompts")), "")
    return ""


def _for_visitors(error: Exception) -> Exception:
    if isinstance(error, UserError | Stopped):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return UserError("The GPU has too little free memory for this image. Choose a smaller size.")
    traceback.print_exception(error, file=sys.stderr)
    return UserError(
        f"The image could not be made ({type(error).__name__}). The terminal of `scfm play` has the details."
    )
