"""``convert_to_hf``: a checkpoint to a Hugging Face folder, verified before it gets its name.

    python tools/convert_to_hf.py input=runs/quickstart/runs/miniplm output=my_model

    checkpoint  →  whole mcore tensors, one after another  →  rules  →  safetensors, config.json, tokenizer, model card
                                                            ↘  verify: transformers' logits against mcore's

Without ``verify`` about the largest tensor is in memory at a time, not the model. The model card (README.md) says what
the model is, how it was trained and on what, by the checkpoint's manifest.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kd.artefacts.artefact_folder import building, refuse_existing
from megatron_kd.checkpoints.families import family_of, hf_config, tensor_table
from megatron_kd.checkpoints.safetensors_file import SafetensorsWriter, TensorSpec
from megatron_kd.checkpoints.sharded_state import meta_state, meta_tensors, stream_tensors
from megatron_kd.checkpoints.weights import CheckpointInfo, load_whole_model, open_checkpoint
from megatron_kd.conversion.conversion_config import ConvertToHFConfig, parse_size
from megatron_kd.conversion.parity import compare_logits
from megatron_kd.data.tokenization import hashes_in_folder, is_tokenizer_file
from megatron_kd.errors import CheckpointError
from megatron_kd.logs import progress_bar
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.runtime import distributed_runtime


def run(config: ConvertToHFConfig) -> Path:
    """Write the folder and return its path.

    Raises:
        CheckpointError: the checkpoint or its tokenizer cannot be read, or the logits do not agree.
        DataError: the output exists, or the tokenizer is not readable.
    """
    output = Path(config.output)
    refuse_existing(output)
    with distributed_runtime() as runtime:
        if runtime.world_size > 1:
            raise CheckpointError("convert_to_hf runs in one process: start it without torchrun")
        info = open_checkpoint(config.input)
        if info.is_hf_folder:
            raise CheckpointError(f"{info.path}: is a Hugging Face folder already")
        tokenizer = tokenizer_folder(config.tokenizer, info)
        with building(output) as folder, verified_meanwhile(info):
            precision = info.manifest["precision"]
            shapes = meta_tensors(meta_state(info.architecture, precision))
            tensors = stream_tensors(info.path, info.architecture, precision)
            shard_bytes = parse_size(config.max_shard_size)
            write_hf_folder(folder, info.architecture, shapes, tensors, info.manifest, tokenizer, shard_bytes)
            if config.verify:
                model, _ = load_whole_model(info.path)
                compare_logits(model, folder, "the exported model's")
    return output


@contextmanager
def verified_meanwhile(info: CheckpointInfo) -> Iterator[None]:
    """Compare the checksums in a thread while the block reads the same files.

    Raises:
        CheckpointError: a file is damaged; raised instead of what the damage led to in the block.
    """
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(info.verify)
        try:
            yield
        finally:
            check.result()


def write_hf_folder(
    folder: Path,
    architecture: ModelArchitecture,
    shapes: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    manifest: Mapping[str, Any],
    tokenizer: Path,
    shard_bytes: int,
) -> None:
    """Fill an empty folder with a model.

    Args:
        folder: the folder.
        architecture: of the model.
        shapes: every mcore tensor on the meta device (names of the local layer spec); vocabularies may be padded.
        tensors: the same with data, in the same order, each used and released.
        manifest: of the checkpoint.
        tokenizer: folder with the tokenizer's files.
        shard_bytes: largest size of a file.

    Raises:
        CheckpointError: the names or shapes are not the architecture's.
    """
    write_weights(folder, architecture, shapes, tensors, shard_bytes)
    write_settings(folder, architecture, manifest, tokenizer, next(iter(shapes.values())).dtype)


@torch.no_grad()
def write_weights(
    folder: Path,
    architecture: ModelArchitecture,
    shapes: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int,
) -> None:
    """Write the safetensors files; see :func:`write_hf_folder`."""
    table = tensor_table(architecture, "the checkpoint")
    wanted = [name for name in shapes if not name.endswith("_extra_state")]  # Transformer Engine's extra state
    table.require_mcore_names(set(wanted))
    specs = {
        hf_name: TensorSpec(tuple(part.shape), part.dtype)
        for name in wanted
        for hf_name, part in table.to_hf(name, shapes[name])
    }
    total = sum(spec.nbytes for spec in specs.values())
    with SafetensorsWriter(folder, specs, shard_bytes) as writer, progress_bar(total, "export") as bar:
        for name, tensor in tensors:
            if name not in table.mcore_names:
                continue
            for hf_name, part in table.to_hf(name, tensor):
                writer.add(hf_name, part)
                bar.update(part.nbytes)


def write_settings(
    folder: Path,
    architecture: ModelArchitecture,
    manifest: Mapping[str, Any],
    tokenizer: Path,
    dtype: torch.dtype,
) -> None:
    """Write everything but the weights: config.json, generation_config.json, the tokenizer's files, the model card."""
    eos_id, bos_id = manifest.get("eos_id"), manifest.get("bos_id")
    _write_json(folder / "config.json", hf_config(architecture, str(dtype).removeprefix("torch."), eos_id, bos_id))
    generation = manifest.get("generation_config") or {
        "bos_token_id": eos_id if bos_id is None else bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
    }
    _write_json(folder / "generation_config.json", generation)
    for path in sorted(tokenizer.iterdir()):
        if is_tokenizer_file(path):
            shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(model_card(architecture, manifest), encoding="utf-8")


