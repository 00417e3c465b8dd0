"""Detection of dead ranks: every rank holds a connection to rank 0, and one that breaks ends the job.

The operating system closes the connection of a process that dies, whatever killed it, and keep-alive notices a host
that is gone within half a minute. Rank 0 then tells all others, and each exits at once: a main thread that waits inside
a collective for the dead rank cannot be interrupted in any other way. A rank that leaves properly says so first; one
that leaves with an error gives the others a few seconds to exit by themselves.
"""

import json
import logging
import os
import socket
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Callable

import torch.distributed as dist

from megatron_kd.errors import LayoutError
from megatron_kd.logs import EVERY_RANK

logger = logging.getLogger(__name__)

_KEY = "liveness"
_HELLO_SECONDS = 30.0
_GRACE_SECONDS = 10.0
_DEAD_STATUS, _FAILED_STATUS = 1, 2


class Liveness:
    """A context in which the death of any rank ends this process within seconds.

    Args:
        store: shared by all ranks.
        rank: this rank.
        world_size: all ranks.
        describe: names a rank in messages, e.g. ``rank 3 (teacher rank 1 of 2)``.
        timeout: how long the ranks may take to connect.

    Raises:
        LayoutError: some have not; the message names them.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, describe: Callable[[int], str], timeout: timedelta
    ):
        self._rank, self._describe = rank, describe
        self._deadline = time.monotonic() + timeout.total_seconds()
        self._peers: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        self._left = threading.Event()
        if rank == 0:
            self._listen(store, world_size)
        else:
            self._connect(store)

    def __enter__(self) -> "Liveness":
        return self

    def __exit__(self, _: type | None, error: BaseException | None, __: TracebackType | None) -> None:
        self._left.set()
        self._tell({"kind": "left" if error is None else "failed"})
        for peer in self._peers.values():
            try:
                peer.shutdown(socket.SHUT_WR)
            except OSError:
                pass

    def _listen(self, store: dist.Store, world_size: int) -> None:
        with socket.create_server(("", 0)) as server:
            host = os.environ.get("MASTER_ADDR", socket.gethostname())
            store.set(_KEY, json.dumps([host, server.getsockname()[1]]))
            while len(self._peers) < world_size - 1:
                try:
                    self._accept(server)
                except TimeoutError:
                    self._tell({"kind": "failed"})
                    missing = [self._describe(rank) for rank in range(1, world_size) if rank not in self._peers]
                    raise LayoutError(
                        f"{', '.join(missing)} did not connect to {self._describe(0)} at {host}:"
                        f"{server.getsockname()[1]} in time: check that it started, and that no firewall is between"
                    ) from None

    def _accept(self, server: socket.socket) -> None:
        """Accept the next connection; one that does not say which rank it is (a port scanner's) is closed."""
        server.settimeout(max(self._deadline - time.monotonic(), 0.001))
        peer = server.accept()[0]
        peer.settimeout(_HELLO_SECONDS)
        reader = peer.makefile("r")
        try:
            rank = int(json.loads(reader.readline())["rank"])
        except (OSError, ValueError, TypeError, KeyError):
            reader.close()
            peer.close()
            return
        peer.settimeout(None)
        _keep_alive(peer)
        self._peers[rank] = peer
        self._watch(reader, self._describe(rank))

    def _connect(self, store: dist.Store) -> None:
        host, port = json.loads(store.get(_KEY))
        try:
            peer = socket.create_connection((host, port), timeout=60)
        except OSError as error:
            raise LayoutError(
                f"{self._describe(self._rank)} cannot reach {self._describe(0)} at {host}:{port}: {error}"
            ) from None
        peer.settimeout(None)
        _keep_alive(peer)
        self._peers[0] = peer
        self._tell({"rank": self._rank})
        self._watch(peer.makefile("r"), self._describe(0))

    def _watch(self, reader, role: str) -> None:
        threading.Thread(target=self._read, args=(reader, role), name="liveness", daemon=True).start()

    def _read(self, reader, role: str) -> None:
        """Read until the other end leaves; a connection that ends without a message is a death."""
        try:
            for line in reader:
                message = json.loads(line)
                if message["kind"] == "left":
                    return
                if message["kind"] == "failed":
                    self._follow_failure()
                    return
                self._end(None)  # rank 0 has reported who is dead
        except OSError:
            pass
        if not self._left.is_set():
            self._end(role)

    def _follow_failure(self) -> None:
        if self._rank == 0:
            self._tell({"kind": "failed"})
        if not self._left.wait(_GRACE_SECONDS):
            os._exit(_FAILED_STATUS)

    def _end(self, dead: str | None) -> None:
        """End this process; ``dead`` names the rank to report, if any."""
        if dead is not None and (self._rank == 0 or self._rank == 1):
            logger.info(f"{dead} is gone (killed, crashed or disconnected): all ranks stop", extra=EVERY_RANK)
        if self._rank == 0:
            self._tell({"kind": "dead"})
        os._exit(_DEAD_STATUS)

    def _tell(self, message: dict) -> None:
        line = (json.dumps(message) + "\n").encode()
        with self._lock:
            for peer in self._peers.values():
                try:
                    peer.sendall(line)
                except OSError:
                    pass


def _keep_alive(peer: socket.socket) -> None:
    """Let the system close the connection to a host that has not answered for half a minute."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # not on macOS
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
