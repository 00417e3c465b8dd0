"""Score files: a folder with ``manifest.json`` and ``scores.npy``, one number per chunk of a dataset.

The score of a chunk is its mean negative log-likelihood per predicted token under a model, in nats, over the positions
that count (``MASK_RULE``). A chunk without such a position has NaN and is listed in the manifest as ``unscored``; any
other value that is not finite is refused when the file is written and when it is opened.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.artefacts.artefact_folder import building, write_array
from megatron_kd.artefacts.checksums import Checksums
from megatron_kd.artefacts.manifest import fingerprint_of, read_manifest, versions, write_manifest
from megatron_kd.data.chunk_dataset import MASK_RULE, ChunkDataset
from megatron_kd.errors import DataError

KIND = "score_file"
DIFFERENCE_KIND = "predicted_difference"
SCORES_NAME = "scores.npy"
QUANTITIES = {
    KIND: "mean negative log-likelihood per predicted token, nats",
    DIFFERENCE_KIND: "difference of mean negative log-likelihoods, reference − teacher, nats per token: measured or "
    "predicted",
}
"""What the numbers of each kind of file are."""


class ScoreFile:
    """Reads a score file; made by :meth:`open`.

    Attributes:
        path: the folder.
        manifest: its manifest.
        scores: float32 ``[num_chunks]``, nats per predicted token; NaN where ``unscored``.
        unscored: indices of the chunks without a position that counts, int64.
        fingerprint: content identity of this file.
        dataset_fingerprint: of the dataset whose chunks were scored, in its order.
        model_fingerprint: of the weights.
        view: how the model saw the chunks: ``mask_rule``, ``reset_attention_mask``, ``reset_position_ids``.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], scores: np.ndarray) -> None:
        self.path = path
        self.manifest = manifest
        self.scores = scores
        self.unscored = np.array(manifest["unscored"], dtype=np.int64)
        self.fingerprint: str = manifest["fingerprint"]
        self.dataset_fingerprint: str = manifest["dataset"]["fingerprint"]
        self.model_fingerprint: str = manifest["model"]["fingerprint"]
        self.view: dict[str, Any] = manifest["view"]

    @classmethod
    def open(cls, path: str | Path, kind: str = KIND) -> "ScoreFile":
        """Open and verify a score file or, with that ``kind``, the differences that a proxy predicted.

        Raises:
            DataError: it is missing, damaged, something else, or holds a value that is not finite and not listed.
        """
        path = Path(path)
        manifest, checksums = read_manifest(path, kind)
        for name in checksums.files:
            checksums.verify_file(path, name)
        scores = np.load(path / SCORES_NAME, mmap_mode="r")
        if scores.dtype != np.float32 or scores.shape != (manifest["dataset"]["num_chunks"],):
            raise DataError(
                f"{path / SCORES_NAME}: {scores.dtype} {scores.shape} where the manifest states float32 "
                f"({manifest['dataset']['num_chunks']},); copy the file again, or score again"
            )
        found = cls(path, manifest, scores)
        _refuse_not_finite(scores, found.unscored, str(path))
        return found

    def check_matches(self, dataset: ChunkDataset) -> None:
        """Make sure that the scores are of this dataset, or of the root that it was selected from.

        Raises:
            DataError: they are of another dataset (names both fingerprints).
        """
        if self.dataset_fingerprint not in (dataset.fingerprint, dataset.root_fingerprint):
            raise DataError(
                f"{self.path}: holds scores of the dataset with fingerprint {self.dataset_fingerprint}, but "
                f"{dataset.path} has fingerprint {dataset.fingerprint}; score that dataset with score_corpus"
            )

    def reader(self, dataset: ChunkDataset) -> Callable[[int, int], np.ndarray]:
        """Return a function (start, stop) → scores of the dataset's chunks there, float32, read on demand.

        Raises:
            DataError: the scores are of another dataset.
        """
        self.check_matches(dataset)
        if self.dataset_fingerprint == dataset.fingerprint:
            return lambda start, stop: self.scores[start:stop]
        return lambda start, stop: self.scores[dataset.chunk_ids[start:stop]]


