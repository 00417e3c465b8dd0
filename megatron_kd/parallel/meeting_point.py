"""Where the ranks that torchrun starts find each other."""

import os
from datetime import timedelta

import torch.distributed as dist


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(store, rank, world size) from torchrun's environment variables.

    torchrun's store outlives a restart. Each attempt has its own part of it, or it would find the addresses, orders and
    failures of the ranks that died.
    """
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt_{attempt}", store), rank, world_size
