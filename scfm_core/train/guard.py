"""Which steps are skipped: those with a loss or gradient that is not finite, or a loss spike. All ranks decide the same."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

WINDOW, MIN_APPLIED = 50, 20


class Guard:
    """Decides for each step, from loss and gradient norm over all ranks, whether it is applied or skipped.

    Args:
        spike_factor: a loss above this multiple of the median of the last 50 applied steps is a spike, once 20 steps were
            applied; None: no loss is a spike.
        max_skips: number of consecutive skipped steps that are tolerated.

    The recent losses are part of a run's state: a resumed run must decide like the uninterrupted one.
    """

    def __init__(self, spike_factor: float | None, max_skips: int) -> None:
        self.spike_factor, self.max_skips = spike_factor, max_skips
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.first_skipped: int | None = None
        """First of the current consecutive skipped steps; None if the last step was applied."""
        self._in_a_row = 0

    def judge(self, step: int, loss: float | None, grad_norm: float) -> str | None:
        """Why this step must be skipped; None if it may be applied.

        Args:
            step: number of the step, from 1.
            loss: mean over the rows of the global batch that can be compared (`LossMeter.regression`); None: it has none.
            grad_norm: global gradient norm before clipping.
        """
        reason = self._reason(loss, grad_norm)
        if reason is None:
            if loss is not None:
                self._recent.append(loss)
            self._in_a_row, self.first_skipped = 0, None
        else:
            self._in_a_row += 1
            self.first_skipped = self.first_skipped or step
        return reason

    def _reason(self, loss: float | None, grad_norm: float) -> str | None:
        if loss is not None and not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        if loss is not None and self.spike_factor is not None and len(self._recent) >= MIN_APPLIED:
            median = statistics.median(self._recent)
            if loss > self.spike_factor * median:
                return (
                    f"loss {loss:.4g} is more than {self.spike_factor:g} x {median:.4g}, the median of the last steps"
                )
        return None

    @property
    def is_exhausted(self) -> bool:
        """Whether more consecutive steps were skipped than `max_skips`."""
        return self._in_a_row > self.max_skips

    def state_dict(self) -> dict[str, Any]:
        """The state, which JSON can store."""
        return {"recent": list(self._recent), "in_a_row": self._in_a_row, "first_skipped": self.first_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        recent: Sequence[float] = state["recent"]
        self._recent = deque(recent, maxlen=WINDOW)
        self._in_a_row, self.first_skipped = state["in_a_row"], state["first_skipped"]
