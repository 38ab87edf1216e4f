"""Adapters of other tools, such as the LoRA of a style, fused into the weights of the pre-trained network while they are loaded.

The sum is fp32, and is then cast to the dtype of the network. So the fused network is a pre-trained network like any other:
teacher, student, evaluation and export see nothing else.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from scfm_core.errors import UserError
from scfm_core.models.tensor_files import TensorFiles, adapter_settings
from scfm_core.wording import count

_ROWS = 256
"""Rows of `B A` that are computed at a time. They start at multiples of it, so that a range has the same bits however it is cut."""
_PREFIXES = ("transformer.", "base_model.model.transformer.", "base_model.model.", "diffusion_model.", "unet.")
"""Prefixes of different tools before the name of a module."""
_FLAT_PREFIXES = ("lora_transformer_", "lora_unet_")
"""Prefixes of kohya's names, where `_` stands for `.` too."""
_FACTORS = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B"}
_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.weight")
"""`<module>.lora_A.weight`, also with the name of an adapter, as PEFT keeps it in memory: `<module>.lora_A.default.weight`."""


@dataclass(frozen=True, kw_only=True)
class FusedAdapter:
    """A LoRA that is fused into the pre-trained network."""

    path: str
    """Safetensors file with the names of diffusers, PEFT or kohya; or a folder with one such file."""
    weight: float = 1.0
    """Factor of its change of the weights, as in diffusers' `set_adapters`."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"model.adapters: the weight of {self.path} must be finite and not 0, got {self.weight}")

    @property
    def file(self) -> Path:
        """The safetensors file; see `adapter_file`."""
        return adapter_file(self.path)


def parse_adapter(text: str) -> FusedAdapter:
    """An adapter of the command line: `style.safetensors=0.8`, or the file alone with weight 1.

    Raises:
        UserError: if the weight is not a number, or 0.
    """
    path, equals, weight = text.rpartition("=")
    try:
        return FusedAdapter(path=path, weight=float(weight)) if equals else FusedAdapter(path=text)
    except ValueError as error:
        raise UserError(f"--adapter {text!r} is not of the form FILE=WEIGHT: {error}") from error


def adapter_file(path: str | Path) -> Path:
    """The safetensors file of an adapter: `path`, or the only one in this folder.

    Raises:
        UserError: if there is none, or the folder has several.
    """
    path = Path(path).expanduser()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(
            f"there is no adapter {str(path)!r}. Give a local safetensors file; `hf download OWNER/NAME` downloads one from the hub"
        )
    if len(files) > 1:
        raise UserError(f"{path} has several adapters: {', '.join(file.name for file in files)}. Give one of them")
    return files[0]


def describe(adapters: Sequence[FusedAdapter]) -> str:
    """For the card of an adapter that was distilled on a base with these adapters: what that means, and how to load both.

    Empty without adapters.
    """
    if not adapters:
        return ""
    names = " and ".join(f"`{Path(adapter.path).name}` (weight {adapter.weight:g})" for adapter in adapters)
    lines = "\n".join(
        f'pipe.load_lora_weights("{Path(adapter.path).name}", adapter_name="style{number}")'
        for number, adapter in enumerate(adapters)
    )
    styles = ", ".join(f'"style{number}"' for number in range(len(adapters)))
    weights = ", ".join(f"{adapter.weight:g}" for adapter in adapters)
    return f"""It was distilled on the base model together with {names}: load both, and set the weights of all adapters in one call.

