"""Which GPUs a run fits on, and which settings make it fit on smaller ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from scfm_core.models.quantised import Base
from scfm_core.train.config import RunConfig
from scfm_core.train.roofline import CARDS
from scfm_core.train.rules import why_no_unsharded_base

SIZES = {
    size: min(card.usable for card in CARDS.values() if card.memory == size)
    for size in sorted({card.memory for card in CARDS.values()}, reverse=True)
}
"""GiB that the driver reports, by the GB in the name of a card."""
LARGE = 80
"""GB. Of the GPUs on which a run is spread that fits none alone: most clusters have them."""
USABLE = 0.92
"""Assumed, with expandable segments, which are the default: the rest is CUDA's context, NCCL's buffers and gaps between allocations."""
GIB = 2**30


@dataclass(frozen=True)
class Fit:
    """Whether a run fits on a GPU of one size."""

    size: int
    """GB in the name of the GPU."""
    memory: float
    """Bytes of the run with `settings`."""
    settings: tuple[str, ...]
    """The changes that make it fit; if nothing does, those that need the least memory."""
    encoders: float = 0.0
    """Bytes of the encoders, which are beside the network only if the shards hold images."""

    @property
    def usable(self) -> float:
        """Bytes that the run may need at its peak."""
        return USABLE * SIZES[self.size] * GIB

    @property
    def fits(self) -> bool:
        """Whether the run needs at most the usable memory."""
        return self.memory <= self.usable

    def __str__(self) -> str:
        settings, memory = " ".join(self.settings), f"({self.memory / GIB:.1f} GiB)"
        names = ", ".join(
            name.removesuffix(f" {self.size} GB") for name, card in CARDS.items() if card.memory == self.size
        )
        if not self.fits:
            return f"{self.size} GB ({names}): does not fit{f', not even with {settings}' * bool(settings)} {memory}"
        cache = "a cache" if self.memory + self.encoders > self.usable else ""
        needed = " and ".join(words for words in (cache, settings) if words)
        return f"{self.size} GB ({names}): fits {f'with {needed} ' * bool(needed)}{memory}"


def fits(
    config: RunConfig, world: int, memory: Callable[[RunConfig], float], blocks: int, encoders: float = 0.0
) -> list[Fit]:
    """For each size of a GPU: the first variant of the run that fits, or else the smallest.

    Args:
        config: the run.
        world: number of processes.
        memory: bytes of one GPU that a variant of the run needs.
        blocks: number of blocks of the network.
        encoders: bytes of the encoders, if they are beside the network only if the shards hold images.
    """
    variants: list[tuple[float, tuple[str, ...]]] = []
    for settings, variant in _variants(config, world, blocks):
        variants.append((memory(variant), settings))
        if Fit(min(SIZES), *variants[-1]).fits:  # then it fits all, and the rest need not be computed
            break
    smallest = min(variants, key=lambda variant: variant[0])
    found = []
    for size in SIZES:
        fitting = [variant for variant in variants if Fit(size, *variant).fits]
        found.append(Fit(size, *(fitting or [smallest])[0], encoders))
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
        if Fit(LARGE, memory(number), ()).fits:
            return number
        number *= 2
    return None


_Variant = tuple[tuple[str, ...], RunConfig]


def _variants(config: RunConfig, world: int, blocks: int) -> Iterator[_Variant]:
    """The run, and variants that need less memory; most cost more time than the one before."""
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
    if why_no_unsharded_base(config, world) is None:
        yield from _smaller_bases(settings, config, blocks)
    model, kernels = config.model, config.kernels
    if world > 1 and not (kernels.fp8 or kernels.cuda_graphs or model.offload_blocks or model.base != "bfloat16"):
        yield from _sharded(settings, config)


def _smaller_bases(settings: tuple[str, ...], config: RunConfig, blocks: int) -> Iterator[_Variant]:
    """Variants of a run with an unsharded, frozen base that store it in fewer bits, or a part of it in host memory."""
    kernels = config.kernels
    if kernels.fp8:
        return
    stored = [(settings, config)]
    bases: list[Base] = ["int8", "nf4"]
    bases = {"bfloat16": bases, "int8": bases[1:], "float8": bases[1:], "nf4": []}[config.model.base]
    for base in bases:
        smaller = replace(config, model=replace(config.model, base=base))
        stored.append(((*settings, f"model.base={base}"), smaller))
        yield stored[-1]
    if config.engine.name == "deepspeed" or kernels.cuda_graphs:
        return
    numbers = [number for number in (blocks // 2, blocks) if number > max(1, config.model.offload_blocks)]
    for words, variant in (stored[0], *stored[1:][-1:]):
        for number in numbers:
            offloaded = replace(variant, model=replace(variant.model, offload_blocks=number))
            yield (*words, f"model.offload_blocks={number}"), offloaded


def _sharded(settings: tuple[str, ...], config: RunConfig) -> Iterator[_Variant]:
    """Variants of a run on several processes that shard more."""
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
