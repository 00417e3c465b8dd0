import threading
import time
from collections.abc import Iterator

import pytest

from megatron_kd.data.workers import prefetch


def test_items_come_in_order() -> None:
    assert list(prefetch(lambda: iter(range(100)), depth=3)) == list(range(100))


def test_it_runs_ahead_by_the_depth_and_no_more() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    stream = prefetch(items, depth=4)
    next(stream)
    deadline = time.monotonic() + 5
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 6  # one taken, four waiting, one in hand
    stream.close()


def test_errors_surface_where_the_items_are_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("from the thread")

    stream = prefetch(items)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="from the thread"):
        next(stream)


def test_an_abandoned_stream_ends_its_thread() -> None:
    stream = prefetch(lambda: iter(range(10**9)))
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
