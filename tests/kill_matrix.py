"""Each long command, ended at random moments by signals, a full disk and a closed pipe: what is lost, and does it go on?

    python tests/kill_matrix.py                                   # all: some 10 minutes on two idle cores; root, for full disks
    python tests/kill_matrix.py --commands train encode --kinds SIGKILL --moments 10 --seed 1

A row is one start that is ended, and the same command again. `same` means: the result is that of a start without a fault.
Commands are forked from a server that has imported everything, so a moment is one of the work and not of the imports.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from recipes.cli import command as scfm
from scfm_core.models.weights import adapter_files
from scfm_core.train.history import read_metrics
from scfm_core.train.run_dir import newest_complete, step_of

CONTEXT = multiprocessing.get_context("forkserver")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL")
KINDS = (*SIGNALS, "full disk", "closed pipe")
LIMIT = 300.0
"""Seconds for one start."""
_DISK_MB = 64


def _adapter(folder: Path) -> str | None:
    """Of an adapter's tensors: the header has the date of its checkpoint."""
    for path in adapter_files(folder):
        tensors = load_file(path)
        return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
    return None


def _manifest(folder: Path) -> Any:
    """Names, samples and sizes of the shards; None if the data set is not finished."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    return [(shard["name"], shard["samples"], shard["sizes"]) for shard in json.loads(path.read_text())["shards"]]


def _kept_shards(folder: Path) -> str:
    return f"{len(list(folder.glob('*.tar')))} shards{', finished' if _manifest(folder) else ''}"


def _kept_steps(run_dir: Path) -> str:
    rows, newest = read_metrics(run_dir / "metrics.jsonl"), newest_complete(run_dir)
    return f"step {step_of(newest) if newest else 0} of {rows[-1]['step'] if rows else 0}"


def _figures(run_dir: Path) -> Any:
    path = run_dir / "evaluation.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return {k: {n: {f: v for f, v in row.items() if f != "seconds_per_image"} for n, row in rows.items()} for k, rows in found.items()}  # fmt: skip


def _images(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("samples/*/[0-9]*.png"))]


def _study(folder: Path) -> Any:
    path = folder / "study.json"
    return json.loads(path.read_text())["values"] if path.is_file() else None


@dataclass(frozen=True)
class Command:
    """A command of the matrix; OUT in its words is its folder."""

    words: str
    result: Callable[[Path], Any]
    """What must be equal to the result of a start without a fault; None: not finished."""
    kept: Callable[[Path], str]
    """What is there after the fault."""
    needs_run: bool = False
    """OUT is a finished run."""


_CACHE = "--model TINY/flux --text-length 8 --resolution 16 16 --dtype float32 --batch-size 4 --samples-per-shard 8"
COMMANDS = {
    "train": Command(
        "train WORK/recipe.yaml train.steps=40 checkpoint.every=10 run.dir=OUT",
        lambda folder: _adapter(folder / "adapter"),
        _kept_steps,
    ),
    "encode": Command(f"data encode TINY/digits -o OUT {_CACHE}", _manifest, _kept_shards),
    "generate": Command(
        f"data generate WORK/prompts.txt -o OUT {_CACHE} --per-prompt 12 --steps 8", _manifest, _kept_shards
    ),
    "pack": Command("data pack TINY/cache -o OUT --to webdataset --samples-per-shard 4", _manifest, _kept_shards),
    "evaluate": Command(
        "evaluate OUT", _figures, lambda folder: "all figures" if _figures(folder) else f"{len(list(folder.glob('.evaluation/[sb]*')))} figures", needs_run=True
    ),
    "sample": Command(
        "sample OUT --steps 2 --prompts WORK/prompts.txt --per-prompt 40 --layout flat",
        lambda folder: images if len(images := _images(folder)) == 160 else None,
        lambda folder: f"{len(_images(folder))} of 160 images", needs_run=True,
    ),
    "export": Command(
        "export OUT",
        lambda folder: _adapter(folder / "adapter"),
        lambda folder: "the adapter" if (folder / "adapter" / "README.md").is_file() else "none",
        needs_run=True,
    ),
    "study": Command(
        "study WORK/study.yaml -o OUT", _study, lambda folder: f"{len(list(folder.glob('*/*/evaluation.json')))} of 2 runs"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One cell of the matrix at one moment."""

    command: str
    kind: str
    moment: float
    """Seconds after the start."""
    code: int | None
    kept: str
    again: int | None
    """Exit code of the second start; None if the first one was finished already."""
    is_same: bool
    left: str
    """Temporary files that remain at the end."""

    def __str__(self) -> str:
        verdict = "same" if self.is_same else "OTHER RESULT" if not self.again else "DOES NOT GO ON"
        again = "finished" if self.again is None else f"again: exit {self.again}"
        left = f"  left: {self.left}" if self.left else ""
        return (
            f"{self.command:9} {self.kind:12} {self.moment:6.2f} s  exit {self.code!s:>4}  kept: {self.kept:24} "
            f"{again}, {verdict}{left}"
        )

    @property
    def is_right(self) -> bool:
        return not self.again and self.is_same and not self.left


