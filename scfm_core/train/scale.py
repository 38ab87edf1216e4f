"""A run on many GPUs, on paper: what they exchange in a step, how long that takes, and how often to save.

Everything here is computed, nothing is measured. docs/scale.md shows the figures; `python -m recipes.scale_docs`
writes its tables.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from scfm_core.distributed.replicas import BUCKET
from scfm_core.train.config import RunConfig
from scfm_core.train.estimate import A100_PEAK, ASSUMED_UTILISATION, Estimate
from scfm_core.train.memory import shares
from scfm_core.train.rules import micro_batches

MASTER = 4
"""Bytes of a trained weight, of its gradient, and of each tensor that a checkpoint has of it: fp32."""
SAVED_TENSORS = 5
"""Student, two EMAs, two moments of Adam."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines, their links, and how often they fail. Bandwidths are of one GPU in one direction, as collectives reach them."""

    gpus: int = 8
    """GPUs of a node."""
    nvlink: float = 230e9
    """Bytes/s. An A100 has 300 GB/s; NCCL reaches 230: https://github.com/NVIDIA/nccl-tests/issues/149."""
    network: float = 24e9
    """Bytes/s of the InfiniBand card that each GPU has. HDR has 25 GB/s; NCCL reaches 24:
    https://github.com/NVIDIA/nccl/issues/412."""
    call_latency: float = 8.4e-6
    """Seconds of a collective before its first byte; this and the next two are of a ring with protocol Simple in NCCL's own
    model: https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc."""
    nvlink_latency: float = 3.4e-6
    """Seconds from one GPU to the next within a node."""
    network_latency: float = 9.6e-6
    """Seconds from one GPU to the next in another node."""
    node_hours: float = 7.9 * 128
    """Hours between two failures of a node. Jobs of 1,024 A100s, 128 nodes, ran for 7.9 hours on average (Kokolis et al.,
    arXiv 2410.21680). The time between failures of a job is this divided by its nodes."""
    storage: float = 10e9
    """Bytes/s that all nodes together write to the shared file system; an assumption, measure yours."""
    restart: float = 600.0
    """Seconds from a failure to the next step; an assumption."""

    def nodes(self, ranks: int) -> int:
        """Nodes of this number of GPUs."""
        return math.ceil(ranks / self.gpus)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Equal collectives, one for each sharded unit of a network, or one for each bucket of gradients."""

    what: str
    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]
    size: float
    """Bytes of the whole tensors of all units together, for one rank's group."""
    ranks: int
    """Of a group."""
    nodes: int
    """That a group spans."""
    calls: int
    """Number of units or buckets."""

    @property
    def _turns(self) -> int:
        return 2 if self.kind == "all-reduce" else 1

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends, and receives, in a ring."""
        return self._turns * (self.ranks - 1) / self.ranks * self.size

    @property
    def link(self) -> Literal["NVLink", "InfiniBand"]:
        """The link that limits it."""
        return "NVLink" if self.nodes == 1 else "InfiniBand"

    def seconds(self, cluster: Cluster) -> float:
        """Duration of all calls, one after the other, by NCCL's model of a ring.

        A ring through several nodes leaves each node once for every GPU of the group there: all their cards share the traffic.
        """
        bandwidth = cluster.nvlink
        if self.nodes > 1:
            bandwidth = min(bandwidth, max(1, self.ranks // self.nodes) * cluster.network)
        between = self._turns * (self.nodes - 1)
        within = self._turns * (self.ranks - 1) - between
        latency = cluster.call_latency + within * cluster.nvlink_latency + between * cluster.network_latency
        return self.calls * latency + self.sent / bandwidth


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A pass of a micro-batch through a network, and what is exchanged meanwhile."""

    what: str
    flops: float
    """Of one GPU."""
    exchanges: tuple[Exchange, ...] = ()

    def compute(self) -> float:
        """Seconds on an A100 at the utilisation that the dry run assumes."""
        return self.flops / (A100_PEAK * ASSUMED_UTILISATION)

    def shown(self, cluster: Cluster) -> tuple[float, float]:
        """Seconds that the exchanges add to the pass: with perfect overlap, and without any.

        With perfect overlap the links work at the same time as each other and as the computation. The first unit has nothing
        before it behind which it could hide; a replica's last bucket of gradients nothing after it.
        """
        links: dict[str, float] = defaultdict(float)
        for exchange in self.exchanges:
            links[exchange.link] += exchange.seconds(cluster)
        if not links:
            return 0.0, 0.0
        least = max(max(seconds - self.compute(), 0.0) for seconds in links.values())
        first = max(exchange.seconds(cluster) / exchange.calls for exchange in self.exchanges)
        return max(least, first), sum(links.values())


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step."""

    phases: tuple[Phase, ...]
    samples: int
    cluster: Cluster

    @property
    def exchanges(self) -> list[Exchange]:
        """All of the step, in order."""
        return [exchange for phase in self.phases for exchange in phase.exchanges]

    @property
    def compute(self) -> float:
        """Seconds."""
        return sum(phase.compute() for phase in self.phases)

    @property
    def shown(self) -> tuple[float, float]:
        """Seconds of communication that the step shows: with perfect overlap, and without any."""
        bounds = [phase.shown(self.cluster) for phase in self.phases]
        return sum(least for least, _ in bounds), sum(most for _, most in bounds)


def plan_step(config: RunConfig, result: Estimate, units: int, cluster: Cluster | None = None) -> StepPlan:
    """The passes of a step and their collectives, as `distributed/fsdp2.py` runs them.

    A pass gathers each block before it runs and frees it after that, so the backward gathers again; recomputation of activations
    runs within the backward and gathers nothing. With sharded full weights the near pass gathers teacher and fast EMA: in
    micro-batches of one row each process runs one of them, in larger ones both, on at least one row each. Gradients are reduced
    in fp32 after every micro-batch, and between replicas after the last.

    Args:
        config: of a run with `engine.name: fsdp2` whose rows are all pairs, of a model with one pass a velocity.
        result: its estimate, for the number of processes of the plan.
        units: how many parts of a network are sharded one by one: its blocks and the rest.
        cluster: the machines.

    Raises:
        ValueError: for another engine or other rows.
    """
    if config.engine.name != "fsdp2" or config.method.passes(1) != (1, 2) or config.method.has_known:
        raise ValueError("the plan knows only the collectives of engine.name: fsdp2, and only pairs")
    cluster = cluster or Cluster()
    world, shard, full = result.world, shares(config, result.world).weights, config.train.weights == "full"
    micro, width = micro_batches(config, world), 2 if config.train.compute_dtype == "bfloat16" else 4
    # Of adapters the gathered blocks contain all three banks.
    gathered = width * (result.base_parameters if full else result.base_parameters + 3 * result.trained_parameters)
    gradients = MASTER * result.trained_parameters
    group = {"ranks": shard, "nodes": cluster.nodes(shard), "calls": units}

    def one_pass(what: str, rows: float, *others: Exchange) -> Phase:
        gather = Exchange(what=f"weights, {what}", kind="all-gather", size=gathered, **group)
        return Phase(what=what, flops=rows * result.forward_flops, exchanges=((gather,) if shard > 1 else ()) + others)

    near = [one_pass("near", micro.size)]
    if full and config.method.has_teacher and shard > 1:
        share = config.method.teacher_fraction
        teacher, fast = _rows(micro.size, share), _rows(micro.size, 1 - share)
        near = [one_pass("near (teacher)", teacher), one_pass("near (fast EMA)", fast)]
        if micro.size == 1:  # distributed/lockstep.py: both are gathered, one runs
            both = tuple(each for phase in near for each in phase.exchanges)
            near = [Phase(what="near", flops=result.forward_flops, exchanges=both)]
    forwards = [*near, one_pass("far (slow EMA)", micro.size), one_pass("student", micro.size)]
    # What the dry run counts beyond the forward passes: backward, recomputation, adapters.
    backward_rows = micro.size * (result.step_flops / result.forward_flops - 3)
    reduction = Exchange(what="gradients", kind="reduce-scatter", size=gradients, **group)
    replicas = world // shard
    between = Exchange(
        what="gradients, replicas", kind="all-reduce", size=gradients / shard, ranks=replicas,
        nodes=min(replicas, cluster.nodes(world)), calls=units if shard > 1 else math.ceil(gradients / BUCKET),
    )  # fmt: skip
    phases: list[Phase] = []
    for number in range(micro.number):
        is_last = number == micro.number - 1
        reductions = [reduction] if shard > 1 else []
        if replicas > 1 and is_last:
            reductions.append(between)
        phases += [*forwards, one_pass("backward", backward_rows, *reductions)]
    return StepPlan(tuple(phases), config.train.global_batch_size, cluster)


def _rows(rows: int, share: float) -> float:
    """Expected rows of one of two networks that share a micro-batch by chance; one that gets none runs on a single row."""
    return rows * share + (1 - share) ** rows


@dataclass(frozen=True)
class SavePlan:
    """How often to save, for the least expected loss."""

    size: float
    """Bytes of a checkpoint."""
    cost: float
    """Seconds of a save during which nothing is trained."""
    mtbf: float
    """Seconds between two failures of the job."""
    restart: float
    """Seconds from a failure to the next step."""

    @property
    def interval(self) -> float:
        """Seconds of training between two saves (Daly 2006, eq. 37, doi:10.1016/j.future.2004.11.016).

        Its first term is Young's (1974, doi:10.1145/361147.361115): sqrt(2 cost mtbf).
        """
        ratio = self.cost / (2 * self.mtbf)
        if ratio >= 1:
            return self.mtbf
        return math.sqrt(2 * self.cost * self.mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - self.cost

    def lost(self, interval: float) -> float:
        """Expected share of the time that is lost: saving, repeating half an interval after a failure, restarting; first order."""
        return self.cost / (interval + self.cost) + ((interval + self.cost) / 2 + self.restart) / self.mtbf


def checkpoint_bytes(trained_parameters: int) -> int:
    """Bytes of a checkpoint; the states of data and schedule are small."""
    return SAVED_TENSORS * MASTER * trained_parameters


def plan_saves(result: Estimate, cluster: Cluster | None = None) -> SavePlan:
    """How often a run of `result.world` GPUs saves, if a save stops the training (`checkpoint.asynchronous: false`)."""
    cluster = cluster or Cluster()
    size = checkpoint_bytes(result.trained_parameters)
    mtbf = cluster.node_hours * 3600 / cluster.nodes(result.world)
    return SavePlan(size, size / cluster.storage, mtbf, cluster.restart)


@dataclass(frozen=True, kw_only=True)
class StartPlan:
    """The start over a large data set, in proportion to the samples.

    It is extrapolated from 10 million samples in 10,000 shards, in runs of one, by 8 processes of a machine (before: by one
    process): tests/benchmarks/RESULTS.md, 2026-11-28.
    """

    ranks: int
    nodes: int
    samples: int

    @property
    def first(self) -> float:
        """CPU seconds of one process of a node at the first start: manifest, buckets, order. The others wait for it."""
        return self.samples * 697e-9

    @property
    def later(self) -> float:
        """CPU seconds of each process where the files of the machine exist already."""
        return self.samples * 36e-9

    @property
    def before(self) -> float:
        """CPU seconds of each process at every start when each did everything by itself."""
        return self.samples * 1381e-9

    @property
    def memory(self) -> float:
        """Bytes of a node after a later start."""
        return self.samples * 10.6

    @property
    def memory_before(self) -> float:
        """Bytes of a node when each process had its own."""
        return self.samples * 192.7 * self.ranks / self.nodes

    @property
    def manifests(self) -> float:
        """Bytes of the manifest that all nodes together read from the storage, each node once."""
        return self.nodes * self.samples * 16.4


def plan_start(ranks: int, samples: int, cluster: Cluster | None = None) -> StartPlan:
    """The start of a run of `ranks` processes over `samples` samples."""
    return StartPlan(ranks=ranks, nodes=(cluster or Cluster()).nodes(ranks), samples=samples)
