"""What one GPU can tell in twelve minutes: tests, kernels, the step at true size in four ways, memory, FSDP2. `make gpu` runs it.

    python tests/benchmarks/gpu_day.py [--minutes 12] [--to FOLDER] [--parts NAME,...] [--wheels FOLDER] [--null]

Each part is a process with a time limit; it is killed there, and the rest goes on. Results are on disk as they come: after each change
`RESULTS.md` of the folder gets a new section of today and this GPU, and `gpu/NAME.json` the same with all figures, and the goals.
Time that a part leaves is for those after it. Nothing needs the network; `--wheels` installs the wheels of a folder first
(gpu_wheels.py collects them), into a temporary folder.

Without a GPU, or with `--null`, the same parts run on the null device (tests/null_device): it shows that they run, their launches and
their memory at true size. Nothing is computed there, so there are no results: they go to `runs/gpu_day`, or to the folder of `--to`.
"""

import argparse
import contextlib
import ctypes
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import goals
import tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA_TESTS = (
    "tests/kernels/test_kernels.py",
    "tests/kernels",
    "tests/models/test_fused.py",
    "tests/models/test_graphs.py",
)
"""Tests that use a GPU where there is one, the most telling first: kernels against fp64."""
GRACE = 0.85
"""Share of its limit after which a benchmark begins no further repeat."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A process of the day."""

    name: str
    command: tuple[str, ...]
    """After `python`. `{json}` is the path of its table, `{seconds}` the time it should take."""
    limit: float
    """Seconds after which it is killed."""
    on_cpu: bool = False
    """Needs no GPU: it sees none, and starts with the day, beside the others."""
    tables: tuple[str, ...] = ()
    """Names of further JSON files, which it writes beside its table."""


@dataclass
class Outcome:
    """What became of a part."""

    part: Part
    state: str = "not run"
    """`running`, `done`, `failed (exit 1)`, `stopped after 60 s`, or why it was not run."""
    seconds: float = 0.0
    tail: list[str] = field(default_factory=list)
    """The last lines of its log, if it did not end well."""


def benchmark(name: str, limit: float, *options: str, **more: Any) -> Part:
    """A part that is `bench_NAME.py`."""
    command = (f"tests/benchmarks/bench_{name}.py", "--json", "{json}", "--seconds", "{seconds}", *options)
    return Part(name=name, command=command, limit=limit, **more)


def tests(name: str, limit: float, files: Sequence[str], *options: str) -> Part:
    """A part that is pytest, with a table of the files."""
    return Part(name=name, command=("tests/benchmarks/gpu_tests.py", "{json}", *options, *files), limit=limit)


def parts(null: bool) -> list[Part]:
    """The parts in their order: what tells most comes first. Their limits together are longer than the day."""
    collected = ("--collect-only",) if null else ("-n", str(min(8, os.cpu_count() or 1)))
    slow = 10.0 if null else 1.0  # on two cores, without a GPU
    predict = ("tests/benchmarks/predict.py", "--json", "{json}")
    return [
        Part(name="predict", command=predict, limit=600 * slow, on_cpu=True, tables=("predict_peak",)),
        tests(
            "tests", 110 * slow, CUDA_TESTS, "--ignore=tests/kernels/test_compilation.py", *collected
        ),  # needs no GPU
        benchmark("attention", 50 * slow),
        benchmark("step", 260 * slow, "--profile", tables=("step_profile",)),
        Part(
            name="peak",
            command=("tests/benchmarks/peak.py", "--json", "{json}", "--seconds", "{seconds}"),
            limit=70 * slow,
        ),
        benchmark("kernels", 80 * slow),
        benchmark("products", 40 * slow),
        benchmark("forward", 50 * slow),
        benchmark("fsdp", 70 * slow),
        benchmark("update", 25 * slow),
        benchmark("memory", 90 * slow),
    ]


