"""Signals that come before a run listens."""

import os
import signal

import pytest

from scfm_core.train import stop
from scfm_core.train.stop import StopRequest, remember_early


@pytest.fixture(autouse=True)
def as_before():
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    yield
    stop._early.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_warning_while_it_starts_stops_the_run_at_its_first_step(number):
    signal.signal(number, signal.SIG_IGN)  # as slurm/node.sh does
    remember_early()
    os.kill(os.getpid(), number)
    with StopRequest().listening() as request:
        assert request.signal == number


def test_without_a_warning_the_run_goes_on():
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    remember_early()
    with StopRequest().listening() as request:
        assert request.signal is None
        os.kill(os.getpid(), signal.SIGUSR2)
        assert request.signal == signal.SIGUSR2


def test_signals_that_nobody_ignores_stay_as_they_are():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    remember_early()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
