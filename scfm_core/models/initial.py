"""Random initial weights, one module at a time: no process holds a whole network."""

import contextlib
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from scfm_core.progress import beat

_DRAWS = ("uniform_", "normal_", "kaiming_uniform_", "xavier_uniform_")
"""Functions of `torch.nn.init` by which constructors of modules draw."""


@contextlib.contextmanager
def no_draws_on_meta() -> Iterator[None]:
    """Constructors of modules draw nothing for parameters on the meta device, where a draw is slow Python code."""
    before = {name: getattr(nn.init, name) for name in _DRAWS}

    def unless_meta(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda tensor, *arguments, **options: tensor if tensor.is_meta else draw(tensor, *arguments, **options)

    for name, draw in before.items():
        setattr(nn.init, name, unless_meta(draw))
    try:
        yield
    finally:
        for name, draw in before.items():
            setattr(nn.init, name, draw)


@contextlib.contextmanager
def parameters_on_meta(*, only_drawn: bool = False) -> Iterator[None]:
    """Networks that are made within have their parameters on the meta device. Their buffers are real.

    Args:
        only_drawn: keep the parameters of modules that have no `reset_parameters`, such as the ones of diffusers' RMSNorm.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and (not only_drawn or hasattr(module, "reset_parameters")):
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        with no_draws_on_meta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def is_modulation(name: str, module: nn.Module) -> bool:
    """Whether a module of a network starts at zero: adaLN-zero (DiT, arXiv 2212.09748)."""
    return isinstance(module, nn.Linear) and (
        re.search(r"norm|modulation|_mod\.|distilled_guidance_layer\.out_proj", name) is not None or name == "proj_out"
    )


def zero_modulation(network: nn.Module) -> None:
    """adaLN-zero: every block starts as the identity, and the network's output is zero."""
    for name, module in network.named_modules():
        if is_modulation(name, module):
            _zero(module)


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)


class RandomWeights:
    """The weights that a network gets from its constructor after `torch.manual_seed(seed)`, with `zero_modulation`.

    Modules are drawn in the network's order, so parameters must be asked for in this order; some may be left out.

    Args:
        network: made within `parameters_on_meta(only_drawn=True)`; it is used up.
        seed: of the CPU's generator.
    """

    def __init__(self, network: nn.Module, seed: int) -> None:
        self._modules = iter(list(network.named_modules()))
        self._buffers = dict(network.named_buffers())
        self._drawn: dict[str, Tensor] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._state = torch.get_rng_state()

    @torch.no_grad()
    def fill(self, name: str, part: Tensor, start: int) -> None:
        """See `scfm_core.filling.Fill`."""
        while name not in self._buffers and name not in self._drawn:
            self._draw(*next(self._modules))
        tensor = self._buffers[name] if name in self._buffers else self._drawn[name]
        part.copy_(tensor.view(-1)[start : start + part.numel()])

    def _draw(self, name: str, module: nn.Module) -> None:
        beat(f"drawing {name}")
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._state)
            if hasattr(module, "reset_parameters"):
                module.to_empty(device="cpu", recurse=False)
                module.reset_parameters()  # type: ignore[operator]
            self._state = torch.get_rng_state()
        if is_modulation(name, module):
            _zero(module)
        self._drawn = {
            f"{name}.{key}".removeprefix("."): parameter
            for key, parameter in module._parameters.items()
            if parameter is not None
        }
        module._parameters.clear()
