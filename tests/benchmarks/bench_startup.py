"""The start of a run over a large data set: seconds and memory until the first batch is known, on one machine.

    python tests/benchmarks/bench_startup.py [--samples 10000000] [--shards 10000] [--processes 1 8] [--json PATH]

The manifest is synthetic, and the shards are empty files of the right size: no sample is read. Each process is a rank: it opens
the corpus (manifest, index, buckets, presence of the shards) and takes the first batch of the order. `--distinct` is the number
of image sizes that occur, `--run` the number of consecutive samples of one size. `first start` has no files of the machine yet,
`next start` has them. `--reference FOLDER` measures another checkout of this project too. Times and peaks are those of the worst
rank; `cpu_s` does not depend on what else the machine does. Memory is that after the start, without that of the imports:
`private_mb` of one process, `machine_mb` of all processes with what they share.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import parser, report

ROOT = Path(__file__).parents[2]
SAMPLE_BYTES = 1000
COLUMNS = {
    "arm": "",
    "processes": "d",
    "corpus_s": ".2f",
    "order_s": ".2f",
    "seconds": ".2f",
    "cpu_s": ".2f",
    "private_mb": ".1f",
    "machine_mb": ".1f",
    "peak_mb": ".1f",
    "read_mb": ".1f",
    "x_reference": ".2f",
}


def write_data_set(folder: Path, samples: int, shards: int, distinct: int, run: int) -> None:
    """A manifest as `scfm data index` writes it, and sparse files in place of shards."""
    random = np.random.default_rng(0)
    sizes = random.integers(256, 2048, (distinct, 2))
    texts = np.array([f"[{height}, {width}, " for height, width in sizes], object)
    folder.mkdir(parents=True)
    with (folder / "manifest.json").open("w") as file:
        head = {"manifest": "scfm-manifest", "version": 2, "format": "webdataset", "encoder": None}
        head |= {"text_length": None, "padding": None, "network": None, "background": None, "settings": {}}
        file.write(json.dumps(head | {"samples": samples}, indent=2)[:-2] + ',\n  "shards": [\n    ')
        for number in range(shards):
            count = samples * (number + 1) // shards - samples * number // shards
            runs = [min(run, count - at) for at in range(0, count, run)]
            drawn = texts[random.integers(0, distinct, len(runs))]
            listed = ", ".join(f"{text}{length}]" for text, length in zip(drawn, runs, strict=True))
            entry = {"name": f"{number:06d}.tar", "samples": count, "bytes": count * SAMPLE_BYTES}
            entry["sha256"] = f"{number:064x}"
            file.write((",\n    " if number else "") + json.dumps(entry)[:-1] + f', "sizes": [{listed}]}}')
            with (folder / f"{number:06d}.tar").open("wb") as shard:
                shard.truncate(count * SAMPLE_BYTES)
        file.write("\n  ]\n}\n")


def memory() -> dict[str, float]:
    """Memory of this process in MB: its share of all pages, and the pages that are its own."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) / 1e3 for line in lines}
    return {"share": found["Pss"], "private": found["Private_Clean"] + found["Private_Dirty"]}


