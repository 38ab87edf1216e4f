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
from scfm_core.models.original_names import OtherTools
from scfm_core.models.tensor_files import TensorFiles, adapter_settings
from scfm_core.wording import count

_ROWS = 256
"""Rows of `B A` that are computed at a time. They start at multiples of it, so that a range has the same bits however it is cut."""
_PREFIXES = ("transformer.", "base_model.model.transformer.", "base_model.model.", "diffusion_model.", "unet.")
"""Prefixes of different tools before the name of a module."""
_FLAT_PREFIXES = ("lora_transformer_", "lora_unet_")
"""Prefixes of kohya's names, where `_` stands for `.` too."""
_FACTORS = {"lora_A": "A", "lora_down": "A", "down": "A", "lora_B": "B", "lora_up": "B", "up": "B"}
_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.weight|(.+_lora[12]?)\.(down|up)\.weight")
"""`<layer>.lora_A.weight`, also with the name of an adapter, as PEFT keeps it in memory: `<layer>.lora_A.default.weight`. XLabs:
`<layer>_lora.down.weight`."""


@dataclass(frozen=True, kw_only=True)
class FusedAdapter:
    """A LoRA that is fused into the pre-trained network."""

    path: str
    """Safetensors file with the names of diffusers, PEFT, ComfyUI or kohya; or a folder with one such file."""
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
    given = {Path(adapter.path).name: adapter.weight for adapter in adapters}
    return f"""It was distilled on the base model together with {names}: load both, and set the weights of all adapters in one call.

```python
{lines}
pipe.set_adapters([{styles}, "scfm"], [{weights}, weight_of_the_steps])
```

diffusers scales a LoRA whose layers have several ranks, and that has no alpha, otherwise than in this training, and loses layers of some
files of other tools. `scfm_core.with_steps(pipe, FILE, styles={given})` loads both as in the training.
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


def read_changes(adapters: Sequence[FusedAdapter], tools: OtherTools, network: nn.Module) -> dict[str, Change]:
    """What the adapters together add to the weights of `network`, by name of the weight.

    Args:
        adapters: the files and their weights.
        tools: names of the network's layers in other tools.
        network: with diffusers' modules, adapted by PEFT or not; also on the meta device.

    Raises:
        UserError: if a file is missing or damaged, has tensors that are not of a LoRA of this network's linears, or adapts nothing.
    """
    changes: dict[str, Change] = {}
    for adapter in adapters:
        for module, (down, up) in read_adapter(adapter.file, tools, network).items():
            changes.setdefault(f"{module}.weight", Change()).factors.append((down, up * adapter.weight))
    return changes


def read_adapter(path: Path, tools: OtherTools, network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA's factors by name of the linear: A [rank, in] and B [out, rank], fp32; B is multiplied by alpha / rank.

    Every tensor of the file is used, or the file is refused. diffusers' own conversions lose layers of some files without a message,
    and its loader scales all layers of a file without alpha by the rank of one of them.

    Arguments and errors are those of `read_changes`.
    """
    tensors, settings = _load(path)
    linears = _linears(network)
    names = _Names(linears, tools)
    factors, unknown = names.sort(path, tensors)
    kind = type(network).__name__
    if unknown or not factors:
        found = (
            f"{count(len(unknown), 'tensor')} of {len(tensors)}: {_some(unknown)}" if unknown else "it has no tensors"
        )
        raise UserError(
            f"the adapter {path} does not fit this {kind}: only a LoRA of its linears can be used, and there is no linear for "
            f"{found}. Use a LoRA of this model with the names of diffusers, PEFT, ComfyUI or kohya, without text encoders, DoRA, or "
            f"layers that are not linear"
        )
    shapes = {layer: names.shape(layer) for layer in factors}
    wrong = [
        f"{layer} {sorted((side, list(tensor.shape)) for side, tensor in own.items())}"
        for layer, own in factors.items()
        if not _fits(own, shapes[layer])
    ]
    if wrong:
        raise UserError(
            f"the adapter {path} does not fit this {kind}: a factor is missing or has another shape in {count(len(wrong), 'linear')} of "
            f"{len(factors)}: {_some(wrong)}. It was made for another model"
        )
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, own in factors.items():
        for module, pair in names.parts(layer, own["A"], own["B"] * _scale(layer, own, settings)).items():
            if module in pairs:
                raise UserError(f"the adapter {path} has factors of {module} twice, by two names. Keep one of them")
            pairs[module] = pair
    return pairs


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in fp32, and PEFT's own settings of the adapter: from the header, where diffusers writes them, or beside the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118  (not a dict)
        settings = _checked_settings(json.loads(adapter_settings(path)))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"the adapter {path} cannot be read ({error}). Is it a complete safetensors file?") from error
    return tensors, settings


