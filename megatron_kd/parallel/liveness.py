"""Ranks that die end the job: every rank holds a connection to rank 0, and a connection that breaks is a death.

The operating system closes the connection of a process that dies, whatever killed it, and keep-alive finds a host that
is gone in half a minute. Rank 0 then tells all others, and each ends at once: a main thread that waits inside a
collective for the dead rank cannot be interrupted in any other way. A rank that leaves properly says so first; one
that leaves with an error gives the others a few seconds to end by themselves.
"""

import json
import os
import socket
import sys
import threading
from types import TracebackType

import torch.distributed as dist

_KEY = "liveness"
_GRACE_SECONDS = 10.0
_DEAD_STATUS, _FAILED_STATUS = 1, 2


class Liveness:
    """A context in which the death of any rank ends this process within seconds.

    Args:
        store: shared by all ranks.
        rank: this rank.
        world_size: all ranks.
        role: says what this rank is in the message about its death, e.g. ``rank 3 (teacher rank 1 of 2)``.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, role: str):
        self._rank, self._role = rank, role
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
            for _ in range(world_size - 1):
                peer = server.accept()[0]
                _keep_alive(peer)
                reader = peer.makefile("r")
                hello = json.loads(reader.readline())
                self._peers[hello["rank"]] = peer
                self._watch(reader, hello["role"])

    def _connect(self, store: dist.Store) -> None:
        host, port = json.loads(store.get(_KEY))
        peer = socket.create_connection((host, port), timeout=60)
        peer.settimeout(None)
        _keep_alive(peer)
        self._peers[0] = peer
        self._tell({"rank": self._rank, "role": self._role})
        self._watch(peer.makefile("r"), "rank 0 (student rank 0)")

    def _watch(self, reader, role: str) -> None:
        threading.Thread(target=self._read, args=(reader, role), name="liveness", daemon=True).start()

    def _read(self, reader, role: str) -> None:
        """Until the other end leaves; a connection that ends without a word is a death."""
        try:
            for line in reader:
                message = json.loads(line)
                if message["kind"] == "left":
                    return
                if message["kind"] == "failed":
                    self._follow_failure()
                    return
                self._end(None)  # rank 0 has said who is dead
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
        """End this process; ``dead`` names the rank that is to be told about."""
        if dead is not None and (self._rank == 0 or self._rank == 1):
            sys.stderr.write(f"train: {dead} is gone (killed, crashed or cut off): all ranks stop\n")
            sys.stderr.flush()
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
    """A host that does not answer for half a minute is gone."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # not on macOS
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