def status(key: str) -> int:
    """A number of this process: in kB `VmHWM` (most memory so far), in bytes `rchar` (read so far)."""
    lines = (Path("/proc/self/status").read_text() + Path("/proc/self/io").read_text()).splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def rank(folder: Path, cache: Path, batch: int) -> None:
    """One process of a run: it prints when it is ready, what the start took, and its memory while all others hold theirs."""
    from scfm_core.data.corpus import Corpus
    from scfm_core.data.recipe import CacheConfig, DataConfig

    Path("/proc/self/oom_score_adj").write_text("1000")
    config = DataConfig(path=str(folder), buckets="auto", cache=CacheConfig(dir=str(cache)))
    say: dict[str, Any] = {}

    def meet() -> None:
        print(json.dumps(say), flush=True)
        sys.stdin.readline()

    meet()
    before, read = memory(), status("rchar")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    peak, began, cpu = status("VmHWM"), time.perf_counter(), time.process_time()
    corpus = Corpus(config)
    opened = time.perf_counter()
    order = corpus.order(batch, 0)
    number, place = order.locate(0)
    epoch = order.epoch(number)
    first = epoch.items[place].tolist()
    ended = time.perf_counter()
    assert len(set(first)) == batch
    say = {"corpus_s": opened - began, "order_s": ended - opened, "seconds": ended - began}
    say["cpu_s"] = time.process_time() - cpu
    say |= {"peak_mb": (status("VmHWM") - peak) / 1e3, "read_mb": (status("rchar") - read) / 1e6}
    meet()
    now = memory()
    say = {"private_mb": now["private"] - before["private"], "machine_mb": now["share"] - before["share"]}
    say["first"] = first
    meet()


def start(checkout: Path, processes: int, *words: str) -> tuple[dict[str, float], list[int]]:
    """Figures of one start with several ranks, and the first batch. Times and peaks are those of the worst rank."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rank", *words]
    pipe = subprocess.PIPE
    ranks = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=checkout)
        for _ in range(processes)
    ]
    said: list[list[dict[str, Any]]] = []
    for _ in range(3):
        said.append([json.loads(each.stdout.readline()) for each in ranks])  # type: ignore[union-attr]
        for each in ranks:
            each.stdin.write("\n")  # type: ignore[union-attr]
            each.stdin.flush()  # type: ignore[union-attr]
    assert [each.wait() for each in ranks] == [0] * processes
    figures = {key: max(one[key] for one in said[1]) for key in said[1][0] if key != "read_mb"}
    figures["read_mb"] = sum(one["read_mb"] for one in said[1])
    figures["private_mb"] = max(one["private_mb"] for one in said[2])
    figures["machine_mb"] = sum(one["machine_mb"] for one in said[2])
    batches = [one["first"] for one in said[2]]
    assert batches == [batches[0]] * processes
    return figures, batches[0]


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "startup", 1, 256)
    options.add_argument("--samples", type=int, default=10_000_000)
    options.add_argument("--shards", type=int, default=10_000)
    options.add_argument("--distinct", type=int, default=1000)
    options.add_argument("--run", type=int, default=1)
    options.add_argument("--processes", type=int, nargs="+", default=[1, 8])
    options.add_argument("--reference", type=Path)
    options.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    if arguments.rank:
        folder, cache, batch = arguments.rank
        rank(Path(folder), Path(cache), int(batch))
        return
    rows, batches = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = Path(temporary, "data"), Path(temporary, "cache")
        write_data_set(folder, arguments.samples, arguments.shards, arguments.distinct, arguments.run)
        manifest_mb = (folder / "manifest.json").stat().st_size / 1e6
        words = str(folder), str(cache), str(arguments.batch)
        for processes in arguments.processes:
            shutil.rmtree(cache, ignore_errors=True)
            arms = {"reference": arguments.reference} if arguments.reference else {}
            arms |= {"ours: first start": ROOT, "ours: next start": ROOT}
            found = {}
            for arm, checkout in arms.items():
                found[arm], first = start(checkout, processes, *words)
                batches.append(first)
            assert batches == [batches[0]] * len(batches)
            against = found.get("reference", found["ours: first start"])["seconds"]
            rows += [
                {"arm": arm, "processes": processes, **figures, "x_reference": against / figures["seconds"]}
                for arm, figures in found.items()
            ]
    title = (
        f"start over {arguments.samples:,} samples in {arguments.shards:,} shards, {arguments.distinct:,} sizes in runs of "
        f"{arguments.run}, a manifest of {manifest_mb:.1f} MB"
    )
    report(title, rows, COLUMNS, arguments.json)


if __name__ == "__main__":
    main()
