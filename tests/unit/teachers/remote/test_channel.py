"""Orders arrive as they were written, in order, at every reader; old ones leave the store."""

import pytest
import torch
import torch.distributed as dist

from megatron_kd.teachers.remote import channel
from megatron_kd.teachers.remote.channel import STOP, Order, OrderLog, SentBatches


@pytest.fixture
def store():
    return dist.HashStore()


def sent(seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, 151_936, (2, 3, 2, 4, 8), generator=generator)
    return SentBatches(inputs, torch.arange(24).view(2, 3, 4), torch.arange(6).view(2, 3) + (1 << 62))


def test_every_reader_reads_every_order(store):
    writer, readers = OrderLog(store), [OrderLog(store), OrderLog(store)]
    for order in (Order(7), Order(sent=sent()), STOP):
        writer.write(order)
    for reader in readers:
        assert reader.read() == Order(7)
        order = reader.read()
        assert order.position is None and order.number == -1 and not order.stops
        for name in ("inputs", "chunk_indices", "keys"):
            assert torch.equal(getattr(order.sent, name), getattr(sent(), name)), name
            assert getattr(order.sent, name).dtype == torch.int64
        assert reader.read().stops
        reader.acknowledge_stop()
    writer.wait_for_stop(2)


def test_old_orders_leave_the_store(store, monkeypatch):
    monkeypatch.setattr(channel, "_KEPT_ORDERS", 2)
    writer, reader = OrderLog(store), OrderLog(store)
    for position in range(5):
        writer.write(Order(position) if position % 2 else Order(sent=sent(position)))
        reader.read()
    orders = dist.PrefixStore("orders", store)
    assert [orders.check([str(n)]) for n in range(5)] == [False, False, False, True, True]
    assert not orders.check(["2/sent"]) and orders.check(["4/sent"])
