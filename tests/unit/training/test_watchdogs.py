"""Signals that stop a run, and which rank is named as the one that holds the others up.

The threads that end processes are tested from outside, in tests/end_to_end/test_signals.py and test_survival.py.
"""

import os
import signal
import sys
import threading

import pytest

from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.watchdogs import STOP_SIGNALS, StopSignals, describe, ignored_stop_signals, where_it_stands
from tests.reference.one_rank import one_rank_groups


def test_a_signal_on_any_rank_stops_all():
    with distributed_runtime() as runtime:
        signals, group = StopSignals(1.0), one_rank_groups().intra_dist_opt
        assert signals.agree(group, runtime.device) == (False, False)
        assert signals.agree(group, runtime.device, is_writing=True) == (False, True)
        signals._note(10, None)
        assert signals.agree(group, runtime.device) == (True, False)


def test_a_stop_signal_is_noted_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals(60.0) as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_the_teachers_ranks_ignore_stop_signals():
    with ignored_stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)


def rank(waits, where="schedule.py:1 recv", doing="step 3"):
    return {"waits": waits, "where": where, "doing": doing}


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({0: rank(True), 1: None}, "rank 1 does not answer: .*; rank 0 wait at schedule.py:1 recv"),
        ({0: rank(True), 1: rank(False, "loss.py:9 f")}, "rank 1 is at loss.py:9 f .step 3.; rank 0 wait at schedule"),
        ({0: rank(True), 1: rank(True), 2: rank(True, "save.py:5 g")}, "rank 2 is at save.py:5 g .*; ranks 0, 1 wait"),
    ],
    ids=["a rank that is gone", "a rank that computes", "a rank that waits elsewhere"],
)
def test_the_rank_that_holds_the_others_up_is_named(states, expected):
    import re

    assert re.match(expected, describe(states))


def test_a_thread_that_waits_for_another_is_told_from_one_that_computes():
    event = threading.Event()

    def wait():
        event.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        while not (frame := sys._current_frames().get(thread.ident)):
            pass
        found = where_it_stands(frame)
    finally:
        event.set()
        thread.join()
    assert "threading.py" in found["where"] or "test_watchdogs.py" in found["where"]
    here = where_it_stands(sys._getframe())
    assert not here["waits"] and "test_watchdogs.py" in here["where"]