class Matrix:
    """Runs the cells.

    Args:
        tiny: what `tiny_fixtures.write_tiny` writes.
        work: an empty folder.
        seed: of the moments.
    """

    def __init__(self, tiny: Path, work: Path, seed: int = 0) -> None:
        self.tiny, self.work, self._random = tiny, work, random.Random(seed)
        self._references: dict[str, tuple[float, Any]] = {}
        first = CONTEXT.Process(target=abs, args=(1,))  # the server imports everything before the first process starts
        first.start()
        first.join()
        recipe = {
            "run": {"dir": str(work / "finished"), "device": "cpu"},
            "model": {"path": str(tiny / "flux"), "text_length": 8},
            "data": {"path": str(tiny / "cache"), "resolution": [16, 16], "num_workers": 1},
            "method": {"self_grids": [16, 8, 4, 2]},
            "lora": {"rank": 4, "alpha": 4.0, "targets": r".*attn\.to_[qv]"},
            "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 8, "lr": 1e-3, "compute_dtype": "float32"},
            "checkpoint": {"every": 2},
            "sample": {"every": 0, "shift": 3.0},
            "evaluate": {"samples": 16, "batch_size": 16, "steps": [1, 3], "teacher_steps": 4, "features": "classifier",
                         "features_path": str(tiny / "classifier")},
            "wandb": {"mode": "disabled"},
        }  # fmt: skip
        (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (work / "prompts.txt").write_text("one\ntwo\nthree\nfour\n")
        arms = {name: {"about": name, "set": [f"train.lr={lr}"]} for name, lr in (("a", 1e-3), ("b", 1e-4))}
        (work / "study.yaml").write_text(
            yaml.safe_dump({"recipe": str(work / "recipe.yaml"), "seeds": [0], "arms": arms})
        )

    def row(self, name: str, kind: str) -> Row:
        """End one start of the command at a random moment, and start it again."""
        command, (seconds, expected) = COMMANDS[name], self._reference(name)
        moment = self._random.uniform(0, 0.8 * seconds)  # on a loaded machine no start is as long as the first
        with self._folder(command, on_small_disk=kind == "full disk") as folder:
            code = self._start(command, folder, kind, moment)
            kept = command.kept(folder)
            again = None if command.result(folder) == expected else self._start(command, folder)
            found = command.result(folder)
            left = ", ".join(
                sorted(path.name for path in folder.rglob("*") if path.name.endswith(".tmp") or ".tmp." in path.name)
            )
            return Row(name, kind, moment, code, kept, again, found is not None and found == expected, left)

    def _reference(self, name: str) -> tuple[float, Any]:
        """Seconds and result of a start without a fault."""
        if name not in self._references:
            command = COMMANDS[name]
            with self._folder(command) as folder:
                began = time.monotonic()
                code = self._start(command, folder)
                seconds, result = time.monotonic() - began, command.result(folder)
                assert code == 0 and result is not None, f"{name} does not work without a fault: {self._output()}"
            self._references[name] = seconds, result
        return self._references[name]

    @contextlib.contextmanager
    def _folder(self, command: Command, *, on_small_disk: bool = False) -> Iterator[Path]:
        place = Path(tempfile.mkdtemp(dir=self.work))
        try:
            if on_small_disk:
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "none", place], check=True)
            folder = place / "out"
            if command.needs_run:
                finished = self.work / "finished"
                if not finished.exists():
                    code = self._start(Command("train WORK/recipe.yaml", lambda folder: None, str), finished)
                    assert code == 0, self._output()
                    shutil.rmtree(finished / "adapter")
                shutil.copytree(finished, folder)
            yield folder
        finally:
            if on_small_disk:
                subprocess.run(["umount", place], check=True)
            shutil.rmtree(place)

    def _start(self, command: Command, folder: Path, kind: str | None = None, moment: float = 0.0) -> int | None:
        """Run the command to its end, with a fault after `moment` seconds; returns its exit code, None if it hangs."""
        places = {"OUT": folder, "WORK": self.work, "TINY": self.tiny}
        words = command.words
        for name, path in places.items():
            words = words.replace(name, str(path))
        fault, ended, reader, writer = kind, LIMIT, None, None
        if kind == "closed pipe":
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
        process = CONTEXT.Process(
            target=_child, args=(words.split(), self.work / "output.txt", self._fd(writer)), daemon=False
        )
        process.start()
        if writer is not None:
            os.close(writer)
        if fault is not None:
            process.join(moment)
            if reader is not None:
                os.close(reader)
            elif fault == "full disk":
                _fill(folder.parent)
            elif process.is_alive() and process.pid is not None:
                os.kill(process.pid, getattr(signal, fault))
        process.join(ended)
        if hangs := process.is_alive():
            process.kill()
            process.join()
        (folder.parent / "filler").unlink(missing_ok=True)
        return None if hangs else process.exitcode

    @staticmethod
    def _fd(writer: int | None) -> Any:
        return None if writer is None else multiprocessing.reduction.DupFd(writer)

    def _output(self) -> str:
        return (self.work / "output.txt").read_text()[-2000:]


