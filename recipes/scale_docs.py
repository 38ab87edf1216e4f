"""`python -m recipes.scale_docs`: write the computed tables of docs/scale.md, from `scfm_core/train/scale.py`."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from scfm_core.train.assemble import build_family
from scfm_core.train.cards import GIB
from scfm_core.train.config import RunConfig
from scfm_core.train.estimate import A100_PEAK, ASSUMED_UTILISATION, Estimate, estimate
from scfm_core.train.parse import load_config
from scfm_core.train.scale import Cluster, plan_saves, plan_start, plan_step
from scfm_core.wording import duration

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
FULL, LORA = "flux_dev_full.yaml", "flux_dev_lora.yaml"
WORLDS = (64, 128, 256, 512)
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_CLUSTER = Cluster()


class Recipe:
    """A shipped recipe in several layouts. FLOPs and parameters do not depend on the layout."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.family = build_family(load_config(name, []), offline=True)
        arch = self.family.network_config
        self.units = int(arch["num_layers"]) + int(arch["num_single_layers"]) + 1
        self._estimate = estimate(self.config(64, 8, 1), self.family, 64)

    def config(self, world: int, shard: int, micro: int) -> RunConfig:
        """With one micro-batch of `micro` samples on each of `world` GPUs."""
        words = (f"engine.shard={shard}", f"train.global_batch_size={world * micro}", f"train.micro_batch_size={micro}")
        return load_config(self._name, list(words))

    def on(self, world: int) -> Estimate:
        """Its estimate for a number of GPUs, but for the memory."""
        return dataclasses.replace(self._estimate, world=world)

    def gib(self, world: int, shard: int, micro: int) -> float:
        """Memory of a GPU."""
        return sum(estimate(self.config(world, shard, micro), self.family, world).memory.values()) / GIB


def page(text: str) -> str:
    """The page with its tables computed anew.

    Args:
        text: of the page; each table is between `<!-- table: NAME -->` and `<!-- end -->`.

    Raises:
        KeyError: for the name of a table that does not exist.
    """
    full, lora = Recipe(FULL), Recipe(LORA)
    tables: dict[str, Callable[[], Iterator[str]]] = {
        "assumptions": _assumptions,
        "memory": lambda: _memory(full, lora),
        "exchanges": lambda: _exchanges(full),
        "full": lambda: _steps(full, (8, -1), (1, 4)),
        "lora": lambda: _steps(lora, (1,), (1, 4)),
        "saves": lambda: _saves(full, lora),
        "start": _starts,
    }
    return _TABLE.sub(lambda found: found[1] + "".join(f"{line}\n" for line in tables[found[2]]()) + found[3], text)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _head(*cells: str) -> str:
    return f"{_row(*cells)}\n{'|---' * len(cells)}|"


def _assumptions() -> Iterator[str]:
    yield _head("figure", "value", "source")
    c = _CLUSTER
    yield _row("A100, bf16, dense", f"{A100_PEAK / 1e12:.0f} TFLOP/s", "NVIDIA's data sheet")
    yield _row("of it in a step", f"{ASSUMED_UTILISATION:.0%}", "assumed, as in `--dry-run`; not measured")
    yield _row(
        "NVLink, one direction", f"{c.nvlink / 1e9:.0f} GB/s",
        "300 by the data sheet; [230 is what NCCL reaches](https://github.com/NVIDIA/nccl-tests/issues/149)",
    )  # fmt: skip
    yield _row(
        "InfiniBand HDR, one card a GPU", f"{c.network / 1e9:.0f} GB/s",
        "25 by its name, 200 Gb/s; [24 is what NCCL reaches](https://github.com/NVIDIA/nccl/issues/412)",
    )  # fmt: skip
    yield _row(
        "latency of a ring", f"{c.call_latency * 1e6:.1f} µs, {c.nvlink_latency * 1e6:.1f} µs a GPU, "
        f"{c.network_latency * 1e6:.1f} µs a node",
        "[NCCL's own model](https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc), protocol Simple",
    )  # fmt: skip
    yield _row(
        "failures", f"one a node in {c.node_hours / 24:.0f} days",
        "jobs of 1,024 A100s ran 7.9 hours on average ([Kokolis et al.](https://arxiv.org/abs/2410.21680))",
    )  # fmt: skip
    yield _row("shared file system", f"{c.storage / 1e9:.0f} GB/s", "assumed, for all nodes together; measure yours")
    yield _row("from a failure to the next step", duration(c.restart), "assumed")


