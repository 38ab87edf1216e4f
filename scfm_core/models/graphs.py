"""CUDA graphs of the passes without gradient: one launch per pass. They help where launches cost more than the work."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scfm_core.models.conditioning import Conditioning

Velocity = Callable[[Tensor, Tensor, Conditioning, Tensor], Tensor]
WARM_UP = 3
"""Calls before a capture, which must not contain compilation, autotuning or the allocation of workspaces."""


@dataclass
class _Captured:
    inputs: list[Tensor]
    output: Tensor
    graph: torch.cuda.CUDAGraph


class GraphedVelocity:
    """A velocity as a CUDA graph, captured once per set of shapes and dtypes.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. Other tensors that the velocity reads
    (weights, adapters) must keep their addresses; their values may change. All graphs share the memory of one pass: they run one after
    the other, and a result is copied before the next one runs.

    Args:
        velocity: `velocity(x, sigma, cond, strength)`, without gradient, without synchronisation with the host.
        shared: its graphs' memory is used too.
    """

    def __init__(self, velocity: Velocity, shared: "GraphedVelocity | None" = None) -> None:
        self._velocity = velocity
        # Not one pool for the process: PyTorch drops it with its last graph, and fails if it is used again.
        self._pool: Any = torch.cuda.graph_pool_handle() if shared is None else shared._pool
        self._captured: dict[tuple, _Captured] = {}

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning, strength: Tensor) -> Tensor:
        """The velocity's result, in new memory."""
        inputs = [x, sigma, strength.to(x.device, non_blocking=True), *cond.fields.values()]
        if cond.guidance is not None:
            inputs.append(cond.guidance)
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._captured:
            self._captured[key] = self._capture([tensor.clone() for tensor in inputs], list(cond.fields))
        captured = self._captured[key]
        for static, current in zip(captured.inputs, inputs, strict=True):
            static.copy_(current)
        captured.graph.replay()
        return captured.output.clone()

    def _capture(self, inputs: list[Tensor], names: list[str]) -> _Captured:
        (x, sigma, strength), fields, guidance = inputs[:3], inputs[3 : 3 + len(names)], inputs[3 + len(names) :]
        cond = Conditioning(fields=dict(zip(names, fields, strict=True)), guidance=guidance[0] if guidance else None)
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UP):
                self._velocity(x, sigma, cond, strength)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._velocity(x, sigma, cond, strength)
        return _Captured(inputs, output, graph)
