"""Tests several ranks of which one receives a signal."""

import signal

import pytest
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from vidreason.lightning_modules.fit.stopping import run_unless_stopped
from vidreason.signals import StopNow, StopRequested, defer_signals, handle_signals


def signalled() -> str:
    signal.raise_signal(signal.SIGTERM)
    return "done"


@pytest.mark.parametrize("strategy", [DDPStrategy(), SingleDeviceStrategy()], ids=["several", "one"])
def test_outside_a_fit_a_signal_ends_the_work_at_once(strategy):
    with handle_signals(), pytest.raises(StopRequested):
        run_unless_stopped(strategy, signalled, "nothing")


def test_in_a_fit_of_several_ranks_the_rest_is_passed_over():
    with handle_signals():
        defer_signals(True)
        assert run_unless_stopped(DDPStrategy(), signalled, "nothing") == "done"  # it asks nobody on its way
        assert run_unless_stopped(DDPStrategy(), signalled, "nothing") == "nothing"
        with pytest.raises(StopRequested):
            run_unless_stopped(SingleDeviceStrategy(), signalled, "nothing")


def test_a_second_ctrl_c_waits_for_nothing(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vidreason.signals.time.monotonic", lambda: now[0])
    with handle_signals():
        defer_signals(True)
        signal.raise_signal(signal.SIGINT)
        now[0] = 0.5  # a launcher sends it, too
        signal.raise_signal(signal.SIGINT)
        now[0] = 2.0
        with pytest.raises(StopNow):
            signal.raise_signal(signal.SIGINT)
