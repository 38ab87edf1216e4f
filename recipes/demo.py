"""`make demo`: from nothing to three distilled tiny Flux models, by the commands that a person would type.

python -m recipes.demo [--dir runs/demo] [--only assets|teacher]

The demo is a list of parts. A few processes take them, in the order of the list, as soon as what a part needs is there. Each
part writes into a log of its own. The same command again skips what is complete and continues what was stopped.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import cast

import torch

from recipes.cli import main as scfm
from recipes.figures import read_evaluation
from recipes.tiny import DIGITS, SIZE, caption, write_classifier, write_digits, write_pipeline
from scfm_core.errors import UserError
from scfm_core.wording import number

_LANES = 3
"""Parts at a time, at most. Three trainings side by side use their cores better than one training with as many threads."""
_THREADS = 4
"""Of a part, at most: the tensors are too small for more."""
_TEACHER = ("train.steps=1500", "train.lr=4e-3", "sample.weights=student")
"""Half of the steps of the recipe, at twice its rate. The slow average of so short a run would be far behind its student."""
_STUDENT = ("train.steps=600",)
"""Two thirds of the steps of the recipes."""
_PAIRS = ("train.lr=2e-3",)
"""Both runs on pairs: twice the rate of the recipe, for fewer steps."""
_PAPER = ("method.step_gain=none", "ema.restart_every=none")
_STEP_SCALED = ("ema.slow=0.998",)
"""Half of the recipe's horizon: the averages restart early enough for one step to be learned."""
_RUNS = {"paper_recipe": "paper's recipe", "distill": "step-scaled", "trajectories": "stored paths"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something to be done by one process."""

    name: str
    """Of its log; `needs` refers to it."""
    about: str
    """What the terminal says when it begins."""
    call: Callable[..., int]
    """Does it; an exit code."""
    arguments: tuple[object, ...]
    needs: tuple[str, ...] = ()
    """Parts that must be complete before."""
    threads: int = 1


def main() -> None:
    """Make what is missing, train, sample, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--only",
        choices=("assets", "teacher"),
        help="make digits, tiny pipeline and caches alone, or these and the teacher of the studies: all steps of its recipe, "
        "where the demo's own teacher has half of them",
    )
    parser.add_argument("--vae-steps", type=int, default=300)
    parser.add_argument("--paths-per-prompt", type=int, default=720, help="stored paths of the teacher (default 720)")
    parser.add_argument(
        "--pixels",
        action="store_true",
        help="a model of the 8 x 8 scans themselves, without a VAE (give another --dir)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="for all trainings, e.g. train.steps=20 train.warmup_steps=0",
    )
    arguments = parser.parse_args()
    began, root = time.perf_counter(), arguments.dir
    threads = min(_THREADS, torch.get_num_threads())
    lanes = min(_LANES, threads)
    size = 8 if arguments.pixels else SIZE
    parts = [
        Part(
            name="assets",
            about="digits, a tiny Flux pipeline of the real classes, a digit classifier",
            call=make_assets,
            arguments=(root, None if arguments.pixels else arguments.vae_steps, size),
            threads=threads,
        )
    ]
    if arguments.only == "teacher":
        parts += teacher_parts(root, "pretrain", "teacher", size, threads, arguments.overrides)
    elif arguments.only is None:
        parts += teacher_parts(
            root, "short_pretrain", "short_teacher", size, threads, [*_TEACHER, *arguments.overrides]
        )
        parts += student_parts(root, size, arguments.paths_per_prompt, threads // lanes, arguments.overrides)
    code = run_parts(parts, root / "logs", lanes)
    if code:
        raise SystemExit(code)
    minutes = (time.perf_counter() - began) / 60
    print(f"done in {minutes:.1f} minutes")
    if arguments.only is None:
        _summary(root)


def teacher_parts(root: Path, run: str, name: str, size: int, threads: int, overrides: list[str]) -> list[Part]:
    """Flow matching from scratch, and the model as a pipeline in `root / name`."""
    words = ["train", "tiny_pretrain.yaml", f"run.dir={root / run}", f"model.path={root / 'tiny_flux'}"]
    return [
        Part(
            name=run,
            about="the teacher: flow matching on the digits, from scratch",
            call=_scfm,
            arguments=(*words, *_data(root, size), *overrides),
            needs=("assets",),
            threads=threads,
        ),
        Part(
            name=name,
            about="the teacher as a pipeline of diffusers",
            call=_scfm_unless,
            arguments=(root / name, "export", root / run, "--merged", root / name),  # it appears when it is complete
            needs=(run,),
            threads=threads,
        ),
    ]


def student_parts(root: Path, size: int, paths_per_prompt: int, threads: int, overrides: list[str]) -> list[Part]:
    """Three students of one teacher, what they are worth, and a page about them."""
    teacher, stored = root / "short_teacher", root / "short_paths"
    common = (f"model.path={teacher}", f"evaluate.features_path={root / 'classifier'}", *_data(root, size), *_STUDENT)

    def part(name: str, about: str, call: Callable[..., int], *arguments: object, needs: tuple[str, ...] = ()) -> Part:
        return Part(
            name=name, about=about, call=call, arguments=arguments, needs=("short_teacher", *needs), threads=threads
        )

    def training(run: str, recipe: str, *extra: str, needs: tuple[str, ...] = ()) -> Part:
        about = f"{_RUNS[run]}: training"
        words = ("train", recipe, f"run.dir={root / run}", *common, *extra, *overrides)
        return part(run, about, _scfm, *words, needs=needs)

    def evaluation(run: str, needs: tuple[str, ...] = ()) -> Part:
        # All have the same prompts and real digits, and the images of the teacher that the first of them makes.
        words = (f"data.path={root / 'digits_cache'}", f"evaluate.keep={root / 'short_teacher_images'}")
        about = f"{_RUNS[run]}: images at each step count, compared with the teacher's"
        return part(f"evaluate_{run}", about, _evaluate, root / run, *words, needs=(run, *needs))

    paths = (
        "data", "generate", root / "prompts.txt", "--output", stored, "--model", teacher, "--trajectories",
        "--per-prompt", paths_per_prompt, *_cached(size), "--batch-size", 100, "--shift", 3,
    )  # fmt: skip
    best = root / "trajectories"
    return [
        # At once if it has them, and refuses those of another teacher.
        part("short_paths", "stored paths: the teacher's, from noise to images", _scfm, *paths),
        training("paper_recipe", "tiny_distill.yaml", *_PAIRS, *_PAPER),
        training("distill", "tiny_distill.yaml", *_PAIRS, *_STEP_SCALED),
        training("trajectories", "tiny_trajectories.yaml", f"data.path={stored}", needs=("short_paths",)),
        evaluation("distill"),
        evaluation("paper_recipe", needs=("evaluate_distill",)),
        evaluation("trajectories", needs=("evaluate_distill",)),
        part("samples", "stored paths: images at 1, 2, 3 and 4 steps", _samples, best, needs=("trajectories",)),
        part(
            "report", "the report", _scfm, "report", best, "--compare", root / "distill", "--compare", root / "paper_recipe",
            needs=tuple(f"evaluate_{run}" for run in _RUNS),
        ),
    ]  # fmt: skip


def make_assets(root: Path, vae_steps: int | None, size: int = SIZE) -> int:
    """Digits, tiny pipeline, classifier, caches of all digits and of ten, prompts in `root`; what is complete stays."""
    if not (root / "classifier.json").is_file():
        for name in ("digits", "tiny_flux", "classifier", "digits_cache", "digits_10", "digits_10_cache"):
            shutil.rmtree(root / name, ignore_errors=True)
        write_digits(root / "digits", size=size)
        write_digits(root / "digits_10", count=10, size=size)
        (root / "prompts.txt").write_text("".join(f"{caption(digit)}\n" for digit in range(10)), encoding="utf-8")
        write_pipeline(root / "tiny_flux", vae_steps=vae_steps)
        accuracy = write_classifier(root / "classifier")
        print(f"the classifier reads {accuracy:.1%} of held-out digits")
        (root / "classifier.json").write_text(json.dumps({"accuracy": accuracy}) + "\n", encoding="utf-8")
    for name in ("digits", "digits_10"):
        if not (root / f"{name}_cache" / "manifest.json").is_file():
            code = _scfm(
                "data", "encode", root / name, "--output", root / f"{name}_cache", "--model", root / "tiny_flux",
                *_cached(size), "--batch-size", 64,
            )  # fmt: skip
            if code:
                return code
    return 0


def _data(root: Path, size: int) -> tuple[str, str]:
    return f"data.path={root / 'digits_cache'}", f"data.resolution=[{size},{size}]"


def _cached(size: int) -> tuple[object, ...]:
    """How texts and latents are stored."""
    return "--resolution", size, size, "--text-length", 8, "--dtype", "float32"


def _scfm(*words: object) -> int:
    command = [str(word) for word in words]
    print(f"\n$ scfm {' '.join(command)}", flush=True)
    return scfm(command)


def _scfm_unless(product: Path, *words: object) -> int:
    return 0 if product.exists() else _scfm(*words)


def _evaluate(run_dir: Path, *overrides: str) -> int:
    """Unless the run was evaluated with these very settings before."""
    from scfm_core.train.parse import dump_config, with_absolute_paths
    from scfm_core.train.runs import open_run

    before = run_dir / "evaluation.yaml"
    is_there = False
    with contextlib.suppress(UserError):  # a damaged evaluation is made again
        is_there = before.is_file() and read_evaluation(run_dir / "evaluation.json") is not None
    if is_there and before.read_text(encoding="utf-8").endswith(
        dump_config(with_absolute_paths(open_run(run_dir, list(overrides))))
    ):
        return 0
    return _scfm("evaluate", run_dir, *overrides)


def _samples(run_dir: Path) -> int:
    folders = {steps: run_dir / "samples" / f"{steps}_steps" for steps in (1, 2, 3, 4)}
    missing = [steps for steps, folder in folders.items() if len(list(folder.glob("*.png"))) < len(DIGITS)]
    codes = (_scfm("sample", run_dir, "--steps", steps) for steps in missing)
    return next((code for code in codes if code), 0)


class _Worker:
    """A process that does one part after another, and imports everything once."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # autograd's threads do not survive a fork
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,))
        self._process.start()
        theirs.close()  # so that the death of either process ends the pipe

    def begin(self, part: Part, log: Path) -> None:
        """Do `part`; `pipe` can be read when it is done."""
        self.pipe.send((part, log))

    def result(self) -> int:
        """The exit code of the part."""
        try:
            return int(self.pipe.recv())
        except EOFError:  # killed
            return 1

    def end(self, *, is_busy: bool) -> None:
        """Stop, within a part if it `is_busy`: a training saves a checkpoint first."""
        self.pipe.close()
        if is_busy:
            self._process.terminate()
        self._process.join()


def _work(pipe: Connection) -> None:
    """The life of a worker. Ctrl-C reaches it as it reaches the demo itself; only a part may be interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cast(io.TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)
    with contextlib.suppress(EOFError, OSError):  # the demo was killed
        while True:
            part, log = pipe.recv()
            with log.open("a", encoding="utf-8") as file:
                os.dup2(file.fileno(), sys.stdout.fileno())
                os.dup2(file.fileno(), sys.stderr.fileno())
            torch.set_num_threads(part.threads)
            pipe.send(_code_of(part))


def _code_of(part: Part) -> int:
    previous = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return part.call(*part.arguments)
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        sys.stdout.flush()
        sys.stderr.flush()


def run_parts(parts: list[Part], logs: Path, lanes: int) -> int:
    """Do all parts, at most `lanes` at a time; each writes to `logs / NAME.log`.

    Returns:
        0, or the exit code of the first part that failed or was stopped; the others are stopped too.
    """
    logs.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    waiting, complete = list(parts), set[str]()
    workers: list[_Worker] = []
    running: dict[_Worker, Part] = {}
    interrupt = signal.getsignal(signal.SIGINT)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"{len(parts)} parts, at most {lanes} at a time; their output is in {logs}", flush=True)
    try:
        while waiting or running:
            ready = [part for part in waiting if complete.issuperset(part.needs)]
            for part in ready[: lanes - len(running)]:
                worker = next((worker for worker in workers if worker not in running), None)
                if worker is None:
                    workers.append(worker := _Worker())
                seconds = int(time.perf_counter() - began)
                number = len(parts) - len(waiting) + 1
                print(f"{seconds // 60:3}:{seconds % 60:02}  {number:2}/{len(parts)}  {part.about}", flush=True)
                waiting.remove(part)
                running[worker] = part
                worker.begin(part, logs / f"{part.name}.log")
            wait([worker.pipe for worker in running])
            for worker, part in list(running.items()):
                if not worker.pipe.poll():
                    continue
                del running[worker]
                if code := worker.result():
                    print(_failure(part, logs / f"{part.name}.log", code), file=sys.stderr)
                    return code
                complete.add(part.name)
    except KeyboardInterrupt:
        # The workers get a second Ctrl-C too, and stop at once; this process waits for them.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("\nstopping; the same command continues from here", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        for worker in workers:
            worker.end(is_busy=worker in running)
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, previous)
    return 0


def _failure(part: Part, log: Path, code: int) -> str:
    if code > 128:
        return "stopped; the same command continues from here"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:] if log.is_file() else []
    return "\n".join([f"this part failed: {part.about}. The end of {log}:", *(f"    {line}" for line in lines)])


def _summary(root: Path) -> None:
    results = [read_evaluation(root / run / "evaluation.json") or {} for run in _RUNS]
    values = [results[0]["base"], *(result["student"] for result in results)]
    print("\nFrechet distance to the teacher's own 32-step samples")
    print(f"{'steps':>8}" + "".join(f"{title:>16}" for title in ("undistilled", *_RUNS.values())))
    for steps in values[0]:
        print(f"{steps:>8}" + "".join(f"{number(rows[steps]['fid_teacher']):>16}" for rows in values))
    best = root / "trajectories"
    print(f"\nlook at:\n  {best / 'report.html'}\n  {best / 'samples' / 'evaluation.png'}")


if __name__ == "__main__":
    main()
