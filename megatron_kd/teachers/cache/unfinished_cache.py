"""A teacher cache under construction: a work store whose folder becomes the cache.

    claim → shards (any rank, ``cache_writer.py``), each with a commit → finish: manifest, then the output's name

A shard's files grow in the folder; its commit, a part of the store, says how much of them counts. All of this is for
the main rank.
"""

import io
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.artefacts.checksums import Checksums
from megatron_kd.artefacts.manifest import MANIFEST_NAME, fingerprint_of, read_manifest, versions, write_manifest
from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.teachers.cache.cache_reader import CHUNK_IDS_NAME, INDEX_DTYPE, KIND
from megatron_kd.teachers.cache.cache_writer import Commit, shard_name

logger = logging.getLogger(__name__)

READING_THREADS = 8


class UnfinishedCache:
    """The unfinished cache of one output.

    Args:
        store: of the output, claimed; its recipe is the cache's ``producer.settings``.
        num_shards: pairs of files that the cache will have.
    """

    def __init__(self, store: WorkStore, num_shards: int) -> None:
        self._store = store
        self._num_shards = num_shards

    def commits(self) -> dict[int, Commit]:
        """Return the commit of every shard that can be continued, or is complete; their bytes are read and compared.

        A shard whose bytes are not those committed is made again, and a line says so.
        """
        found = self._written_commits()
        with ThreadPoolExecutor(READING_THREADS) as pool:
            sound = dict(zip(found, pool.map(lambda commit: commit.holds(self._store.folder), found.values())))
        for number in (number for number in found if not sound[number]):
            logger.warning(f"{self._store.folder / shard_name(number)}: damaged; the shard is made again")
        return {number: commit for number, commit in found.items() if sound[number]}

    def finish(self, dataset: ChunkDataset, facts: Mapping[str, Any], producer: Mapping[str, Any]) -> None:
        """Write the manifest over complete shards and give the folder the output's name.

        Args:
            facts: manifest keys that are the cache's own: ``codec``, ``view``, ``teacher``.

        Raises:
            DataError: a shard is not complete; the output exists.
        """
        folder = self._store.folder
        commits = {number: commit for number, commit in self._written_commits().items() if commit.complete}
        missing = [number for number in range(self._num_shards) if number not in commits]
        if missing:
            raise DataError(
                f"{folder}: {len(missing)} of {self._num_shards} shards are not complete, the first is "
                f"{shard_name(missing[0])}; do all ranks see the same file system? run again to make them"
            )
        checksums = Checksums()
        for number in range(self._num_shards):
            checksums.files.update(commits[number].checksums.files)
            for name in commits[number].checksums.files:
                checksums.check_size(folder, name)
        if not dataset.is_root:
            buffer = io.BytesIO()
            np.save(buffer, np.asarray(dataset.chunk_ids, dtype=np.int64))
            write_file(folder / CHUNK_IDS_NAME, buffer.getvalue())
            checksums.add_file(folder, CHUNK_IDS_NAME)
        write_manifest(folder, KIND, self._manifest(dataset, facts, producer, checksums), checksums)
        self._store.publish()

    def publish_if_whole(self) -> bool:
        """Give the folder the output's name if a kill struck between the manifest and the rename; whether it did."""
        folder = self._store.folder
        if not (folder / MANIFEST_NAME).is_file():
            return False
        manifest, checksums = read_manifest(folder, KIND)
        if manifest["producer"].get("settings") != self._store.recipe:
            return False
        for name in checksums.files:
            checksums.check_size(folder, name)
        self._store.publish()
        return True

    def _written_commits(self) -> dict[int, Commit]:
        found = {number: Commit.read(self._store, number) for number in range(self._num_shards)}
        return {number: commit for number, commit in found.items() if commit is not None}

    def _manifest(
        self, dataset: ChunkDataset, facts: Mapping[str, Any], producer: Mapping[str, Any], checksums: Checksums
    ) -> dict[str, Any]:
        names = [shard_name(number) for number in range(self._num_shards)]
        indices = [np.fromfile(self._store.folder / f"{name}.idx", INDEX_DTYPE) for name in names]
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
            "shards": [{"name": name, "chunks": len(index)} for name, index in zip(names, indices)],
            "parents": [{"kind": "chunk_dataset", "path": str(dataset.path), "fingerprint": dataset.fingerprint}],
            "producer": dict(producer),
            "versions": versions(),
        }
