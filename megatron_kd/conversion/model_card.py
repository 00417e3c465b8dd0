"""README.md of an exported folder: what the model is, how it was trained and on what, as its checkpoint tells."""

from typing import Any, Iterator, Mapping

from megatron_kd.conversion.families import family_of
from megatron_kd.models.architecture import ModelArchitecture

_HEADER = ("---", "library_name: transformers", "pipeline_tag: text-generation", "---", "")


def model_card(architecture: ModelArchitecture, manifest: Mapping[str, Any]) -> str:
    """The text, from the checkpoint's manifest; what the manifest does not know is left out."""
    name = manifest.get("config", {}).get("model", {}).get("name") or family_of(architecture).hf_architecture
    lines = [
        *_HEADER,
        f"# {name}",
        "",
        f"A {family_of(architecture).hf_architecture} of {architecture.parameters:,} parameters "
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
