"""The LoRA bank: student, fast EMA, slow EMA, and a fake score if there is one, side by side over one frozen base.

A forward selects the adapter and a strength for each sample; no weight is copied, merged or swapped. Strength 0 is the
frozen base, so rows of the teacher and rows of an EMA share one forward.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from scfm_core.filling import Fill
from scfm_core.kernels.fp8 import Fp8Weight, fits, fp8_linear, quantise
from scfm_core.kernels.lora import Copies, lora_add, lora_linear, lora_linears
from scfm_core.models.quantised import QuantisedLinear

ADAPTERS = ("student", "ema_fast", "ema_slow")
"""The adapters of every bank."""
TRAINED = ("student", "fake")
"""Those that get gradients."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Rank, scale and targets of the adapters. The defaults are the paper's: all 504 linears of Flux.1-dev."""

    rank: int = 64
    """Rank of every adapter."""
    alpha: float = 64.0
    """Scale: an adapter at strength s adds `s * alpha / rank * B A`."""
    targets: str = ".*"
    """Regular expression: a linear is adapted if its full module name matches. The default matches all linears."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Initial values of A, as PEFT draws them; B is always zero. `kaiming`: uniform in +-1/sqrt(inputs). `gaussian`: normal with
    standard deviation 1/rank, in every layer (the authors' code). In the wide layers of large models `gaussian` is larger, so the
    same learning rate changes the network more: 1.5 times at 3072 inputs and rank 64, 3 times at 15360."""
    start: str | None = None
    """Weights that student and averages start from instead: the folder of another run (its newest checkpoint, weights of its
    `sample.weights`), a checkpoint, or a safetensors file of an adapter such as `scfm export` writes. It must have this `rank` and these
    `targets`; another `alpha` is accounted for. A run that resumes takes its own checkpoint."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"lora.rank and lora.alpha must be positive, got {self.rank} and {self.alpha}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"lora.targets is not a regular expression: {error}") from error


class AdapterSelection:
    """The adapter and the strength of the next forward; all layers of a bank share one object.

    Activation checkpointing reads it again in the backward: passes without gradient that come before it must restore it.
    """

    def __init__(self) -> None:
        self.adapter: str | None = None
        self.scale: Tensor | None = None
        self.in_fp8 = False
        self.reads_own_copies = False
        """Whether the student reads copies of its own: see `LoRABank.keep_copies`."""


class _Factor(nn.Linear):
    """A or B of one adapter. `LoRABank` gives it its initial values."""

    def reset_parameters(self) -> None:
        """Draw nothing. PyTorch's own draw would be overwritten, and takes long on the meta device."""


