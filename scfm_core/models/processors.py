"""diffusers' own attention processors with a chosen backend of PyTorch's attention."""

import functools
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scfm_core.kernels.attention import SDPA


def choose_backend(network: nn.Module, backend: str) -> None:
    """Let every attention of a network use `backend`; a call that it cannot take uses PyTorch's next one.

    diffusers' `set_attention_backend` is not used: it changes the whole process, and some of its backends ignore a mask. The choice is
    inside the processors' calls, so it holds for the recomputation of a checkpointed block, too.

    Args:
        network: of diffusers, changed in place.
        backend: a key of `scfm_core.kernels.attention.SDPA`.
    """
    order = tuple(dict.fromkeys((SDPA[backend], SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)))
    for module in network.modules():
        if (processor := getattr(module, "processor", None)) is not None:
            processor.__class__ = _with_order(type(processor), order)  # type: ignore[arg-type]


@functools.cache
def _with_order(processor: Any, order: tuple[SDPBackend, ...]) -> type:
    @functools.wraps(processor.__call__)  # diffusers drops arguments that the signature does not have
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(list(order), set_priority=True):
            return processor.__call__(self, *args, **kwargs)

    return type(processor.__name__, (processor,), {"__call__": call})