def _child(words: list[str], output: Path, pipe: Any) -> None:
    """In a process of its own: run `scfm`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):  # this script may run under nohup
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if pipe is None else pipe.detach()
    for stream in (1, 2):
        os.dup2(target, stream)
    os.close(target)
    sys.argv = ["scfm", *words]
    scfm()


def _fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def main(argv: list[str] | None = None) -> int:
    """Print the matrix; 1 if a command does not go on, has another result, or leaves temporary files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--moments", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if "full disk" in arguments.kinds and "SCFM_OWN_MOUNTS" not in os.environ:
        if os.getuid() != 0:
            parser.error("full disks need root; choose --kinds without them")
        environment = os.environ | {"SCFM_OWN_MOUNTS": "1"}
        os.execvpe("unshare", ["unshare", "-m", sys.executable, *sys.argv], environment)
    with tempfile.TemporaryDirectory(prefix="kill-matrix-") as folder:
        CONTEXT.set_forkserver_preload(
            [
                "diffusers.models.transformers",
                "data_tools.encode",
                "data_tools.generate",
                "data_tools.pack",
                "recipes.cli",
                "recipes.train",
                "recipes.evaluate",
                "recipes.export",
                "recipes.study",
            ]
        )
        sys.path.append(str(Path(__file__).with_name("distributed")))  # as in the tests
        from tiny_fixtures import write_tiny

        tiny, work = Path(folder) / "tiny", Path(folder) / "work"
        tiny.mkdir()
        work.mkdir()
        matrix, rows = Matrix(write_tiny(tiny), work, arguments.seed), []
        for name in arguments.commands:
            for kind in arguments.kinds:
                for _ in range(arguments.moments):
                    rows.append(matrix.row(name, kind))
                    print(rows[-1], flush=True)
    wrong = sum(not row.is_right for row in rows)
    print(f"{len(rows)} starts were ended; {wrong} do not go on, have another result, or leave temporary files")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
