"""``generate_corpus`` in parts of 4 texts, that dies by SIGKILL inside its n-th write: DIE_AT=n DIE_AFTER_BYTES=b.

Writes are counted over parts, the dataset's manifest, and the removal of the parts, which is the last; of the fatal one
the first b bytes (modulo its size) reach the disk, of the removal nothing. DIE_AT=0 never dies.
"""

import os
import signal
from pathlib import Path
from typing import Any

from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.cli import main
from megatron_kd.data import chunk_dataset_writer
from megatron_kd.generation import generate_corpus

whole_write, whole_remove, whole_write_manifest = (
    WorkStore.write,
    WorkStore.remove,
    chunk_dataset_writer.write_manifest,
)
writes = 0


def is_fatal() -> bool:
    global writes
    writes += 1
    return writes == int(os.environ["DIE_AT"])


def die_in(path: Path) -> None:
    """Leave a part of a file."""
    os.truncate(path, int(os.environ["DIE_AFTER_BYTES"]) % path.stat().st_size)
    os.kill(os.getpid(), signal.SIGKILL)


def write(store: WorkStore, name: str, payload: bytes) -> None:
    fatal = is_fatal()
    whole_write(store, name, payload)
    if fatal:
        die_in(store.path_of(name))


def write_manifest(folder: Path, *arguments: Any) -> None:
    fatal = is_fatal()
    whole_write_manifest(folder, *arguments)
    if fatal:
        die_in(folder / "manifest.json")


def remove(store: WorkStore) -> None:
    if is_fatal():
        os.kill(os.getpid(), signal.SIGKILL)
    whole_remove(store)


if __name__ == "__main__":
    generate_corpus.TEXTS_PER_PART = 4
    WorkStore.write, WorkStore.remove, chunk_dataset_writer.write_manifest = write, remove, write_manifest
    main("generate_corpus")
