"""``cache_teacher_logits`` that dies by SIGKILL inside its n-th write: DIE_AT=n DIE_AFTER_BYTES=b.

Writes are counted over records, index entries and commits; of the fatal one the first b bytes (modulo its size) reach
the disk.
"""

import os
import signal

from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.cli import main
from megatron_kd.teachers.cache import cache_writer as shard

whole_append, whole_write = shard.ShardWriter._append, WorkStore.write
writes = 0


def is_fatal() -> bool:
    global writes
    writes += 1
    return writes == int(os.environ["DIE_AT"])


def part_of(data: bytes) -> bytes:
    return data[: int(os.environ["DIE_AFTER_BYTES"]) % max(1, len(data))]


def append(writer: shard.ShardWriter, ending: str, data: bytes) -> None:
    if is_fatal():
        file, _ = writer._files[ending]
        file.write(part_of(data))
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    whole_append(writer, ending, data)


def write(store: WorkStore, name: str, payload: bytes) -> None:
    if is_fatal():
        store.new_part().write(part_of(payload))
        os.kill(os.getpid(), signal.SIGKILL)
    whole_write(store, name, payload)


if __name__ == "__main__":
    shard.ShardWriter._append, WorkStore.write = append, write
    main("cache_teacher_logits")