```python
{lines}
pipe.set_adapters([{styles}, "scfm"], [{weights}, weight_of_the_steps])
```
"""


@dataclass
class Change:
    """What adapters add to one weight [out, in]: the sum of `B A`."""

    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """A [rank, in] and B [out, rank] of each adapter, fp32; B has the weight and alpha / rank."""

    def add_to(self, part: Tensor, start: int) -> None:
        """Add it to the elements from `start` on of the flattened weight: `part`, 1-D, fp32 on the CPU."""
        width = self.factors[0][0].shape[1]
        stop, row = start + part.numel(), start // width // _ROWS * _ROWS
        while row * width < stop:
            change = sum(up[row : row + _ROWS] @ down for down, up in self.factors)
            assert isinstance(change, Tensor)
            first, last = max(start, row * width), min(stop, row * width + change.numel())
            part[first - start : last - start] += change.flatten()[first - row * width : last - row * width]
            row += _ROWS


class FusedFiles:
    """Files of pre-trained weights, and what adapters add to them.

    Args:
        files: of the pre-trained weights; closed with this.
        changes: by name of the weight.
    """

    def __init__(self, files: TensorFiles, changes: Mapping[str, Change]) -> None:
        self._files, self._changes = files, changes

    def fill(self, name: str, part: Tensor, start: int) -> None:
        """See `scfm_core.filling.Fill`."""
        change = self._changes.get(name)
        if change is None:
            self._files.fill(name, part, start)
            return
        size = _ROWS * change.factors[0][0].shape[1]
        for at in range(0, part.numel(), size):
            target = part[at : at + size]
            weights = torch.empty(target.numel(), dtype=torch.float32)
            self._files.fill(name, weights, start + at)
            change.add_to(weights, start + at)
            target.copy_(weights)

    def __enter__(self) -> "FusedFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()


def read_changes(adapters: Sequence[FusedAdapter], pipeline: Any, network: nn.Module) -> dict[str, Change]:
    """What the adapters together add to the weights of `network`, by name of the weight.

    Args:
        adapters: the files and their weights.
        pipeline: diffusers' class of the pipeline, which knows the names of other tools.
        network: with diffusers' modules, adapted by PEFT or not; also on the meta device.

    Raises:
        UserError: if a file is missing or damaged, has tensors that are not of a LoRA of this network's linears, or adapts nothing.
    """
    changes: dict[str, Change] = {}
    for adapter in adapters:
        for module, (down, up) in read_adapter(adapter.file, pipeline, network).items():
            changes.setdefault(f"{module}.weight", Change()).factors.append((down, up * adapter.weight))
    return changes


def read_adapter(path: Path, pipeline: Any, network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA's factors by name of the linear: A [rank, in] and B [out, rank], fp32; B is multiplied by alpha / rank.

    Arguments and errors are those of `read_changes`.
    """
    tensors, metadata = _load(path)
    linears = _linears(network)
    names = _Names(list(linears))
    if not all(names.is_known(name) for name in tensors):
        tensors = _convert(path, tensors, pipeline)
    factors: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        if (place := names.place(name)) is None:
            unknown.append(name)
        else:
            factors.setdefault(place[0], {})[place[1]] = tensor
    kind = type(network).__name__
    if unknown or not factors:
        found = (
            f"{count(len(unknown), 'tensor')} of {len(tensors)}: {_some(unknown)}" if unknown else "it has no tensors"
        )
        raise UserError(
            f"the adapter {path} does not fit this {kind}: only a LoRA of its linears can be used, and there is no linear for "
            f"{found}. Use a LoRA of this model, without text encoders, DoRA, or layers that are not linear"
        )
    wrong = [
        f"{module} {sorted((side, list(tensor.shape)) for side, tensor in own.items())}"
        for module, own in factors.items()
        if not _fits(own, linears[module])
    ]
    if wrong:
        raise UserError(
            f"the adapter {path} does not fit this {kind}: a factor is missing or has another shape in {count(len(wrong), 'linear')} of "
            f"{len(factors)}: {_some(wrong)}. It was made for another model"
        )
    return {module: (own["A"], own["B"] * _scale(module, own, metadata)) for module, own in factors.items()}


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in fp32, and PEFT's own settings of the adapter: from the header, where diffusers writes them, or beside the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118  (not a dict)
        settings = json.loads(adapter_settings(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the adapter {path} cannot be read ({error}). Is it a complete safetensors file?") from error
    return tensors, {key.removeprefix("transformer."): value for key, value in settings.items()}


def _convert(path: Path, tensors: dict[str, Tensor], pipeline: Any) -> dict[str, Tensor]:
    """The names that diffusers gives to an adapter of another tool."""
    if dora := [name for name in tensors if "dora_scale" in name]:
        raise UserError(f"the adapter {path} is a DoRA ({dora[0]}), which cannot be fused. Use a LoRA")
    try:
        # Only Flux's returns alphas apart; all others ignore the argument.
        found = pipeline.lora_state_dict(dict(tensors), return_alphas=True)
    except Exception as error:  # it fails in many ways with names that it does not know
        raise UserError(
            f"the adapter {path} has names of no tool that diffusers knows for {pipeline.__name__} ({type(error).__name__}: "
            f"{str(error)[:200]}). Names: {_some(list(tensors))}"
        ) from error
    state, alphas = found if isinstance(found, tuple) else (found, None)
    return {**state, **(alphas or {})}


class _Names:
    """Finds the linear of a tensor by the names of several tools."""

    def __init__(self, linears: Sequence[str]) -> None:
        self._linears = set(linears)
        self._flat = {name.replace(".", "_"): name for name in linears}

    def place(self, name: str) -> tuple[str, str] | None:
        """The linear, and `A`, `B` or `alpha`; None if no linear has this name."""
        if match := _FACTOR.fullmatch(name):
            module, part = match[1], _FACTORS[match[2]]
        elif name.endswith(".alpha"):
            module, part = name.removesuffix(".alpha"), "alpha"
            module = re.sub(r"\.(lora_A|lora_down)$", "", module)
        else:
            return None
        found = next((rest for rest in _without(module, _PREFIXES) if rest in self._linears), None)
        found = found or next(
            (self._flat[rest] for rest in _without(module, _FLAT_PREFIXES) if rest in self._flat), None
        )
        return None if found is None else (found, part)

    def is_known(self, name: str) -> bool:
        """Whether `place` finds a linear."""
        return self.place(name) is not None


def _without(name: str, prefixes: Sequence[str]) -> list[str]:
    return [name, *(name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix))]


def _linears(network: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear by name, without what PEFT put around it."""
    return {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and not re.search(r"\.lora_[AB]\.", name)
    }


def _fits(own: Mapping[str, Tensor], shape: tuple[int, int]) -> bool:
    down, up = own.get("A"), own.get("B")
    if down is None or up is None or down.ndim != 2 or up.ndim != 2:
        return False
    return (up.shape[0], down.shape[1]) == shape and up.shape[1] == down.shape[0]


def _scale(module: str, own: Mapping[str, Tensor], settings: Mapping[str, Any]) -> float:
    """alpha / rank: of the tensor `alpha`, else of PEFT's settings, else 1."""
    rank = own["A"].shape[0]
    if "alpha" in own:
        return float(own["alpha"]) / rank
    patterns: dict[str, float] = settings.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?{key}", module)), None)
    alpha = settings.get("lora_alpha", rank) if alpha is None else alpha
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
