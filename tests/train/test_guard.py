"""Which steps are skipped: every decision in closed form."""

import json
import math

import pytest

from scfm_core.train.guard import MIN_APPLIED, WINDOW, Guard


def make_guard(spike_factor: float | None = 10.0, max_skips: int = 5, losses=()) -> Guard:
    """A guard after steps with `losses`, which were all applied."""
    guard = Guard(spike_factor, max_skips)
    for step, loss in enumerate(losses, 1):
        assert guard.judge(step, loss, 1.0) is None
    return guard


def through_json(guard: Guard, **changes) -> Guard:
    other = Guard(**{"spike_factor": guard.spike_factor, "max_skips": guard.max_skips, **changes})
    other.load_state_dict(json.loads(json.dumps(guard.state_dict(), allow_nan=False)))
    return other


class TestNumbers:
    @pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
    def test_a_loss_that_is_not_finite(self, loss):
        assert make_guard().judge(1, loss, 1.0) == f"loss is {loss}"

    @pytest.mark.parametrize("norm", [math.nan, math.inf])
    def test_a_gradient_that_is_not_finite(self, norm):
        assert make_guard().judge(1, 0.5, norm) == f"gradient norm is {norm}"

    def test_the_loss_is_named_if_both_are_not_finite(self):
        """It is the cause: its gradient is not finite either."""
        assert make_guard().judge(1, math.nan, math.nan) == "loss is nan"

    @pytest.mark.parametrize(("loss", "norm"), [(0.0, 0.0), (-1.0, 1e30), (1e30, 1e-30)])
    def test_any_finite_step_is_applied(self, loss, norm):
        assert make_guard().judge(1, loss, norm) is None

    def test_are_checked_without_a_spike_factor(self):
        guard = make_guard(None)
        assert guard.judge(1, math.nan, 1.0) == "loss is nan"
        assert guard.judge(2, 1.0, math.inf) == "gradient norm is inf"


class TestSpikes:
    def test_constants_are_the_documented_ones(self):
        assert (WINDOW, MIN_APPLIED) == (50, 20)

    @pytest.mark.parametrize("applied", [0, 1, 19])
    def test_no_spike_before_twenty_applied_steps(self, applied):
        assert make_guard(losses=[1.0] * applied).judge(applied + 1, 1e6, 1.0) is None

    def test_a_spike_after_twenty_applied_steps(self):
        reason = make_guard(losses=[1.0] * 20).judge(21, 1e6, 1.0)
        assert reason == "loss 1e+06 is more than 10 x 1, the median of the last steps"

    def test_skipped_steps_do_not_count_towards_the_twenty(self):
        guard = make_guard(losses=[1.0] * 19)
        for step in range(20, 30):
            assert guard.judge(step, math.nan, 1.0) == "loss is nan"
        assert guard.judge(30, 1e6, 1.0) is None  # the twentieth
        assert guard.judge(31, 1e6, 1.0) is not None

    def test_a_loss_at_the_threshold_is_applied(self):
        assert make_guard(4.0, losses=[0.5] * 20).judge(21, 2.0, 1.0) is None
        assert make_guard(4.0, losses=[0.5] * 20).judge(21, math.nextafter(2.0, 3.0), 1.0) is not None

    def test_the_median_counts_and_not_the_mean(self):
        """Mean 100.9, median 1."""
        guard = make_guard(None, losses=[1.0] * 18 + [1000.0, 1000.0])
        assert through_json(guard, spike_factor=10.0).judge(21, 11.0, 1.0) is not None

    def test_the_median_of_an_even_number_is_between_the_middle_two(self):
        guard = make_guard(10.0, losses=[1.0] * 10 + [3.0] * 10)
        assert guard.judge(21, 20.0, 1.0) is None
        assert make_guard(10.0, losses=[1.0] * 10 + [3.0] * 10).judge(21, 20.5, 1.0) is not None

    def test_the_median_is_of_the_last_fifty(self):
        """After 24 steps at a new level the old level is still in the majority, after 26 it is not."""
        old, new = [1.0] * 60, [9.0] * 24
        assert make_guard(losses=old + new).judge(85, 50.0, 1.0) is not None
        assert make_guard(losses=old + new + [9.0] * 2).judge(87, 50.0, 1.0) is None

    def test_skipped_losses_do_not_enter_the_window(self):
        """Otherwise repeated spikes would become the median."""
        guard = make_guard(max_skips=1000, losses=[1.0] * 50)
        for step in range(51, 151):
            assert guard.judge(step, 100.0, 1.0) is not None
        assert guard.judge(151, 1.0, math.nan) is not None
        assert guard.state_dict()["recent"] == [1.0] * 50

    def test_applied_losses_enter_the_window(self):
        assert make_guard(losses=[float(n) for n in range(1, 8)]).state_dict()["recent"] == [1, 2, 3, 4, 5, 6, 7]

    def test_a_step_without_a_comparable_loss(self):
        """It is applied, does not touch the median, and is skipped only for its gradient."""
        guard = make_guard(losses=[1.0] * 20)
        assert guard.judge(21, None, 1.0) is None
        assert guard.state_dict()["recent"] == [1.0] * 20
        assert guard.judge(22, None, math.nan) == "gradient norm is nan"

    def test_no_spike_without_a_factor(self):
        assert make_guard(None, losses=[1.0] * 50).judge(51, 1e30, 1.0) is None

    def test_a_large_gradient_is_applied(self):
        """It is clipped."""
        assert make_guard(losses=[1.0] * 50).judge(51, 1.0, 1e30) is None