def tokenizer_folder(given: str | None, info: CheckpointInfo) -> Path:
    """Return the folder of the tokenizer's files: ``given``, or what the checkpoint names (relative to itself).

    Raises:
        CheckpointError: there is no tokenizer.json, or it is not the tokenizer that the model was trained with.
        DataError: it cannot be read.
    """
    folder = given or (info.manifest.get("tokenizer_path") and info.path / info.manifest["tokenizer_path"])
    if not folder or not (Path(folder) / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder}: no tokenizer.json there, where the checkpoint's dataset kept its tokenizer; "
            "give 'tokenizer=FOLDER'"
        )
    hashes = hashes_in_folder(Path(folder), info.manifest["eos_id"])
    if info.tokenizer_hash not in hashes:
        raise CheckpointError(
            f"{folder} holds the tokenizer {' or '.join(hashes)}, but {info.path} was trained with "
            f"{info.tokenizer_hash}: give that one with 'tokenizer=FOLDER'"
        )
    return Path(folder)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_HEADER = ("---", "library_name: transformers", "pipeline_tag: text-generation", "---", "")


def model_card(architecture: ModelArchitecture, manifest: Mapping[str, Any]) -> str:
    """Return the card; what the manifest does not say is left out."""
    hf_class = family_of(architecture).hf_class
    name = manifest.get("config", {}).get("model", {}).get("name") or hf_class
    lines = [
        *_HEADER,
        f"# {name}",
        "",
        f"A {hf_class} of {architecture.parameters:,} parameters "
        f"({architecture.non_embedding_parameters:,} without embeddings), written by Megatron-KD.",
        "",
        "## Training",
        "",
        *_training(manifest),
        "",
        "## Data",
        "",
        *_data(manifest),
    ]
    evaluation = manifest.get("evaluation")
    if evaluation:
        lines += ["", "## Evaluation", "", "| measure | value |", "|---|---|"]
        lines += [f"| {key.replace('_', ' ')} | {_number(value)} |" for key, value in evaluation.items()]
    lines += ["", "The data decide what the model may be used for and under which licence: neither is known here.", ""]
    return "\n".join(lines)


def _training(manifest: Mapping[str, Any]) -> Iterator[str]:
    config, progress = manifest.get("config", {}), manifest.get("progress", {})
    if not config:
        for parent in manifest.get("parents", []):
            yield f"- converted from {parent['kind'].replace('_', ' ')} `{parent['path']}`; not trained here"
        return
    distillation, teacher = config.get("distillation", {}), config.get("teacher", {})
    method = distillation.get("method", "none")
    yield "- method: " + ("pre-training without distillation" if method == "none" else _method(distillation, teacher))
    yield f"- steps: {_number(progress.get('step'))}, predicted tokens: {_number(progress.get('tokens'))}"
    if manifest.get("train_flops"):
        yield f"- training FLOPs, the teacher's passes counted: {manifest['train_flops']:.3e}"
    init_from = config.get("model", {}).get("init_from")
    yield f"- started from: {f'`{init_from}`' if init_from else 'random weights'}"
    yield f"- sequence length: {manifest.get('seq_length')}, precision: {manifest.get('precision')}"
    skipped = progress.get("incidents", {}).get("skipped_batches")
    if skipped:
        yield f"- batches skipped: {skipped}"


def _method(distillation: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    text = f"{distillation['method']} from the teacher {teacher.get('path')}"
    keys = ("divergence", "kd_ratio", "temperature", "temperature_squared")
    details = [f"{key} {distillation[key]}" for key in keys if key in distillation]
    return f"{text} ({', '.join(details)})" if details else text


def _data(manifest: Mapping[str, Any]) -> Iterator[str]:
    if manifest.get("dataset_path"):
        yield f"- dataset: {manifest['dataset_path']} (fingerprint {manifest.get('dataset_fingerprint')})"
        for parent in manifest.get("dataset_parents", []):
            role = f" as {parent['role']}" if parent.get("role") else ""
            yield f"- made from {parent['kind'].replace('_', ' ')} `{parent['path']}`{role}"
    yield f"- tokenizer hash: {manifest.get('tokenizer_hash')}"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
