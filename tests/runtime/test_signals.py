"""Signals that reach all processes of a group: the command decides, and its loaders serve it to the end of a step."""

import os
import signal
from multiprocessing import forkserver

import pytest

from softcache.runtime import signals
from softcache.runtime.signals import (
    Interrupted,
    defer_signals,
    follow_loader,
    handle_signals,
    shield_loaders,
    signals_first,
)


@pytest.fixture
def handlers():
    """Puts this process's handlers and mask back."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def test_a_loader_passes_over_the_first_sigterm_and_ends_at_the_second(handlers):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as it is forked
    follow_loader(0)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_an_error_after_a_signal_is_the_signals(handlers):
    def lost():
        with handle_signals(), defer_signals(), signals_first():
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker exited unexpectedly")

    with pytest.raises(Interrupted) as raised:
        lost()
    assert raised.value.exit_code == 143
    with pytest.raises(RuntimeError, match="worker"), handle_signals(), signals_first():
        raise RuntimeError("worker")


def test_the_process_that_forks_loaders_is_started_with_sigterm_blocked(handlers, monkeypatch):
    seen = []
    monkeypatch.setattr(
        forkserver, "ensure_running", lambda: seen.append(signal.pthread_sigmask(signal.SIG_BLOCK, set()))
    )
    assert shield_loaders() is None
    assert seen == []
    with handle_signals():
        assert shield_loaders() is follow_loader
    assert signal.SIGTERM in seen[0]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