class TestConsecutiveSkips:
    @pytest.mark.parametrize("max_skips", [0, 1, 5])
    def test_one_more_than_is_tolerated(self, max_skips):
        guard = make_guard(max_skips=max_skips)
        for step in range(1, max_skips + 1):
            guard.judge(step, math.nan, 1.0)
            assert not guard.is_exhausted
        guard.judge(max_skips + 1, math.nan, 1.0)
        assert guard.is_exhausted

    def test_every_kind_of_skip_counts(self):
        guard = make_guard(max_skips=2, losses=[1.0] * 20)
        guard.judge(21, math.nan, 1.0)
        guard.judge(22, 1.0, math.inf)
        assert not guard.is_exhausted
        guard.judge(23, 1e6, 1.0)
        assert guard.is_exhausted

    def test_an_applied_step_resets_the_count(self):
        guard = make_guard(max_skips=2)
        for start in range(1, 40, 3):
            guard.judge(start, math.nan, 1.0)
            guard.judge(start + 1, math.nan, 1.0)
            assert guard.first_skipped == start
            guard.judge(start + 2, 1.0, 1.0)
            assert guard.first_skipped is None
            assert not guard.is_exhausted

    def test_the_first_skipped_step_is_remembered(self):
        guard = make_guard(losses=[1.0])
        assert guard.first_skipped is None
        for step in (2, 3, 4):
            guard.judge(step, math.nan, 1.0)
            assert guard.first_skipped == 2


class TestState:
    def test_fresh(self):
        assert make_guard().state_dict() == {"recent": [], "in_a_row": 0, "first_skipped": None}

    def test_is_json_without_nan(self):
        guard = make_guard(losses=[1.0])
        guard.judge(2, math.nan, math.nan)
        text = json.dumps(guard.state_dict(), allow_nan=False)
        assert json.loads(text) == {"recent": [1.0], "in_a_row": 1, "first_skipped": 2}

    @pytest.mark.parametrize("cut", [0, 7, 21, 60, 63, 66, 69, 100])
    def test_a_restored_guard_decides_the_same(self, cut):
        """Over warm-up, a change of level, spikes, consecutive skips and their end."""
        losses = [1.0 + n % 7 / 10 for n in range(60)] + [50.0, math.nan, 2.0, 100.0, math.inf, 300.0, 40.0, 1.0]
        losses += [3.0 + n % 3 for n in range(60)] + [30.0, 60.0]
        whole = Guard(10.0, 2)
        resumed = Guard(10.0, 2)
        decisions: list[list[object]] = [[], []]
        for step, loss in enumerate(losses, 1):
            if step == cut + 1:
                resumed = through_json(resumed)
            for guard, taken in zip((whole, resumed), decisions, strict=True):
                taken.append((guard.judge(step, loss, 1.0), guard.is_exhausted, guard.first_skipped))
        assert decisions[0] == decisions[1]
        reasons = [reason for reason, _, _ in decisions[0]]
        assert sum(reason is not None for reason in reasons) == 7
        assert any(exhausted for _, exhausted, _ in decisions[0])

    def test_the_window_keeps_its_length_after_restoring(self):
        guard = through_json(make_guard(losses=[1.0] * 50))
        for step in range(51, 80):
            guard.judge(step, 2.0, 1.0)
        assert guard.state_dict()["recent"] == [1.0] * 21 + [2.0] * 29

    def test_state_is_a_copy(self):
        guard = make_guard(losses=[1.0])
        state = guard.state_dict()
        guard.judge(2, 5.0, 1.0)
        assert state["recent"] == [1.0]
