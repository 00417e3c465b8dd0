import os

import pytest

from megatron_kd.data.workers import cpu_count


def test_what_the_scheduler_gives_counts_where_it_says() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not say")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpu_count() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cpu_count() == len(before)


def test_where_it_does_not_say_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cpu_count() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu_count() == 1
