"""``cache_teacher_logits`` that dies by SIGKILL inside its n-th write: DIE_AT=n DIE_AFTER_BYTES=b.

Writes are counted over records, index entries and commits; of the fatal one the first b bytes (modulo its size) reach
the disk.
"""

import os
import signal
from pathlib import Path

from megatron_kd.cli import main
from megatron_kd.teachers.cache import cache_writer as shard

whole_append, whole_write_file = shard.ShardWriter._append, shard.write_file
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


def write_file(path: Path, data: bytes | str) -> None:
    if is_fatal():
        path.with_name(f"{path.name}.tmp").write_bytes(part_of(str(data).encode()))
        os.kill(os.getpid(), signal.SIGKILL)
    whole_write_file(path, data)


if __name__ == "__main__":
    shard.ShardWriter._append, shard.write_file = append, write_file
    main("cache_teacher_logits")
