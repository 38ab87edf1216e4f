"""Gradients of weights that every process holds: one vector, summed over the processes while the backward pass still runs.

As in DistributedDataParallel (https://arxiv.org/abs/2006.15704, section 3.2), but with buckets that never change, so that a resumed
run sums in the same order, and with the gradients of all micro-batches in place.
"""

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 100 * 2**20
"""Bytes after which a bucket is complete. The sum of the last bucket is not hidden; each bucket costs the latency of a ring through all
ranks, 4 ms with 512 by the model of train/scale.py. 347 M adapter parameters have 14 buckets."""


class ReplicatedGradients:
    """The gradients of replicated weights as views of one vector; no step copies them.

    Sums start in one order on all ranks, whatever the order in which gradients are complete: a bucket waits for those before it. A
    weight that gets no gradient on one rank delays the sums on this rank to `sum_`, and changes nothing else.

    Args:
        parameters: in the order of the forward pass; their `grad` is set.
        overlapped: start sums within the backward pass that `expect_last_backward` announces. It needs a group whose other
            collectives all come after `sum_`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, overlapped: bool) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=parameters[0].device)
        """All gradients, fp32 [elements]."""
        self._buckets: list[Tensor] = []
        """Parts of `flat` in the order of their sums: the backward completes the last weights first."""
        self._lengths: list[int] = []
        """Weights of each bucket."""
        self._missing: list[int] | None = None
        """Gradients that each bucket waits for; None: this backward pass is not the last."""
        self._sums: list[dist.Work | None] = []
        """Those that were started."""
        end = start = self.flat.numel()
        length = 0
        for parameter, size in zip(reversed(parameters), reversed(sizes), strict=True):
            start, length = start - size, length + 1
            parameter.grad = self.flat[start : start + size].view_as(parameter)
            if overlapped:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._complete, len(self._buckets)))
            if 4 * (end - start) >= BUCKET or start == 0:
                self._buckets.append(self.flat[start:end])
                self._lengths.append(length)
                end, length = start, 0

    def expect_last_backward(self) -> None:
        """The next backward pass is the step's last: what it completes is final."""
        self._missing = list(self._lengths)

    def _complete(self, bucket: int, _: Tensor) -> None:
        if self._missing is None:
            return
        self._missing[bucket] -= 1
        while len(self._sums) < len(self._buckets) and self._missing[len(self._sums)] == 0:
            self._start()

    def _start(self) -> None:
        self._sums.append(dist.all_reduce(self._buckets[len(self._sums)], async_op=True))

    def sum_(self) -> None:
        """After the last backward pass: sum over all ranks, in place. The host waits on a CPU only; a GPU's stream waits."""
        self._missing = None
        while len(self._sums) < len(self._buckets):
            self._start()
        sums, self._sums = self._sums, []
        for started in sums:
            if started is not None:
                started.wait()
