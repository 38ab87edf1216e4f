"""The pre-trained network of a pipeline's folder: its weights with fused adapters, its fingerprint, its architecture alone."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scfm_core.filling import kept_in_fp32, materialise, stored_tensors
from scfm_core.models.fingerprint import different_network, network_fingerprint
from scfm_core.models.fused_base import Change, FusedAdapter, FusedFiles, read_changes
from scfm_core.models.initial import RandomWeights, no_draws_on_meta, parameters_on_meta
from scfm_core.models.original_names import OtherTools
from scfm_core.models.quantised import Base, quantise_linears
from scfm_core.models.tensor_files import TensorFiles


class Pretrained(ABC):
    """How the network of a folder in diffusers' format is made. `ModelFamily` adds how it is called."""

    folder: Path
    """The pipeline."""
    pipeline: str
    """Class name of diffusers' pipeline."""
    network_config: dict[str, Any]
    """`config.json` of the transformer."""
    adapters: tuple[FusedAdapter, ...] = ()
    """Fused into the pre-trained weights; set by `open_family`."""
    other_tools: ClassVar[OtherTools] = OtherTools()
    """Names of the network's layers in other tools."""

    @property
    @abstractmethod
    def network_class(self) -> Any:
        """The class of diffusers' transformer."""

    @abstractmethod
    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The network's blocks, which are sharded, checkpointed, compiled and quantised one by one."""

    def load_network(self, dtype: torch.dtype, device: torch.device | str, base: Base = "bfloat16") -> nn.Module:
        """The pre-trained transformer on one device, in `dtype`; see `empty_network`. `base`: how its blocks are stored.

        Raises:
            UserError: if its weights are missing, damaged or of another architecture.
        """
        network = self.empty_network(dtype)
        with self.open_weights(network) as files:
            quantise_linears(network, self.blocks(network), base)
            materialise(network, device, files.fill)
        return network

    def empty_network(self, dtype: torch.dtype) -> nn.Module:
        """The transformer without weights: parameters of `dtype` on the meta device, buffers on the CPU; in eval mode.

        Parameters that diffusers keeps in fp32 are fp32; see `kept_in_fp32`.
        """
        with parameters_on_meta():
            network: nn.Module = self.network_class.from_config(dict(self.network_config))
        network = nn.Module.to(network, dtype).eval()  # diffusers' own `to` would warn
        for parameter in kept_in_fp32(network).values():
            parameter.data = parameter.data.float()
        return network

    def open_weights(self, network: nn.Module) -> FusedFiles:
        """The files of the pre-trained weights, checked against `network` as `empty_network` makes it. Local work.

        What `adapters` add to the weights is added while they are read.

        Raises:
            UserError: if they, or the adapters, are missing, damaged or of another architecture.
        """
        files = TensorFiles(self.folder / "transformer")
        files.check(stored_tensors(network))
        return FusedFiles(files, self.changes(network))

    def changes(self, network: nn.Module) -> dict[str, Change]:
        """What `adapters` add to the pre-trained weights, by name; see `read_changes`."""
        return read_changes(self.adapters, self.other_tools, network) if self.adapters else {}

    def read_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every pre-trained weight by name, one at a time; fp32 if `adapters` change it, else as it is stored."""
        changes = self.changes(self.meta_network())
        with TensorFiles(self.folder / "transformer") as files:
            for name, weight in files.tensors():
                if name in changes:
                    weight = weight.float()
                    changes[name].add_to(weight.view(-1), 0)
                yield name, weight

    def random_weights(self, seed: int) -> RandomWeights:
        """Random initial weights, for training from scratch."""
        with parameters_on_meta(only_drawn=True):
            return RandomWeights(self.network_class.from_config(dict(self.network_config)), seed)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the pre-trained network with its adapters, as the files were when this was first read."""
        return network_fingerprint(self.folder, self._adapter_files)

    def different_network(self, recorded: str | None, *, with_adapters: bool = True) -> str | None:
        """In which files the pre-trained network now differs from a recorded fingerprint; None if it is the same.

        Args:
            recorded: a `fingerprint`.
            with_adapters: compare the adapters too.
        """
        return different_network(recorded, self.folder, self._adapter_files if with_adapters else None)

    @property
    def _adapter_files(self) -> list[tuple[Path, float]]:
        return [(adapter.file, adapter.weight) for adapter in self.adapters]

    def meta_network(self) -> nn.Module:
        """The transformer on the meta device: its architecture without weights."""
        with torch.device("meta"), no_draws_on_meta():
            network: nn.Module = self.network_class.from_config(dict(self.network_config))
        return network
