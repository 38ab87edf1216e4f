"""What a trainer takes from outside of itself: device, data, model, kernels and weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scfm_core.data.corpus import Corpus
from scfm_core.filling import Fill
from scfm_core.models.protocol import ModelFamily
from scfm_core.readback import read_back
from scfm_core.train.assemble import build_family
from scfm_core.train.config import RunConfig
from scfm_core.train.device import resolve_device
from scfm_core.train.inputs import BatchEncoder
from scfm_core.train.kernels import Kernels, choose_kernels


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The real ones are the defaults. A trace of the step replaces them, so that the trainer needs no data, weights or GPU."""

    device: Callable[[str], torch.device] = resolve_device
    """`run.device` -> the device."""
    corpus: Callable[..., Corpus] = Corpus
    """`corpus(config.data, with_paths=...)`."""
    family: Callable[[RunConfig], ModelFamily] = build_family
    kernels: Callable[[RunConfig, ModelFamily, torch.device], Kernels] = choose_kernels
    encoder: Callable[..., BatchEncoder] = BatchEncoder
    """The class, or a function with its arguments."""
    fill: Fill | None = None
    """Writes all weights, those of adapters too. None: the pre-trained weights and the initial values of the configuration."""
    read_back: Callable[[Tensor, Tensor, Tensor], list[list[float]]] = read_back
    """Reads a step's loss sums, its status and its gradient norm. Tensors of a trace have no values."""