class Day:
    """Runs parts one after another and publishes their results.

    Args:
        device: the GPU's name.
        parts: what to run.
        work: folder of tables and logs.
        to: folder of `RESULTS.md` and `gpu/`; None: only `work`.
        seconds: of the whole day.
        launcher: put before a part's command: a program, and what only parts on a GPU need.
        environment: of the parts.
        shortest: seconds below which no part is started.
        commit: of this repository, for the results.
    """

    def __init__(
        self,
        device: str,
        parts: Sequence[Part],
        *,
        work: Path,
        to: Path | None,
        seconds: float,
        launcher: Sequence[str] = (sys.executable,),
        environment: dict[str, str] | None = None,
        shortest: float = 10.0,
        commit: str = "unknown",
    ) -> None:
        self.device, self.work, self.to, self.launcher = device, work, to, tuple(launcher)
        self.environment = dict(os.environ) if environment is None else environment
        self.shortest, self.commit = shortest, commit
        self.outcomes = [Outcome(part) for part in parts]
        self.began = time.monotonic()
        self.ends = self.began + seconds
        self.date = datetime.date.today()
        self._published: tuple[object, ...] = ()

    def run(self) -> None:
        """Run all parts, those beside the others too."""
        self.work.mkdir(parents=True, exist_ok=True)
        for outcome in self.outcomes:  # of an earlier day
            for name in (outcome.part.name, *outcome.part.tables):
                (self.work / f"{name}.json").unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            beside = [
                (outcome, stack.enter_context(self._started(outcome, outcome.part.limit)))
                for outcome in self.outcomes
                if outcome.part.on_cpu
            ]
            for outcome in self.outcomes:
                if outcome.part.on_cpu:
                    continue
                left = self.ends - time.monotonic()
                if left < self.shortest:
                    outcome.state = "not run: no time was left"
                    continue
                limit = min(outcome.part.limit, left)
                with self._started(outcome, limit) as process:
                    self._wait(outcome, process, limit)
            for outcome, process in beside:
                self._wait(outcome, process, min(outcome.part.limit, self.ends - self.began))
        self.publish()

    @contextlib.contextmanager
    def _started(self, outcome: Outcome, limit: float) -> Iterator[subprocess.Popen[bytes]]:
        """A part's process. It and its children are killed at the end, also if this script is."""
        part = outcome.part
        values = {"json": self.work / f"{part.name}.json", "seconds": f"{GRACE * limit:.0f}"}
        launcher, environment = self.launcher, self.environment
        if part.on_cpu:
            launcher, environment = launcher[:1], environment | {"CUDA_VISIBLE_DEVICES": ""}
        command = [*launcher, *(word.format(**values) for word in part.command)]
        print(f"{time.monotonic() - self.began:5.0f} s  {part.name}, at most {limit:.0f} s", flush=True)
        with (self.work / f"{part.name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        outcome.state, outcome.seconds = "running", -time.monotonic()
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.publish()

    def _wait(self, outcome: Outcome, process: subprocess.Popen[bytes], limit: float) -> None:
        """Wait for a part, or until its limit, counted from its start; publish what it writes meanwhile."""
        began = -outcome.seconds
        while process.poll() is None and time.monotonic() < began + limit:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(2.0, max(0.0, began + limit - time.monotonic())))
            self.publish()
        code = process.poll()
        outcome.seconds = time.monotonic() - began
        outcome.state = (
            f"stopped after {outcome.seconds:.0f} s" if code is None else f"failed (exit {code})" if code else "done"
        )
        if code != 0:
            log = (self.work / f"{outcome.part.name}.log").read_text(encoding="utf-8", errors="replace")
            outcome.tail = log.splitlines()[-15:]
        print(f"{time.monotonic() - self.began:5.0f} s  {outcome.part.name}: {outcome.state}", flush=True)

    def publish(self) -> None:
        """Write what there is so far, if it has changed."""
        found = {
            outcome.part.name: {name: self._table(name) for name in (outcome.part.name, *outcome.part.tables)}
            for outcome in self.outcomes
        }
        now = (tuple(outcome.state for outcome in self.outcomes), repr(found))
        if now == self._published:
            return
        self._published = now
        goals.add_predictions(found, self.device)
        content = {
            "gpu": self.device,
            "date": str(self.date),
            "commit": self.commit,
            "goals": goals.reached(found),
            "parts": [
                {
                    "name": outcome.part.name,
                    "state": outcome.state,
                    "seconds": round(max(0.0, outcome.seconds), 1),
                    "limit": outcome.part.limit,
                    "tables": [table for table in found[outcome.part.name].values() if table],
                    "log": outcome.tail,
                }
                for outcome in self.outcomes
            ],
        }
        name = re.sub(r"\W+", "_", self.device).strip("_")
        tables.save(self.work / "day.json", content)
        if self.to is not None:
            tables.save(self.to / "gpu" / f"{name}.json", content)
            insert(self.to / "RESULTS.md", f"## {self.date}: a day on one {self.device}", markdown(content))

    def _table(self, name: str) -> dict[str, Any] | None:
        with contextlib.suppress(OSError):
            return tables.load(self.work / f"{name}.json")
        return None


