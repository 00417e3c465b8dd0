"""``evaluate``: held-out loss and bits per byte of a checkpoint under any layout, without an export; zero-shot tasks.

torchrun --nproc-per-node 2 tools/evaluate.py model.path=RUN data.path=HELDOUT [output=FILE.json] [parallel.…]
python tools/evaluate.py model.path=HF_FOLDER harness.tasks=[paper] [output=FILE.json]
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.checkpoints.weights import LoadedModel, load_for_inference
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import LayoutError
from megatron_kd.evaluation.calibration import calibration
from megatron_kd.evaluation.evaluate_config import EvaluateConfig
from megatron_kd.evaluation.exposure_bias import exposure_bias
from megatron_kd.evaluation.harness import run_harness
from megatron_kd.models.gpt import padded_vocab_size
from megatron_kd.parallel.runtime import Runtime, distributed_runtime
from megatron_kd.scoring.chunk_losses import heldout_loss


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, print the figures and return them.

    Raises:
        LayoutError: zero-shot tasks under several ranks, or a model that does not divide over the ranks.
        CheckpointError: the model or the teacher cannot be read.
        DataError: the held-out dataset or the data of a task cannot be read, or the dataset has another tokenizer.
        ConfigError: lm-evaluation-harness is not installed, or knows none of the tasks.
    """
    with distributed_runtime() as runtime:
        if config.harness.tasks and runtime.world_size > 1:
            raise LayoutError(
                f"harness.tasks runs in one process, not in {runtime.world_size}: start evaluate without torchrun, or "
                "evaluate the tasks in a second call"
            )
        figures: dict[str, Any] = {"model": config.model.path}
        if config.data.path is not None:
            figures |= _heldout_figures(config, config.data.path, runtime)
        if config.harness.tasks:
            figures["harness"] = run_harness(config.harness, config.model.path, runtime.device.type)
        if runtime.is_main:
            text = json.dumps(figures, indent=2)
            if config.output is not None:
                Path(config.output).parent.mkdir(parents=True, exist_ok=True)
                write_file(Path(config.output), text + "\n")
            sys.stdout.write(text + "\n")
        return figures


def _heldout_figures(config: EvaluateConfig, path: str, runtime: Runtime) -> dict[str, Any]:
    """Return loss, bits per byte and the other figures of a held-out dataset. Collective over the world."""
    dataset = ChunkDataset.open(path)
    loaded = load_for_inference(config.model, config.parallel, dataset, runtime)
    totals = heldout_loss(
        loaded.model_chunks, loaded.groups, dataset, device=runtime.device, micro_batch_size=config.micro_batch_size
    )
    figures = {
        "model": str(loaded.info.path),
        "dataset": path,
        "dataset_fingerprint": dataset.fingerprint,
        "heldout_loss": totals.loss,
        "bits_per_byte": totals.bits_per_byte,
        "tokens": totals.tokens,
        "text_bytes": totals.text_bytes,
    }
    if config.calibration:
        figures |= _calibration_figures(config, loaded, dataset, runtime)
    if config.teacher is not None:
        figures |= _exposure_figures(config, config.teacher, loaded, dataset, runtime)
    return figures


def _calibration_figures(
    config: EvaluateConfig, loaded: LoadedModel, dataset: ChunkDataset, runtime: Runtime
) -> dict[str, float]:
    found = calibration(
        loaded.model_chunks, loaded.groups, dataset, device=runtime.device, micro_batch_size=config.micro_batch_size
    )
    return {"ece": found.error, "accuracy": found.accuracy, "confidence": found.confidence}


def _exposure_figures(
    config: EvaluateConfig, teacher_path: str, loaded: LoadedModel, dataset: ChunkDataset, runtime: Runtime
) -> dict[str, float]:
    source = dataclasses.replace(config.model, path=teacher_path)
    teacher = load_for_inference(source, config.parallel, dataset, runtime)
    _check_same_rows(loaded, teacher, config.parallel.tensor_model_parallel_size)
    found = exposure_bias(
        loaded.model_chunks,
        teacher.model_chunks,
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
    """Refuse output layers that tensor parallelism splits at different ids.

    Raises:
        LayoutError: the two vocabularies are padded to different sizes.
    """
    sizes = [model.info.architecture.vocab_size for model in (student, teacher)]
    rows = [padded_vocab_size(size, tensor_parallel_size) for size in sizes]
    if tensor_parallel_size > 1 and rows[0] != rows[1]:
        raise LayoutError(
            f"the exposure bias compares vocabularies of {sizes[0]} and {sizes[1]} ids, which "
            f"'parallel.tensor_model_parallel_size' {tensor_parallel_size} splits at different ids: set it to 1"
        )
