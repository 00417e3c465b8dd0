"""Running ahead of the consumer in a background thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")


def prefetch(items: Callable[[], Iterator[ItemT]], depth: int = 2) -> Iterator[ItemT]:
    """Iterate over ``items()`` in a background thread, at most ``depth`` ahead; its errors surface here."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[str, object]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items():
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            what, value = ready.get()
            if what == "end":
                return
            if what == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
