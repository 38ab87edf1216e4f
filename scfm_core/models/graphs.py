"""CUDA graphs of the passes without gradient: one launch a pass, where launching costs more than the work (small batches)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scfm_core.models.protocol import Conditioning

Velocity = Callable[[Tensor, Tensor, Conditioning, Tensor], Tensor]
_WARM_UP = 3  # calls before a capture: compilation, autotuning and workspaces must not fall into it


@dataclass
class _Captured:
    inputs: list[Tensor]
    output: Tensor
    graph: torch.cuda.CUDAGraph


class GraphedVelocity:
    """A velocity as a CUDA graph, captured once for each set of shapes: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs

    What it reads beside its arguments (weights, adapters) must stay where it is in memory and may change there. A graph
    keeps the memory of one pass.

    Args:
        velocity: `velocity(x, sigma, cond, strength)`, without gradient, without synchronisation.
    """

    def __init__(self, velocity: Velocity) -> None:
        self._velocity = velocity
        self._captured: dict[tuple, _Captured] = {}

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning, strength: Tensor) -> Tensor:
        """As the velocity itself."""
        inputs = [x, sigma, strength, cond.text, cond.pooled]
        if cond.guidance is not None:
            inputs.append(cond.guidance)
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._captured:
            self._captured[key] = self._capture([tensor.clone() for tensor in inputs])
        captured = self._captured[key]
        for static, given in zip(captured.inputs, inputs, strict=True):
            static.copy_(given)
        captured.graph.replay()
        return captured.output.clone()

    def _capture(self, inputs: list[Tensor]) -> _Captured:
        x, sigma, strength, text, pooled, *guidance = inputs
        cond = Conditioning(text=text, pooled=pooled, guidance=guidance[0] if guidance else None)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._velocity(x, sigma, cond, strength)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._velocity(x, sigma, cond, strength)
        return _Captured(inputs, output, graph)
