"""``<output>.partial``: a cache under construction, which a later run with the same settings goes on with.

    claim → shards (any rank, see ``shard.py``) → finish: manifest, then the folder gets the output's name

All of this is for the main rank.
"""

import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_kd.artefacts.artefact_folder import fsync_folder, refuse_existing, write_file
from megatron_kd.artefacts.checksums import Checksums
from megatron_kd.artefacts.folder_lock import LOCK_NAME, lock_folder
from megatron_kd.artefacts.manifest import MANIFEST_NAME, fingerprint_of, read_manifest, versions, write_manifest
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.teachers.cache.cache_reader import CHUNK_IDS_NAME, INDEX_DTYPE, KIND
from megatron_kd.teachers.cache.cache_writer import PROGRESS_FOLDER, Commit, shard_name

SETTINGS_NAME = "settings.json"


class WorkFolder:
    """The unfinished cache of one output.

    Args:
        output: what it will become.
        settings: everything that decides its bytes; plain values.
    """

    def __init__(self, output: str | Path, settings: Mapping[str, Any]) -> None:
        self.output = Path(output)
        self.path = self.output.parent / f"{self.output.name}.partial"
        self._settings = json.loads(json.dumps(settings))
        self._lock: IO[str] | None = None

    def claim(self) -> None:
        """Make the folder, or check that it was begun with the same settings.

        Raises:
            DataError: it was begun with others (names them), or another run is writing it.
        """
        self._lock = lock_folder(self.path, "this cache")
        (self.path / PROGRESS_FOLDER).mkdir(exist_ok=True)
        path = self.path / SETTINGS_NAME
        if not path.exists():
            write_file(path, json.dumps(self._settings, indent=1) + "\n")
            return
        before = json.loads(path.read_text("utf-8"))
        names = sorted(set(before) | set(self._settings))
        faults = [
            f"{name} {before.get(name)}, now {self._settings.get(name)}"
            for name in names
            if before.get(name) != self._settings.get(name)
        ]
        if faults:
            raise DataError(
                f"{self.path}: holds an unfinished cache made with {'; '.join(faults)}: go on with the same settings, "
                "remove it, or choose another output"
            )

    def commits(self, num_shards: int) -> dict[int, Commit]:
        """Where every shard that was begun can go on."""
        found = {number: Commit.read(self.path, number) for number in range(num_shards)}
        return {number: commit for number, commit in found.items() if commit is not None}

    def finish(
        self, dataset: ChunkDataset, num_shards: int, facts: Mapping[str, Any], producer: Mapping[str, Any]
    ) -> None:
        """Write the manifest over finished shards and rename the folder.

        Args:
            facts: manifest keys that are the cache's own: ``codec``, ``view``, ``teacher``.

        Raises:
            DataError: a shard is not there whole; the output exists.
        """
        commits = self.commits(num_shards)
        unfinished = [number for number in range(num_shards) if number not in commits or not commits[number].complete]
        if unfinished:
            raise DataError(
                f"{self.path}: {len(unfinished)} of {num_shards} shards are not whole, the first is "
                f"{shard_name(unfinished[0])}; do all ranks see the same file system? run again to fill them"
            )
        checksums = Checksums()
        for number in range(num_shards):
            checksums.files.update(commits[number].checksums.files)
        if not dataset.is_root:
            buffer = io.BytesIO()
            np.save(buffer, np.asarray(dataset.chunk_ids, dtype=np.int64))
            write_file(self.path / CHUNK_IDS_NAME, buffer.getvalue())
            checksums.add_file(self.path, CHUNK_IDS_NAME)
        body = self._manifest(dataset, num_shards, facts, producer, checksums)
        write_manifest(self.path, KIND, body, checksums)
        self._rename()

    def close(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _manifest(
        self,
        dataset: ChunkDataset,
        num_shards: int,
        facts: Mapping[str, Any],
        producer: Mapping[str, Any],
        checksums: Checksums,
    ) -> dict[str, Any]:
        indices = [np.fromfile(self.path / f"{shard_name(number)}.idx", INDEX_DTYPE) for number in range(num_shards)]
        record_bytes = sum(entry.size for name, entry in checksums.files.items() if name.endswith(".bin"))
        tokens = sum(int(index["tokens"].sum()) for index in indices)
        ids = sum(int(index["ids"].sum()) for index in indices)
        identity = {"dataset": dataset.fingerprint, "root": dataset.root_fingerprint, **facts}
        identity["teacher"] = facts["teacher"]["fingerprint"]
        return {
            "fingerprint": fingerprint_of(identity, checksums),
            "dataset": {
                "path": str(dataset.path),
                "fingerprint": dataset.fingerprint,
                "root_fingerprint": dataset.root_fingerprint,
                "tokenizer_hash": dataset.tokenizer_hash,
                "seq_length": dataset.seq_length,
                "num_chunks": dataset.num_chunks,
            },
            **facts,
            "tokens": tokens,
            "ids": ids,
            "ids_per_token": round(ids / max(1, tokens), 4),
            "bytes_per_token": round(record_bytes / max(1, tokens), 4),
            "shards": [{"name": shard_name(number), "chunks": len(index)} for number, index in enumerate(indices)],
            "parents": [{"kind": "chunk_dataset", "path": str(dataset.path), "fingerprint": dataset.fingerprint}],
            "producer": dict(producer),
            "versions": versions(),
        }

    def _rename(self) -> None:
        """What a kill leaves of this, :meth:`is_whole` finds and ends."""
        refuse_existing(self.output)
        fsync_folder(self.path)
        shutil.rmtree(self.path / PROGRESS_FOLDER)
        (self.path / SETTINGS_NAME).unlink()
        (self.path / LOCK_NAME).unlink()
        os.rename(self.path, self.output)
        fsync_folder(self.output.parent)
        self.close()

    def is_whole(self) -> bool:
        """Whether a kill struck between the manifest and the rename: then the rename is made now."""
        if not (self.path / MANIFEST_NAME).is_file():
            return False
        manifest, checksums = read_manifest(self.path, KIND)
        if manifest["producer"].get("settings") != self._settings:
            return False
        for name in checksums.files:
            checksums.check_size(self.path, name)
        self._rename()
        return True
