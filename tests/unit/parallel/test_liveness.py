"""Ranks that do not connect: one line names them, in time, instead of an endless wait."""

import json
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_kd.errors import LayoutError
from megatron_kd.parallel import liveness
from megatron_kd.parallel.liveness import Liveness


@pytest.fixture(autouse=True)
def on_this_host(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def describe(rank):
    return f"rank {rank} (of three)"


def join(store, rank, seconds):
    return Liveness(store, rank, 3, describe, timedelta(seconds=seconds))


def test_a_rank_that_never_connects_is_named():
    store, began = dist.HashStore(), time.monotonic()
    second = threading.Thread(target=lambda: join(store, 1, 30).__exit__(None, None, None))
    second.start()
    with pytest.raises(LayoutError, match=r"^rank 2 \(of three\) did not connect to rank 0 \(of three\) at 127.0.0.1"):
        with join(store, 0, 2) as first:
            first.__exit__(None, None, None)
    second.join()
    assert time.monotonic() - began < 10


def test_a_connection_that_says_nothing_holds_nobody_up(monkeypatch):
    """A port scanner's, before the ranks'."""
    monkeypatch.setattr(liveness, "_HELLO_SECONDS", 0.5)
    store, strangers = dist.HashStore(), []

    def connect_all():
        host, port = json.loads(store.get("liveness"))
        strangers.extend(socket.create_connection((host, port)) for _ in range(2))
        strangers[1].sendall(b"GET / HTTP/1.0\r\n")
        for rank in (1, 2):
            others.append(join(store, rank, 30))

    others = []
    thread = threading.Thread(target=connect_all)
    thread.start()
    with join(store, 0, 30):
        thread.join()
        for other in others:
            other.__exit__(None, None, None)
    assert len(others) == 2


def test_a_rank_that_cannot_reach_rank_0_says_so():
    store = dist.HashStore()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    store.set("liveness", json.dumps(["127.0.0.1", port]))
    with pytest.raises(LayoutError, match=rf"rank 2 \(of three\) cannot reach rank 0 \(of three\) at 127.0.0.1:{port}"):
        join(store, 2, 5)