def markdown(content: dict[str, Any]) -> str:
    """The section of a day, without its heading."""
    lines = [
        f"`make gpu` at commit {content['commit']}. `goal` is from the table of goals, `predicted` from the trace and the roofline.",
        "",
        "```",
        tables.text(content["goals"], goals.COLUMNS),
        "```",
    ]
    for part in content["parts"]:
        lines += ["", f"**{part['name']}**: {part['state']}, {part['seconds']:.0f} s.", "", "```"]
        for table in part["tables"]:
            lines += [table["title"], table["machine"], tables.text(table["rows"], table["columns"])]
        lines += part["log"] + ["```"]
    return "\n".join(lines).replace("\n```\n```", "")


def insert(path: Path, heading: str, text: str) -> None:
    """Put a section before all others of a file; a section with the same heading is replaced."""
    before = path.read_text(encoding="utf-8") if path.is_file() else "# Results\n"
    sections = re.split(r"(?m)^(?=## )", before)
    kept = [section for section in sections[1:] if section.splitlines()[0] != heading]
    tables.write(
        path, "".join([sections[0].rstrip() + "\n\n", f"{heading}\n\n{text.rstrip()}\n\n", *kept]).rstrip() + "\n"
    )


def _die_with_parent() -> None:
    """In a child before its command: the kernel kills it when this script dies (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _commit() -> str:
    """The commit, as far as git knows it here."""
    git = ("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    with contextlib.suppress(OSError):
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return "unknown"


def gpu_name() -> str | None:
    """Name of the first GPU; None: there is none. It makes no context on the GPU."""
    with contextlib.suppress(OSError):
        listed = subprocess.run(("nvidia-smi", "-L"), capture_output=True, text=True, check=False).stdout
        if found := re.match(r"GPU 0: (.*) \(UUID", listed):
            return found[1]
    return None


def install(wheels: Path, target: Path) -> None:
    """Install wheels without the network, into a folder of their own."""
    files = sorted(map(str, wheels.glob("*.whl")))
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--target",
        str(target),
    )
    subprocess.run([*pip, *files], check=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0, help="of the whole day, on a GPU")
    parser.add_argument(
        "--to", type=Path, help="folder of RESULTS.md and gpu/ (default: tests/benchmarks; none without a GPU)"
    )
    parser.add_argument("--parts", help="some of them, by name")
    parser.add_argument("--wheels", type=Path, help="install these first")
    parser.add_argument("--null", action="store_true", help="run on the null device, also where there is a GPU")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that parts are killed and results kept
    name = None if options.null else gpu_name()
    launcher = [sys.executable]
    if name is None:
        sys.path.append(str(HERE.parent / "null_device"))
        from null_driver import why_unavailable

        if reason := why_unavailable():
            sys.exit(f"no GPU, and {reason}")
        print("no GPU: the parts run on the null device, which computes nothing", flush=True)
        launcher += ["tests/null_device/run.py", "--card", "h100"]
    chosen = parts(name is None)
    if options.parts:
        names = options.parts.split(",")
        if unknown := set(names) - {part.name for part in chosen}:
            parser.error(
                f"no such part: {', '.join(sorted(unknown))}. There are {', '.join(part.name for part in chosen)}"
            )
        chosen = [part for part in chosen if part.name in names]
    with tempfile.TemporaryDirectory() as site:
        environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        if name is not None:  # arms of different sizes share the memory
            environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        paths = [site, str(ROOT), str(HERE), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        began = time.monotonic()
        if options.wheels:
            install(options.wheels, Path(site))
        seconds = 60 * options.minutes - (time.monotonic() - began) if name else 24 * 3600
        to = options.to or (HERE if name else None)
        work = ROOT / "runs" / "gpu_day" if options.to is None else options.to / "tables"
        day = Day(
            name or "null device", chosen, work=work, to=to, seconds=seconds, launcher=launcher, environment=environment,
            commit=_commit(),
        )  # fmt: skip
        day.run()
    print(markdown(tables.load(work / "day.json")))


if __name__ == "__main__":
    main()
