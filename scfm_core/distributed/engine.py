"""The engine protocol, and the engine of one process."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class Engine(Protocol):
    """Backward, optimizer step, and the state that a checkpoint needs. All tensors go by canonical names."""

    lr: float
    """Learning rate of the last applied step."""
    grad_norm: float
    """Global gradient norm of the last step, before clipping."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        ...

    def step(self) -> bool:
        """After every micro-batch; True when this one completed a global batch and the optimizer step was applied."""
        ...

    def state_dict(self) -> State:
        """The optimizer's tensors, `<state>.<parameter>`."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor], step: int) -> None:
        """Restore the optimizer as it was after `step` steps."""
        ...


class NonFiniteGradient(RuntimeError):
    """Loss or gradient is not a number; weights and optimizer are as they were before the step."""


class LocalEngine:
    """Plain AdamW on one process.

    Args:
        parameters: trained parameters, fp32, by canonical name.
        lr: learning rate of step k, counted from 0.
        betas, weight_decay: AdamW's.
        clip_norm: global gradient norm to clip at.
        accumulation: micro-batches a step.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        lr: Callable[[int], float],
        betas: tuple[float, float],
        weight_decay: float,
        clip_norm: float,
        accumulation: int,
    ) -> None:
        self._parameters = dict(parameters)
        self._lr = lr
        self._clip_norm = clip_norm
        self._accumulation = accumulation
        self._micro_batches = 0
        self._steps = 0
        # The fused kernel is one launch a step on a GPU; a CPU has it too, with the same results.
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()), lr=lr(0), betas=betas, weight_decay=weight_decay, fused=True
        )
        self.lr = 0.0
        self.grad_norm = 0.0

    def backward(self, loss: Tensor) -> None:
        """See `Engine`. The sum over micro-batches is the mean over the global batch."""
        (loss / self._accumulation).backward()
        self._micro_batches += 1

    def step(self) -> bool:
        """See `Engine`.

        Raises:
            NonFiniteGradient: before anything was changed.
        """
        if self._micro_batches < self._accumulation:
            return False
        self._micro_batches = 0
        norm = nn.utils.clip_grad_norm_(list(self._parameters.values()), self._clip_norm)
        self.grad_norm = norm.item()
        if not torch.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise NonFiniteGradient(f"the gradient's norm is {self.grad_norm}")
        self.lr = self._lr(self._steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        return True

    def state_dict(self) -> State:
        """See `Engine`: `exp_avg.<name>` and `exp_avg_sq.<name>`; empty before the first step."""
        return {
            f"{kind}.{name}": self._optimizer.state[parameter][kind]
            for name, parameter in self._parameters.items()
            for kind in ("exp_avg", "exp_avg_sq")
            if parameter in self._optimizer.state
        }

    def load_state_dict(self, state: Mapping[str, Tensor], step: int) -> None:
        """See `Engine`.

        Raises:
            ValueError: if a parameter's state is missing.
        """
        self._steps = step
        for name, parameter in self._parameters.items():
            if f"exp_avg.{name}" not in state:
                raise ValueError(f"the optimizer state has nothing for parameter {name!r}")
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(step), dtype=torch.float32, device=parameter.device),
                "exp_avg": state[f"exp_avg.{name}"].to(parameter.device, copy=True),
                "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(parameter.device, copy=True),
            }
