"""The two averages of the student: fast (near half of the self slice) and slow (far half)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Parts that wrappers add to parameter names (torch.compile, DDP, checkpoint wrappers). Averages with such names no longer
# match the student when the wrapping changes, and are then silently not updated.
_WRAPPER_PARTS = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def canonical_name(name: str) -> str:
    """A parameter's name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Decays and restarts of the two averages."""

    fast: float = 0.99
    """Decay of the fast average, per optimizer step."""
    slow: float = 0.999
    """Decay of the slow average, per optimizer step."""
    restart_every: int | Literal["auto"] | None = None
    """Updates between restarts; a restart sets both averages to the student (the paper's cyclic restart: 1000). `auto`: restart
    when the averages lag behind a steady drift of the student (scfm/restart.py). none: no restarts."""

    def __post_init__(self) -> None:
        if not 0 <= self.fast <= self.slow < 1:
            raise ValueError(f"ema needs 0 <= fast <= slow < 1, got fast {self.fast}, slow {self.slow}")
        if isinstance(self.restart_every, int) and self.restart_every < 1:
            raise ValueError(f"ema.restart_every must be at least 1, auto or none, got {self.restart_every}")
        if self.restart_every == "auto" and self.fast == self.slow:
            raise ValueError("ema.restart_every=auto compares a fast and a slow average: their decays must differ")


class DualEMA:
    """Exponential moving averages of the student's trained weights, in place and in fp32.

    In bf16 an average stalls: with decay 0.999 its update is below half a unit in the last place. Tensors narrower than
    fp32 are therefore refused.

    Args:
        student: trained parameters by name.
        fast, slow: the tensors that hold the averages, of the same names and shapes. They are typically the parameters of
            the networks that use them, so that no copy is needed. None: clones of the student.
        config: decays.

    Both averages are set to the student on construction.

    Raises:
        ValueError: if names or shapes differ, or a tensor is narrower than fp32.
    """

    def __init__(
        self,
        student: Mapping[str, Tensor],
        fast: Mapping[str, Tensor] | None = None,
        slow: Mapping[str, Tensor] | None = None,
        *,
        config: EMAConfig | None = None,
    ) -> None:
        self.config = config or EMAConfig()
        self._student = _canonical(student)
        self._averages = {
            name: _canonical(given) if given is not None else {k: v.detach().clone() for k, v in self._student.items()}
            for name, given in (("fast", fast), ("slow", slow))
        }
        if not self._student:
            raise ValueError("there is no trained tensor to average")
        for which, average in self._averages.items():
            if average.keys() != self._student.keys():
                raise ValueError(
                    f"names of the {which} EMA and the student differ: {average.keys() ^ self._student.keys()}"
                )
            for name, tensor in average.items():
                if tensor.shape != self._student[name].shape:
                    raise ValueError(f"{which} EMA of {name!r} has shape {tuple(tensor.shape)}, not the student's")
        for name, tensor in [item for group in (self._student, *self._averages.values()) for item in group.items()]:
            if tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"EMA of {name!r} needs fp32 masters, got {tensor.dtype}")
        # The foreach kernels pair tensors by position.
        self._averages = {
            which: {name: average[name] for name in self._student} for which, average in self._averages.items()
        }
        self.restart()

    @property
    def student(self) -> dict[str, Tensor]:
        """The student's trained weights, by canonical name."""
        return self._student

    @property
    def fast(self) -> dict[str, Tensor]:
        """The fast average, by canonical name."""
        return self._averages["fast"]

    @property
    def slow(self) -> dict[str, Tensor]:
        """The slow average, by canonical name."""
        return self._averages["slow"]

    @torch.no_grad()
    def update(self) -> None:
        """Update after an optimizer step: `ema += (1 - decay) * (student - ema)`. Local to each shard, without a collective."""
        student = list(self._student.values())
        for average, decay in ((self.fast, self.config.fast), (self.slow, self.config.slow)):
            torch._foreach_lerp_(list(average.values()), student, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Set both averages to the student (paper, cyclic restart)."""
        student = list(self._student.values())
        for average in (self.fast, self.slow):
            torch._foreach_copy_(list(average.values()), student)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """`{"fast": {name: tensor}, "slow": {...}}`, the live tensors."""
        return {name: dict(average) for name, average in self._averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy saved averages in place.

        Raises:
            ValueError: if an average or a name is missing or unknown, or a shape differs.
        """
        if set(state) != {"fast", "slow"}:
            raise ValueError(f"an EMA state holds 'fast' and 'slow', got {sorted(state)}")
        for which, average in self._averages.items():
            saved = _canonical(state[which])
            if saved.keys() != average.keys():
                raise ValueError(f"names in the saved {which} EMA differ: {sorted(saved.keys() ^ average.keys())[:4]}")
            for name, tensor in average.items():
                if saved[name].shape != tensor.shape:
                    raise ValueError(
                        f"the saved {which} EMA of {name!r} has shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}"
                    )
                tensor.copy_(saved[name])


def _canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {canonical_name(name): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        duplicates = sorted(n for n in tensors if canonical_name(n) != n and canonical_name(n) in tensors)
        raise ValueError(f"two tensors have the same name without the parts that wrappers add: {duplicates}")
    return named
