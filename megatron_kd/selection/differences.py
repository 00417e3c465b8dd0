"""r = reference NLL − teacher NLL of every chunk, in blocks: from two score files, or as a proxy predicts it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.scoring.leakage import refuse_reference_trained_on
from megatron_kd.scoring.score_file import DIFFERENCE_KIND, ScoreFile

Block = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Differences:
    """r of a dataset's chunks, and where it comes from.

    Attributes:
        block: (start, stop) → r of the dataset's chunks there, float32, nats per token; NaN where unscored.
        parents: the files, for the manifest of what is made from them.
        teacher, reference: (start, stop) → the models' scores; None where r was predicted.
        models: role → path of the model, for reports.
    """

    block: Block
    parents: list[dict[str, str]]
    teacher: Block | None = None
    reference: Block | None = None
    models: dict[str, str] = field(default_factory=dict)


def predicted_differences(path: str, dataset: ChunkDataset) -> Differences:
    """Open r of a dataset's chunks as ``predict_difference`` wrote it.

    Raises:
        DataError: the file is missing, damaged or of another dataset.
    """
    predicted = ScoreFile.open(path, DIFFERENCE_KIND)
    return Differences(predicted.reader(dataset), [_parent(predicted, "difference")])


def measured_differences(
    teacher_scores: str, reference_scores: str, dataset: ChunkDataset, force: bool = False
) -> Differences:
    """Open r of a dataset's chunks as two score files give it.

    Args:
        teacher_scores, reference_scores: paths of the score files.
        dataset: whose chunks.
        force: accept a reference model that was trained on chunks of the dataset.

    Raises:
        DataError: a file is missing, damaged or of another dataset; both are of one model; the models saw the chunks
            differently; or the reference model was trained on chunks of the dataset.
    """
    teacher, reference = ScoreFile.open(teacher_scores), ScoreFile.open(reference_scores)
    check_pair(teacher, reference)
    if not force:
        refuse_reference_trained_on(reference.manifest["model"], dataset, reference.path)
    one, other = teacher.reader(dataset), reference.reader(dataset)
    return Differences(
        lambda start, stop: np.subtract(other(start, stop), one(start, stop), dtype=np.float32),
        [_parent(teacher, "teacher"), _parent(reference, "reference")],
        one,
        other,
        {role: str(scores.manifest["model"].get("path")) for role, scores in
         (("teacher", teacher), ("reference", reference))},
    )  # fmt: skip


def check_pair(teacher: ScoreFile, reference: ScoreFile) -> None:
    """Make sure that two score files are of different models that saw the chunks alike.

    Raises:
        DataError: they are not (names both values).
    """
    if teacher.model_fingerprint == reference.model_fingerprint:
        raise DataError(
            f"{teacher.path} and {reference.path}: scores of the same model ({teacher.model_fingerprint}); "
            "give the teacher's and the reference model's"
        )
    for key, value in teacher.view.items():
        if reference.view.get(key) != value:
            raise DataError(
                f"{teacher.path} was scored with {key} = {value}, {reference.path} with {reference.view.get(key)}; "
                "score both the same way"
            )


def _parent(scores: ScoreFile, role: str) -> dict[str, str]:
    return {"kind": scores.manifest["kind"], "role": role, "path": str(Path(scores.path)),
            "fingerprint": scores.fingerprint}  # fmt: skip