class LoRALinear(nn.Module):
    """A frozen linear with one low-rank correction per adapter of the bank. Parameter names are those of PEFT."""

    base_layer: nn.Linear | QuantisedLinear

    def __init__(
        self, base_layer: nn.Linear, config: LoRAConfig, selection: AdapterSelection, adapters: Sequence[str] = ADAPTERS
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.dtype = base_layer.weight.dtype
        """Of the products."""
        self.selection = selection
        self.copies: Copies | None = None
        """The factors of the selected adapter in that dtype, which `LoRABank.select` writes. None: each call casts."""
        self.joined: tuple[LoRALinear, ...] = (self,)
        """The layers that `linears` calls together with this one; their copies of A are adjacent."""
        self.own_copies: Copies | None = None
        """The student's, if it has its own."""
        self.fp8: Fp8Weight | None = None
        """The base's weight in fp8, if the target's passes run in fp8."""
        device = base_layer.weight.device

        def bank(inputs: int, outputs: int) -> nn.ModuleDict:
            # fp32 also over a bf16 base: bf16 masters lose most updates at a learning rate of 2e-5.
            return nn.ModuleDict(
                {name: _Factor(inputs, outputs, bias=False, device=device, dtype=torch.float32) for name in adapters}
            )

        self.lora_A = bank(base_layer.in_features, config.rank)
        self.lora_B = bank(config.rank, base_layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """`x W + scale * (x A) B`, [B, ..., out] in the dtype of `x`; `scale` is per sample."""
        scale, base = self.selection.scale, self.base_layer
        in_fp8 = self.fp8 is not None and self.selection.in_fp8
        if scale is None:
            return fp8_linear(x, self.fp8, base.bias) if in_fp8 else base(x)  # type: ignore[arg-type]
        down, up, copies = self.selected()
        if in_fp8:
            return lora_add(fp8_linear(x, self.fp8, base.bias), x, down, up, scale, copies)  # type: ignore[arg-type]
        weight, weight_scale = self.weight()
        return lora_linear(x, weight, base.bias, down, up, scale, copies, weight_scale)

    def weight(self) -> tuple[Tensor, Tensor | None]:
        """The base's weight; if it is packed, with its scale."""
        base = self.base_layer
        return (base.values, base.scale) if isinstance(base, QuantisedLinear) else (base.weight, None)

    def selected(self) -> tuple[Tensor, Tensor, Copies | None]:
        """The selected adapter's factors, which get gradients, and their copies."""
        copies = self.own_copies if self.selection.reads_own_copies else self.copies
        if copies is None:
            return *self.factors(self.selection.adapter), None  # type: ignore[arg-type]
        # Without gradients a compiled block must not depend on the adapter: all adapters then share one graph.
        if torch.is_grad_enabled() and self.selection.adapter in TRAINED:
            return *self.factors(self.selection.adapter), copies
        return *copies, None

    def new_copies(self) -> list[Copies]:
        """Memory for the copies of the joined layers, one pair each."""
        down = self.factors("student")[0].detach()
        downs = down.new_empty(len(self.joined), *down.shape, dtype=self.dtype)
        ups = (member.factors("student")[1].detach() for member in self.joined)
        return [(down, torch.empty_like(up, dtype=self.dtype)) for down, up in zip(downs, ups, strict=True)]

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """An adapter's A [rank, in] and B [out, rank], fp32."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight  # type: ignore[return-value]


def linears(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """`layer(x)` of each layer; adapted linears of one kind are one operation."""
    adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
    selection = adapted[0].selection if len(adapted) == len(layers) else None
    if selection is None or selection.scale is None or selection.in_fp8:
        return [layer(x) for layer in layers]
    weights, scales = zip(*(layer.weight() for layer in adapted), strict=True)
    biases = [layer.base_layer.bias for layer in adapted if layer.base_layer.bias is not None]
    packed = [scale for scale in scales if scale is not None]
    downs, ups, copies = zip(*(layer.selected() for layer in adapted), strict=True)
    given = [pair for pair in copies if pair is not None]
    if any(len(some) not in (0, len(layers)) for some in (biases, packed, given)):
        return [layer(x) for layer in layers]
    return lora_linears(x, weights, biases, downs, ups, selection.scale, given, packed)


def join(layers: Sequence[nn.Module]) -> None:
    """Note that `linears` calls these layers together. Call it before `LoRABank.keep_copies`."""
    group = tuple(layer for layer in layers if isinstance(layer, LoRALinear))
    for layer in group:
        layer.joined = group


def is_for_fp8(layer: LoRALinear, rows: int) -> bool:
    """Whether a linear gets an fp8 copy of its weight; `rows` is the number of its input rows for one sample.

    Layers of one row per sample (modulations, embedders of the time) do not: they cost little, and their rounding error affects
    every token.
    """
    base = layer.base_layer
    return rows > 1 and fits(base.values if isinstance(base, QuantisedLinear) else base.weight)


class LoRABank:
    """Replaces every targeted linear of `network` by a `LoRALinear`, and freezes all other weights.

    Args:
        network: the pre-trained network, changed in place.
        config: rank, alpha, targets, initialisation.
        seed: of the initial A factors (`config.init`), the same for all adapters. B is zero, so all of them start as the teacher.
        with_fake: add the adapter `fake`, the fake score of distribution matching, which is trained too.

    Raises:
        ValueError: if no linear matches `config.targets`.
    """

    def __init__(self, network: nn.Module, config: LoRAConfig, seed: int = 0, *, with_fake: bool = False) -> None:
        self.network = network
        self.config = config
        self.adapters: tuple[str, ...] = (*ADAPTERS, "fake") if with_fake else ADAPTERS
        self.selection = AdapterSelection()
        network.requires_grad_(False)
        names = [
            name
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and re.fullmatch(config.targets, name)
        ]
        if not names:
            raise ValueError(f"lora.targets {config.targets!r} matches none of the network's linears")
        self.layers: dict[str, LoRALinear] = {}
        for name in names:
            parent, _, child = name.rpartition(".")
            layer = LoRALinear(network.get_submodule(name), config, self.selection, self.adapters)  # type: ignore[arg-type]
            setattr(network.get_submodule(parent), child, layer)
            self.layers[name] = layer
        for layer in self.layers.values():
            for name in self.adapters:
                for factor in layer.factors(name):
                    factor.requires_grad_(name in TRAINED)
        self._copies: list[Tensor] = []
        self._own_copies: list[Tensor] = []
        self._masters: dict[str, list[nn.Parameter]] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: tuple[str, Tensor] = ("", torch.empty(0))
        """The layer that was drawn last, and its A, the same for all adapters."""
        if not next(iter(self.layers.values())).base_layer.weight.is_meta:
            for name, layer in self.layers.items():
                for adapter in self.adapters:
                    for side, factor in zip("AB", layer.factors(adapter), strict=True):
                        self._draw(f"{name}.lora_{side}.{adapter}.weight", factor.detach().view(-1), 0)

    def filling(self, base: Fill, student: Fill | None = None) -> Fill:
        """Fills the adapted network: its own weights from `base`, which has their names before adaptation, and the adapters.

        Args:
            base: of the pre-trained weights.
            student: of the student and its averages, by canonical name; None: initial values. A fake score always has these.
        """

        def fill(name: str, part: Tensor, start: int) -> None:
            if ".lora_A." in name or ".lora_B." in name:
                factor, adapter, _ = name.rsplit(".", 2)
                if student is not None and adapter in ADAPTERS:
                    student(f"{factor}.weight", part, start)
                else:
                    self._draw(name, part, start)
            else:
                base(name.replace(".base_layer.", "."), part, start)

        return fill

    @torch.no_grad()
    def _draw(self, name: str, part: Tensor, start: int) -> None:
        """Initial values of a factor. Layers come in the bank's order, since all of them share one generator."""
        layer, _, factor = name.rpartition(".lora_")
        if factor.startswith("B"):
            part.zero_()
            return
        if layer != self._drawn[0]:
            self._drawn = (layer, self._initial_a(self.layers[layer].base_layer.in_features))
        part.copy_(self._drawn[1].view(-1)[start : start + part.numel()])

    def _initial_a(self, inputs: int) -> Tensor:
        """The next layer's A, fp32 [rank, inputs], with the distributions of PEFT's `LoraLayer.reset_lora_parameters`."""
        rank = self.config.rank
        drawn = torch.empty(rank, inputs)
        if self.config.init == "gaussian":
            return drawn.normal_(std=1 / rank, generator=self._generator)
        bound = 1 / math.sqrt(inputs)
        return drawn.uniform_(-bound, bound, generator=self._generator)

    def select(self, adapter: str | None, strength: Tensor | None = None, *, in_fp8: bool = False) -> None:
        """Select the adapter and strength of the next forward. This writes the copies of `keep_copies`.

        Args:
            adapter: one of `adapters`; None: the base without adapter.
            strength: fp32 [B].
            in_fp8: use the fp8 weights of layers that have them.
        """
        self.selection.in_fp8 = in_fp8
        self.selection.adapter = adapter
        self.selection.scale = None if strength is None else strength * (self.config.alpha / self.config.rank)
        is_own = bool(self._own_copies) and adapter == "student" and torch.is_grad_enabled()
        self.selection.reads_own_copies = is_own
        if adapter is not None and self._copies:
            with torch.no_grad():
                copies = self._own_copies if is_own else self._copies
                torch._foreach_copy_(copies, self._masters[adapter])  # type: ignore[arg-type]

    @torch.inference_mode(False)
    def keep_copies(self, *, of_student: bool = False) -> None:
        """From now on `select` casts the whole adapter to the dtype of the products, in a few launches instead of two for each layer.

        All adapters share one set of copies, so each pass casts again: a copy can be no older than its pass, whatever changed the
        masters (optimizer, EMA, restart, checkpoint). A set for each adapter would be cast once a step, and save 0.3 % of a step
        of Flux.1-dev for 1.4 GB at rank 64 (computed). If a pass changes the copies before the backward of another, autograd
        raises. With `of_student` the student's pass with gradient has its own copies, so that other passes may come before its
        backward. The fake score's pass needs none: its backward follows at once.

        It is for masters that lie whole on this device. FSDP2 gathers shards in the compute dtype, so no cast is left; ZeRO-3
        gathers masters in fp32 layer by layer, and each layer casts its own.
        """
        self._copies, self._own_copies, self._masters = [], [], {name: [] for name in self.adapters}
        for layer in self.layers.values():
            layer.copies = None
        for layer in self.layers.values():
            down, _ = layer.factors("student")
            if layer.copies is not None or down.dtype == layer.dtype:
                continue
            for member, copies in zip(layer.joined, layer.new_copies(), strict=True):
                member.copies = copies
                self._copies += copies
                for name, masters in self._masters.items():
                    masters += member.factors(name)
            if of_student:
                for member, copies in zip(layer.joined, layer.new_copies(), strict=True):
                    member.own_copies = copies
                    self._own_copies += copies

    @torch.no_grad()
    def quantise(self, rows: Mapping[str, int]) -> None:
        """Make fp8 copies of the adapted linears' base weights, for forwards with `select(..., in_fp8=True)`. A base in float8 is
        used as it is.

        Args:
            rows: input rows of each linear for one sample, by name; a linear without a number is not used.
        """
        for name, layer in self.layers.items():
            if is_for_fp8(layer, rows.get(name, 0)):
                base = layer.base_layer
                is_packed = isinstance(base, QuantisedLinear)
                layer.fp8 = Fp8Weight(*((base.values, base.scale) if is_packed else quantise(base.weight)))  # type: ignore[arg-type]

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """An adapter's factors, fp32, by canonical name: `<module>.lora_A.weight`, without the adapter's name."""
        return {
            f"{name}.lora_{side}.weight": factor
            for name, layer in self.layers.items()
            for side, factor in zip("AB", layer.factors(adapter), strict=True)
        }


@torch.no_grad()
def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`W + scale * B A`, fp32 [out, in], with A `down` and B `up`; `scale` is `strength * alpha / rank`."""
    return torch.addmm(weight.float(), up, down, alpha=scale)
