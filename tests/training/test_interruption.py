"""Ctrl-C reaches several processes one after the other, and they stop at the same step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from simpletuner_dmd.training.trainer import Trainer


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    made = Trainer.__new__(Trainer)  # only its signals are looked at
    made.asked_to_stop = made.interrupted = False
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_asks_and_a_second_one_stops(trainer: Trainer) -> None:
    with trainer._catching_signals():
        interrupt()
        assert trainer.asked_to_stop and not trainer.interrupted, "the ranks have not agreed yet"
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    with pytest.raises(KeyboardInterrupt):  # the former handler is back
        interrupt()


def test_a_signal_that_comes_after_the_ranks_agreed_is_absorbed(trainer: Trainer) -> None:
    with trainer._catching_signals():
        trainer.interrupted = True  # another rank had it first
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            interrupt()


def test_so_is_one_that_comes_after_the_loop(trainer: Trainer) -> None:
    with trainer._catching_signals():
        trainer.interrupted = True
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_an_undisturbed_run_leaves_the_handlers_as_they_were(trainer: Trainer) -> None:
    before = signal.getsignal(signal.SIGINT)
    with trainer._catching_signals():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
