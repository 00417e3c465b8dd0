"""``score_corpus`` that dies by SIGKILL inside its n-th write: DIE_AT=n DIE_AFTER_BYTES=b.

Writes are counted over the records of finished units and the score file's manifest, which is the last; of the fatal one
the first b bytes (modulo its size) reach the disk.
"""

import os
import signal
from pathlib import Path
from typing import Any

from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.cli import main
from megatron_kd.scoring import score_file

whole_append, whole_write_manifest = WorkStore.append, score_file.write_manifest
writes = 0


def is_fatal() -> bool:
    global writes
    writes += 1
    return writes == int(os.environ["DIE_AT"])


def die_in(path: Path, start: int) -> None:
    """Leave a part of what was appended to a file from byte ``start`` on."""
    size = path.stat().st_size
    os.truncate(path, start + int(os.environ["DIE_AFTER_BYTES"]) % max(1, size - start))
    os.kill(os.getpid(), signal.SIGKILL)


def append(store: WorkStore, *arguments: Any) -> None:
    fatal, start = is_fatal(), 0 if store._journal is None else store._journal.tell()
    whole_append(store, *arguments)
    if fatal:
        die_in(Path(store._journal.name), start)


def write_manifest(folder: Path, *arguments: Any) -> None:
    fatal = is_fatal()
    whole_write_manifest(folder, *arguments)
    if fatal:
        die_in(folder / "manifest.json", 0)


def die_while(verb: str) -> None:
    """Run a verb that fills a score journal, and die."""
    WorkStore.append, score_file.write_manifest = append, write_manifest
    main(verb)


if __name__ == "__main__":
    die_while("score_corpus")