def _memory(full: Recipe, lora: Recipe) -> Iterator[str]:
    yield _head("run", "layout", "GPUs", "memory of a GPU, micro-batch 1", "micro-batch 4")
    for recipe, name, shard, world in (
        (full, "full weights", 8, 64),
        (full, "full weights", -1, 64),
        (lora, "LoRA", 1, 64),
    ):
        one, four = (recipe.gib(world, shard, micro) for micro in (1, 4))
        yield _row(name, _layout(shard), f"{world}", f"{one:.1f} GiB", f"{four:.1f} GiB")


def _layout(shard: int) -> str:
    return {1: "`engine.shard=1`", -1: "`engine.shard=-1`"}.get(shard, f"`engine.shard={shard}` (HSDP)")


def _exchanges(full: Recipe) -> Iterator[str]:
    yield _head("collective", "of", "ranks", "whole tensors", "a GPU sends", "over", "time")
    plan = plan_step(full.config(64, 8, 1), full.on(64), full.units, _CLUSTER)
    for each in plan.exchanges:
        yield _row(
            f"{each.kind}, {each.calls} calls", each.what, f"{each.ranks}", f"{each.size / 1e9:.1f} GB",
            f"{each.sent / 1e9:.1f} GB", each.link, f"{each.seconds(_CLUSTER) * 1e3:.0f} ms",
        )  # fmt: skip
    sent: dict[str, float] = defaultdict(float)
    for each in plan.exchanges:
        sent[each.link] += each.sent
    seconds = sum(each.seconds(_CLUSTER) for each in plan.exchanges)
    total = ", ".join(f"{size / 1e9:.1f} GB over {link}" for link, size in sent.items())
    yield _row("**together**", "", "", "", total, "", f"{seconds * 1e3:.0f} ms")


def _steps(recipe: Recipe, shards: tuple[int, ...], micros: tuple[int, ...]) -> Iterator[str]:
    yield _head("GPUs", "layout", "micro-batch", "global batch", "computation", "communication", "share that shows")
    for world in WORLDS:
        for shard in shards:
            for micro in micros:
                plan = plan_step(recipe.config(world, shard, micro), recipe.on(world), recipe.units, _CLUSTER)
                communication = sum(each.seconds(_CLUSTER) for each in plan.exchanges)
                least, most = (seconds / (plan.compute + seconds) for seconds in plan.shown)
                yield _row(
                    f"{world}", _layout(shard), f"{micro}", f"{plan.samples}", f"{plan.compute:.2f} s",
                    f"{communication:.2f} s", f"{least:.0%} to {most:.0%}",
                )  # fmt: skip


def _saves(full: Recipe, lora: Recipe) -> Iterator[str]:
    yield _head(
        "run",
        "GPUs",
        "checkpoint",
        "a save",
        "failures of the job",
        "save every",
        "steps of micro-batch 4",
        "time lost",
    )
    for recipe, name, shard in ((full, "full weights", 8), (lora, "LoRA", 1)):
        for world in WORLDS:
            plan = plan_saves(recipe.on(world), _CLUSTER)
            step = plan_step(recipe.config(world, shard, 4), recipe.on(world), recipe.units, _CLUSTER)
            steps = plan.interval / (step.compute + step.shown[0])
            yield _row(
                name, f"{world}", f"{plan.size / 1e9:.1f} GB", f"{plan.cost:.1f} s",
                f"one in {plan.mtbf / 3600:.0f} hours", duration(plan.interval), f"{round(steps, -1):,.0f}",
                f"{plan.lost(plan.interval):.1%}",
            )  # fmt: skip


def _starts() -> Iterator[str]:
    yield _head(
        "samples",
        "ranks",
        "first start, CPU time of one process a node",
        "later starts, of each process",
        "before, of each process",
        "memory of a node",
        "before",
        "manifests read",
        "hashed, in data sets",
        "before",
    )
    for samples in (1_000_000, 10_000_000, 100_000_000):
        for ranks in (8, 64, 512):
            plan = plan_start(ranks, samples, _CLUSTER)
            yield _row(
                f"{samples:,}", f"{ranks}", f"{plan.first:.1f} s", f"{plan.later:.2f} s", f"{plan.before:.1f} s",
                f"{plan.memory / 1e9:.2f} GB", f"{plan.memory_before / 1e9:.1f} GB", f"{plan.manifests / 1e9:.2f} GB",
                f"{plan.nodes}", f"{ranks}",
            )  # fmt: skip


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written to {PAGE}")
