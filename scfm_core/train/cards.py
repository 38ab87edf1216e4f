"""Which GPUs a run fits on, and which settings make it fit on smaller ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from scfm_core.train.config import RunConfig
from scfm_core.train.roofline import CARDS

SIZES_GIB = tuple(sorted({card.memory for card in CARDS.values()}, reverse=True))
LARGE_GIB = 80
"""Of the GPUs on which a run is spread that fits none alone: most clusters have them."""
USABLE = 0.92
"""Assumed: the rest is CUDA's context, NCCL's buffers and gaps between allocations."""
GIB = 2**30


@dataclass(frozen=True)
class Fit:
    """Whether a run fits on a GPU of one size."""

    size: int
    """Memory of the GPU, GiB."""
    memory: float
    """Bytes of the run with `settings`."""
    settings: tuple[str, ...]
    """The changes that make it fit; if nothing does, those that need the least memory."""

    @property
    def fits(self) -> bool:
        """Whether the run needs at most the usable memory."""
        return self.memory <= USABLE * self.size * GIB

    def __str__(self) -> str:
        settings, memory = " ".join(self.settings), f"({self.memory / GIB:.1f} GiB)"
        names = ", ".join(
            name.removesuffix(f" {self.size} GB") for name, card in CARDS.items() if card.memory == self.size
        )
        if self.fits:
            return f"{self.size} GB ({names}): fits {f'with {settings} ' * bool(settings)}{memory}"
        return f"{self.size} GB ({names}): does not fit{f', not even with {settings}' * bool(settings)} {memory}"


def fits(config: RunConfig, world: int, memory: Callable[[RunConfig], float]) -> list[Fit]:
    """For each size of a GPU: the first variant of the run that fits, or else the smallest.

    Args:
        config: the run.
        world: number of processes.
        memory: bytes of one GPU that a variant of the run needs.
    """
    variants = [(memory(variant), settings) for settings, variant in _variants(config, world)]
    smallest = min(variants, key=lambda variant: variant[0])
    found = []
    for size in SIZES_GIB:
        fitting = [variant for variant in variants if Fit(size, *variant).fits]
        found.append(Fit(size, *(fitting or [smallest])[0]))
    return found


def gpus_needed(config: RunConfig, world: int, memory: Callable[[int], float]) -> int | None:
    """The smallest doubling of `world` on which the run fits GPUs of 80 GB; None if the global batch allows none.

    Args:
        config: the run.
        world: number of processes.
        memory: bytes of one GPU on a number of processes.
    """
    number = world * 2
    while config.train.global_batch_size % number == 0:
        if Fit(LARGE_GIB, memory(number), ()).fits:
            return number
        number *= 2
    return None


def _variants(config: RunConfig, world: int) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """The run, and variants that need less memory; each costs more time than the one before it."""
    settings: tuple[str, ...] = ()
    yield settings, config
    modes: list[Literal["none", "selective", "full"]] = ["selective", "full"]
    if config.train.activation_checkpointing in modes:
        modes = modes[modes.index(config.train.activation_checkpointing) + 1 :]
    for mode in modes:
        config = replace(config, train=replace(config.train, activation_checkpointing=mode))
        settings = (f"train.activation_checkpointing={mode}",)
        yield settings, config
    if config.train.micro_batch_size > 1:
        config = replace(config, train=replace(config.train, micro_batch_size=1))
        settings += ("train.micro_batch_size=1",)
        yield settings, config
    if world == 1 or config.kernels.fp8 or config.kernels.cuda_graphs:
        return
    engine = config.engine
    if engine.name == "fsdp2" and engine.shard != -1:
        config = replace(config, engine=replace(engine, shard=-1))
        settings += ("engine.shard=-1",)
        yield settings, config
    if (
        engine.name == "deepspeed"
        and engine.deepspeed_config is None
        and engine.zero_stage < 3
        and not config.train.compile
    ):
        config = replace(config, engine=replace(engine, zero_stage=3))
        settings += ("engine.zero_stage=3",)
        yield settings, config
    if not engine.cpu_offload:
        config = replace(config, engine=replace(config.engine, cpu_offload=True))
        yield (*settings, "engine.cpu_offload=true"), config