def _checked_settings(settings: Any) -> dict[str, Any]:
    """PEFT's settings of a network. ValueError if they are of another form.

    PEFT takes the keys of `alpha_pattern` for regular expressions. Those of a stranger's file may run for years, so only names are taken,
    with `^` if only the whole name matches.
    """
    if not isinstance(settings, dict):
        raise ValueError("PEFT's settings in it are not a JSON object")
    settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
    patterns = settings.get("alpha_pattern") or {}
    alphas = [settings.get("lora_alpha", 1.0), *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(isinstance(alpha, int | float) for alpha in alphas):
        raise ValueError("an alpha of PEFT's settings in it is not a number")
    patterns = {key.replace(r"\.", "."): alpha for key, alpha in patterns.items()}
    if odd := [key for key in patterns if not re.fullmatch(r"\^?[\w.]+", key)]:
        raise ValueError(f"the key {odd[0][:80]!r} of PEFT's alpha_pattern in it is not the name of a layer")
    return settings | {"alpha_pattern": patterns}


class _Names:
    """Finds the linears of a tensor by the names of several tools.

    Args:
        linears: (out, in) of each linear of the network.
        tools: names of its layers in other tools.
    """

    def __init__(self, linears: Mapping[str, tuple[int, int]], tools: OtherTools) -> None:
        self._linears = linears
        self._layers = tools.original_layers(linears) | tools.read_layers(linears) | {name: (name,) for name in linears}
        self._flat = {name.replace(".", "_"): name for name in self._layers}
        self._swapped = tools.swapped_modules(linears)

    def sort(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
        """`A`, `B` and `alpha` of each layer of a file, and the names that are of no layer.

        Raises:
            UserError: for a DoRA, or a layer with two names.
        """
        factors: dict[str, dict[str, Tensor]] = {}
        unknown: list[str] = []
        for name, tensor in tensors.items():
            if "dora_scale" in name or "lora_magnitude_vector" in name:
                raise UserError(f"the adapter {path} is a DoRA ({name}), which cannot be used. Use a LoRA")
            if (place := self._place(name)) is None:
                unknown.append(name)
                continue
            layer, part = place
            if part in factors.setdefault(layer, {}):
                raise UserError(f"the adapter {path} has factors of {layer} twice, by two names. Keep one of them")
            factors[layer][part] = tensor
        return factors, unknown

    def _place(self, name: str) -> tuple[str, str] | None:
        """The layer, and `A`, `B` or `alpha`; None if no layer has this name."""
        if match := _FACTOR.fullmatch(name):
            layer, part = match[1] or match[3], _FACTORS[match[2] or match[4]]
        elif name.endswith(".alpha"):
            layer, part = name.removesuffix(".alpha"), "alpha"
            layer = re.sub(r"\.(lora_A|lora_down)$", "", layer)
        else:
            return None
        found = next((rest for rest in _without(layer, _PREFIXES) if rest in self._layers), None)
        found = found or next(
            (self._flat[rest] for rest in _without(layer, _FLAT_PREFIXES) if rest in self._flat), None
        )
        return None if found is None else (found, part)

    def shape(self, layer: str) -> tuple[int, int]:
        """(out, in) of a layer, which may join several linears."""
        shapes = [self._linears[module] for module in self._layers[layer]]
        return sum(outputs for outputs, _ in shapes), shapes[0][1]

    def parts(self, layer: str, down: Tensor, up: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each of our linears that a layer joins."""
        modules = self._layers[layer]
        pairs = {}
        for module, rows in zip(modules, up.split([self._linears[module][0] for module in modules]), strict=True):
            if module in self._swapped and layer != module:
                rows = torch.cat(rows.chunk(2)[::-1])
            # The B of a joined layer may be block-diagonal: each linear needs the columns of its own block.
            used = rows.any(dim=0) if len(modules) > 1 else torch.ones(len(down), dtype=torch.bool)
            used[0] |= not used.any()
            pairs[module] = (down, rows) if used.all() else (down[used], rows[:, used])
        return pairs


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
    if down is None or up is None or down.ndim != 2 or up.ndim != 2 or not len(down):
        return False
    if "alpha" in own and own["alpha"].numel() != 1:
        return False
    return (up.shape[0], down.shape[1]) == shape and up.shape[1] == down.shape[0]


def _scale(module: str, own: Mapping[str, Tensor], settings: Mapping[str, Any]) -> float:
    """alpha / rank: of the tensor `alpha`, else of PEFT's settings, else 1."""
    rank = own["A"].shape[0]
    if "alpha" in own:
        return float(own["alpha"]) / rank
    patterns: dict[str, float] = settings["alpha_pattern"]
    alpha = next((value for key, value in patterns.items() if _is_named(module, key)), None)
    alpha = settings.get("lora_alpha", rank) if alpha is None else alpha
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _is_named(module: str, key: str) -> bool:
    """Whether a key of `alpha_pattern` means a module: it is the whole name with `^`, or the end of it."""
    return module == key[1:] if key.startswith("^") else f".{module}".endswith(f".{key}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
