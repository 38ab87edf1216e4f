"""Which steps are not applied: a gradient that is no number, a loss that jumps. One decision for all ranks."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

WINDOW, FIRST = 50, 20


class Guard:
    """Judges each step from loss and gradient norm, both already reduced over all ranks.

    Args:
        spike_factor: a loss above this multiple of the median of the last 50 is a spike; None: never. Nothing is a spike
            until 20 steps have been applied.
        max_skips: steps skipped in a row that are tolerated.

    Its memory is part of a run's state: a resumed run must decide as the uninterrupted one.
    """

    def __init__(self, spike_factor: float | None, max_skips: int) -> None:
        self.spike_factor, self.max_skips = spike_factor, max_skips
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.first_skipped: int | None = None
        """First step of the present row of skipped ones."""
        self._in_a_row = 0

    def judge(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why this step must not be applied, or None if it may be.

        Args:
            step: number of the step, from 1.
            loss: mean over the global batch.
            grad_norm: global norm before clipping.
        """
        reason = self._reason(loss, grad_norm)
        if reason is None:
            self._recent.append(loss)
            self._in_a_row, self.first_skipped = 0, None
        else:
            self._in_a_row += 1
            self.first_skipped = self.first_skipped or step
        return reason

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        if self.spike_factor is not None and len(self._recent) >= FIRST:
            usual = statistics.median(self._recent)
            if loss > self.spike_factor * usual:
                return f"loss {loss:.4g} is more than {self.spike_factor:g} x {usual:.4g}, the median of the last steps"
        return None

    @property
    def is_exhausted(self) -> bool:
        """Whether more steps were skipped in a row than are tolerated."""
        return self._in_a_row > self.max_skips

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"recent": list(self._recent), "in_a_row": self._in_a_row, "first_skipped": self.first_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore."""
        recent: Sequence[float] = state["recent"]
        self._recent = deque(recent, maxlen=WINDOW)
        self._in_a_row, self.first_skipped = state["in_a_row"], state["first_skipped"]
