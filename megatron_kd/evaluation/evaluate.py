"""``evaluate``: held-out loss and bits per byte of a checkpoint under any layout, not exported; zero-shot tasks.

torchrun --nproc-per-node 2 tools/evaluate.py model.path=RUN data.path=HELDOUT [output=FILE.json] [parallel.…]
python tools/evaluate.py model.path=HF_FOLDER harness.tasks=[paper] [output=FILE.json]
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.checkpoints.loading import LoadedModel, load_for_inference
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import LayoutError
from megatron_kd.evaluation.calibration import calibration
from megatron_kd.evaluation.exposure_bias import ExposureConfig, exposure_bias
from megatron_kd.evaluation.harness import HarnessConfig, run_harness
from megatron_kd.models.architecture import ScoredModelConfig
from megatron_kd.models.gpt import padded_vocab_size
from megatron_kd.parallel.layout import ParallelConfig
from megatron_kd.parallel.runtime import Runtime, distributed_runtime
from megatron_kd.scoring.chunk_losses import heldout_loss


@dataclass(frozen=True)
class HeldoutDataConfig:
    """The ``data.*`` keys of evaluation."""

    path: str | None = None
    """A held-out chunk dataset; None leaves the loss out."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything that ``evaluate`` reads."""

    model: ScoredModelConfig
    data: HeldoutDataConfig = field(default_factory=HeldoutDataConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batch_size: int = 8
    calibration: bool = False
    """Also the expected calibration error of the next-token predictions; a second pass."""
    teacher: str | None = None
    """A checkpoint: also the exposure bias against it, on text that both write (``exposure.*``)."""
    exposure: ExposureConfig = field(default_factory=ExposureConfig)
    output: str | None = None
    """A JSON file for the figures; they are printed in any case."""

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if self.teacher is not None:
            yield from self.parallel.context_parallel_faults("the exposure bias is of text generated token by token")
        if self.micro_batch_size < 1:
            yield f"'micro_batch_size' must be at least 1, not {self.micro_batch_size}"
        if self.data.path is None and not self.harness.tasks:
            yield "'data.path' (a held-out dataset) or 'harness.tasks' is required"
        if self.data.path is None and (self.calibration or self.teacher):
            yield "'calibration' and 'teacher' are about held-out text: 'data.path' is required"


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; returns and prints the figures.

    Raises:
        LayoutError: zero-shot tasks under several ranks; what is loaded does not divide over them.
        CheckpointError, DataError, ConfigError: as :func:`heldout_figures` and ``run_harness``.
    """
    with distributed_runtime() as runtime:
        if config.harness.tasks and runtime.world_size > 1:
            raise LayoutError(
                f"harness.tasks runs in one process, and here are {runtime.world_size}: start evaluate "
                "without torchrun, or leave the tasks to a second call"
            )
        figures = {"model": config.model.path}
        if config.data.path is not None:
            figures |= heldout_figures(config, runtime)
        if config.harness.tasks:
            figures["harness"] = run_harness(config.harness, config.model.path, runtime.device.type)
        if runtime.is_main:
            text = json.dumps(figures, indent=2)
            if config.output is not None:
                Path(config.output).parent.mkdir(parents=True, exist_ok=True)
                write_file(Path(config.output), text + "\n")
            sys.stdout.write(text + "\n")
        return figures


def heldout_figures(config: EvaluateConfig, runtime: Runtime) -> dict[str, Any]:
    """Loss, bits per byte and what else is asked for of ``data.path``; collective over the world."""
    dataset = ChunkDataset.open(config.data.path)
    loaded = load_for_inference(config.model, config.parallel, dataset, runtime)
    totals = heldout_loss(
        loaded.chunks, loaded.groups, dataset, device=runtime.device, micro_batch_size=config.micro_batch_size
    )
    figures = {
        "model": str(loaded.info.path),
        "dataset": config.data.path,
        "dataset_fingerprint": dataset.fingerprint,
        "heldout_loss": totals.loss,
        "bits_per_byte": totals.bits_per_byte,
        "tokens": totals.tokens,
        "text_bytes": totals.text_bytes,
    }
    if config.calibration:
        figures |= _calibration_figures(config, loaded, dataset, runtime)
    if config.teacher is not None:
        figures |= _exposure_figures(config, loaded, dataset, runtime)
    return figures


def _calibration_figures(
    config: EvaluateConfig, loaded: LoadedModel, dataset: ChunkDataset, runtime: Runtime
) -> dict[str, float]:
    found = calibration(
        loaded.chunks, loaded.groups, dataset, device=runtime.device, micro_batch_size=config.micro_batch_size
    )
    return {"ece": found.error, "accuracy": found.accuracy, "confidence": found.confidence}


def _exposure_figures(
    config: EvaluateConfig, loaded: LoadedModel, dataset: ChunkDataset, runtime: Runtime
) -> dict[str, float]:
    given = dataclasses.replace(config.model, path=config.teacher)
    teacher = load_for_inference(given, config.parallel, dataset, runtime)
    _check_same_rows(loaded, teacher, config.parallel.tensor_model_parallel_size)
    found = exposure_bias(
        loaded.chunks,
        teacher.chunks,
        loaded.groups,
        dataset,
        config.exposure,
        device=runtime.device,
        micro_batch_size=config.micro_batch_size,
    )
    return {
        "kl_on_student_text": found.on_student_text,
        "kl_on_teacher_text": found.on_teacher_text,
        "excess_accumulated_error_percent": found.excess_accumulated_error,
    }


def _check_same_rows(student: LoadedModel, teacher: LoadedModel, tensor_parallel_size: int) -> None:
    """Both output layers must be split at the same ids, on every rank alike."""
    sizes = [model.info.architecture.vocab_size for model in (student, teacher)]
    rows = [padded_vocab_size(size, tensor_parallel_size) for size in sizes]
    if tensor_parallel_size > 1 and rows[0] != rows[1]:
        raise LayoutError(
            f"the exposure bias compares vocabularies of {sizes[0]} and {sizes[1]} ids, which "
            f"'parallel.tensor_model_parallel_size' {tensor_parallel_size} splits at different ids: use 1"
        )
