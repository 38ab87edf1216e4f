"""Signals that arrive before a run listens."""

import os
import signal

import pytest

from scfm_core.train import stop
from scfm_core.train.stop import StopRequest, remember_early


@pytest.fixture(autouse=True)
def restored_handlers():
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_during_the_start_stops_the_run_at_its_first_step(number):
    signal.signal(number, signal.SIG_IGN)  # like slurm/node.sh
    remember_early()
    os.kill(os.getpid(), number)
    with StopRequest().listening() as request:
        assert request.signal == number
    with StopRequest().listening() as request:
        assert request.signal is None, "it stops only one run"


def test_without_a_signal_the_run_continues():
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    remember_early()
    with StopRequest().listening() as request:
        assert request.signal is None
        os.kill(os.getpid(), signal.SIGUSR2)
        assert request.signal == signal.SIGUSR2


def test_handlers_of_signals_that_are_not_ignored_do_not_change():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    remember_early()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", stop.SIGNALS, ids=lambda number: number.name)
def test_every_signal_is_answered_at_once(number, capfd):
    for each in stop.SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    with StopRequest().listening() as request:
        os.kill(os.getpid(), number)
        assert request.signal == number
        again = "; press again to stop now" if number == signal.SIGINT else ""
        assert capfd.readouterr().err == f"\n{number.name}: stopping after this step, saving{again}\n"


def test_a_second_ctrl_c_stops_now():
    with StopRequest().listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_sighup_stays_ignored_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest().listening() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal is None


def test_other_ranks_say_nothing(monkeypatch, capfd):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with StopRequest().listening() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGTERM
    assert not capfd.readouterr().err
