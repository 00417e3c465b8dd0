"""A function on ranks that join a world of their own making, inside the processes of a shared test world.

``train`` splits the world that it starts; the processes of ``shared_ranks`` are in one already. So they leave theirs,
run, and come together again under another store.
"""

import os
import socket
from typing import Any, Callable

import torch.distributed as dist

from tests.distributed.ranks import shared_ranks


def run_in_fresh_world(world: int, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Any]:
    """``function`` on every rank with torchrun's variables set and no process group; the results by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = shared_ranks(world)
    return ranks.run(_leave_and_return, port, ranks.new_store(), function, arguments, keywords, timeout=300)


def _leave_and_return(port: int, store: str, function: Callable[..., Any], arguments: tuple, keywords: dict) -> Any:
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        return function(*arguments, **keywords)
    finally:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        dist.barrier()