def write_score_file(
    output: str | Path,
    scores: np.ndarray,
    dataset: ChunkDataset,
    model: Mapping[str, Any],
    compute_dtype: str,
    producer: Mapping[str, Any],
    reset_attention_mask: bool = False,
    reset_position_ids: bool = False,
    kind: str = KIND,
    parents: Sequence[Mapping[str, str]] = (),
) -> ScoreFile:
    """Write the scores of every chunk of ``dataset``, whole or not at all, and open the result.

    Args:
        output: folder to create.
        scores: float32 ``[dataset.num_chunks]``, mean NLL per predicted token in nats; NaN exactly where a chunk has
            no position that counts.
        dataset: what was scored.
        model: ``path`` and ``fingerprint`` of the weights, and whatever else is worth recording.
        compute_dtype: of the model's forward pass.
        producer: ``tool``, its resolved ``config``, optionally a ``recipe``.
        reset_attention_mask, reset_position_ids: whether documents within a chunk were kept apart.
        kind: what the numbers are, one of ``QUANTITIES``.
        parents: what the numbers were made from, besides the dataset.

    Raises:
        DataError: ``output`` exists, or a score is NaN or infinite where it must not be.
        ValueError: the number of scores is not the number of chunks.
    """
    scores = np.asarray(scores, dtype=np.float32)
    if scores.shape != (dataset.num_chunks,):
        raise ValueError(f"scores of shape {scores.shape} for {dataset.num_chunks} chunks")
    unscored = _unscored(scores, dataset, f"{output} (model {model.get('path', '?')})")
    facts = _facts(dataset, model, compute_dtype, unscored, reset_attention_mask, reset_position_ids)
    with building(output) as folder:
        write_array(folder / SCORES_NAME, scores)
        checksums = Checksums()
        checksums.add_file(folder, SCORES_NAME)
        scored = {"kind": "chunk_dataset", "path": str(dataset.path), "fingerprint": dataset.fingerprint}
        body = {
            "fingerprint": _fingerprint(facts, checksums),
            "quantity": QUANTITIES[kind],
            "dtype": "float32",
            **facts,
            "parents": [scored, *map(dict, parents)],
            "producer": dict(producer),
            "versions": versions(),
        }
        write_manifest(folder, kind, body, checksums)
    return ScoreFile.open(output, kind)


def _unscored(scores: np.ndarray, dataset: ChunkDataset, where: str) -> list[int]:
    """Return the chunks that may be NaN, and are; refuse any other value that is not finite."""
    missing = np.flatnonzero(np.isnan(scores)).tolist()
    unscored = [index for index in missing if not dataset.has_unmasked_position(index)]
    _refuse_not_finite(scores, np.array(unscored, dtype=np.int64), where)
    return unscored


def _facts(
    dataset: ChunkDataset,
    model: Mapping[str, Any],
    compute_dtype: str,
    unscored: list[int],
    reset_attention_mask: bool,
    reset_position_ids: bool,
) -> dict[str, Any]:
    """Return what the manifest says about the scores themselves."""
    return {
        "dataset": {
            "path": str(dataset.path),
            "fingerprint": dataset.fingerprint,
            "root_fingerprint": dataset.root_fingerprint,
            "tokenizer_hash": dataset.tokenizer_hash,
            "num_chunks": dataset.num_chunks,
        },
        "model": dict(model),
        "view": {
            "mask_rule": MASK_RULE,
            "reset_attention_mask": reset_attention_mask,
            "reset_position_ids": reset_position_ids,
        },
        "compute_dtype": compute_dtype,
        "unscored": unscored,
    }


def _fingerprint(facts: Mapping[str, Any], checksums: Checksums) -> str:
    identity = {
        "dataset": facts["dataset"]["fingerprint"],
        "model": facts["model"]["fingerprint"],
        "view": facts["view"],
        "unscored": facts["unscored"],
    }
    return fingerprint_of(identity, checksums)


def _refuse_not_finite(scores: np.ndarray, unscored: np.ndarray, where: str) -> None:
    bad = ~np.isfinite(scores)
    bad[unscored] = False
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{where}: the score of chunk {first} is {scores[first]} ({int(bad.sum())} of {len(scores)} are not "
            "finite) though it has positions that count; the model or its precision is at fault, score again"
        )
    if len(unscored) and not np.isnan(scores[unscored]).all():
        raise DataError(f"{where}: a chunk listed as unscored has a score; the file is inconsistent, score again")
