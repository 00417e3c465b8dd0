"""``convert_to_hf``: a training checkpoint to a Hugging Face folder, verified before it gets its name.

    python tools/convert_to_hf.py input=runs/quickstart/runs/miniplm output=my_model

    checkpoint  →  whole mcore weights  →  rules (qwen2.py)  →  model.safetensors, config.json, tokenizer, model card
                                        ↘  verify: transformers' logits of that folder against mcore's
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_kd.conversion.qwen2 import HF_ARCHITECTURE, hf_config, qwen2_rules
from megatron_kd.conversion.rules import mcore_to_hf
from megatron_kd.data.artefact_folder import building, refuse_existing
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.models.gpt import HiddenStateGPTModel, full_logits
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.checkpoint import load_whole_model

LOGIT_TOLERANCE = 1e-4
VERIFIED_TOKENS = (2, 64)
WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
_WEIGHTS_PATTERN = "model{suffix}.safetensors"


@dataclass(frozen=True)
class ConvertToHFConfig:
    """The keys of ``convert_to_hf``."""

    input: str
    """A checkpoint, or a run folder, which means its newest."""
    output: str
    verify: bool = True
    """Compare the logits of the result in transformers with Megatron-Core's (fp32, largest difference below 1e-4)."""
    tokenizer: str | None = None
    """Folder with the tokenizer's files; None means the one of the dataset that the checkpoint was trained on."""
    max_shard_size: str = "5GB"

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        number, unit = self.max_shard_size[:-2], self.max_shard_size[-2:]
        if not number.isdigit() or int(number) < 1 or unit not in ("KB", "MB", "GB"):
            yield f"'max_shard_size' must be a whole number with KB, MB or GB, as in 5GB, not '{self.max_shard_size}'"


def run(config: ConvertToHFConfig) -> Path:
    """Write the folder and return its path.

    Raises:
        CheckpointError: the checkpoint or its tokenizer cannot be read, or the logits do not agree.
        DataError: the output exists.
    """
    output = Path(config.output)
    refuse_existing(output)
    with distributed_runtime():
        model, info = load_whole_model(config.input)
        tokenizer = _tokenizer_folder(config.tokenizer, info.manifest)
        state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
        with building(output) as folder:
            write_hf_folder(folder, info.architecture, state, info.manifest, tokenizer, config.max_shard_size)
            if config.verify:
                verify_logits(model, folder)
    return output


def write_hf_folder(
    folder: Path,
    architecture: ModelArchitecture,
    state: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
    tokenizer: Path,
    max_shard_size: str = "5GB",
) -> None:
    """Fill ``folder`` with everything that transformers reads, and a model card.

    Args:
        folder: an empty folder.
        architecture: of the model.
        state: whole tensors by mcore name (local layer spec); vocabularies may be padded.
        manifest: of the checkpoint.
        tokenizer: folder with the tokenizer's files.
        max_shard_size: weights are cut into files of at most this.
    """
    tensors = dict(mcore_to_hf(qwen2_rules(architecture), architecture, state))
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_safetensors(folder, tensors, max_shard_size)
    eos_id = manifest.get("eos_id")
    _write_json(folder / "config.json", hf_config(architecture, dtype, eos_id))
    _write_json(folder / "generation_config.json", {"bos_token_id": eos_id, "eos_token_id": eos_id,
                                                    "pad_token_id": eos_id})
    for path in sorted(tokenizer.iterdir()):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(model_card(architecture, manifest), encoding="utf-8")


def write_safetensors(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: str) -> None:
    """Write one ``model.safetensors``, or numbered ones with an index where one would be larger than the limit."""
    plan = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=_WEIGHTS_PATTERN,
                                              max_shard_size=max_shard_size)
    for filename, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        _write_json(folder / INDEX_NAME, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


@torch.no_grad()
def verify_logits(model: HiddenStateGPTModel, folder: Path) -> float:
    """Largest absolute difference, in fp32, between transformers' logits of ``folder`` and those of ``model``.

    Args:
        model: the unsharded mcore model; it is converted to fp32 in place.
        folder: the exported folder.

    Raises:
        CheckpointError: the difference is not below 1e-4.
    """
    exported = load_exported(folder)
    generator = torch.Generator().manual_seed(0)
    length = min(VERIFIED_TOKENS[1], model.max_sequence_length)
    tokens = torch.randint(0, model.valid_vocab_size, (VERIFIED_TOKENS[0], length), generator=generator)
    expected = full_logits(model.float(), tokens)
    found = exported(input_ids=tokens).logits
    if found.shape != expected.shape:
        raise CheckpointError(f"the exported model's logits have shape {list(found.shape)}, not {list(expected.shape)}")
    difference = (found - expected).abs().max().item()
    if not difference < LOGIT_TOLERANCE:
        raise CheckpointError(
            f"the exported model's logits differ from Megatron-Core's by {difference:.2e}, not below "
            f"{LOGIT_TOLERANCE:.0e}: nothing was written"
        )
    return difference


def load_exported(folder: Path) -> torch.nn.Module:
    """transformers' model of an exported folder, in fp32, beside a running Megatron-Core.

    ``from_pretrained`` builds on the meta device, which the CPU backend's tensor factories do not follow; so the
    model is built from config.json and filled from the files.

    Raises:
        CheckpointError: the files do not hold what the model needs, or more.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    state = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise CheckpointError(f"{folder}: transformers misses {missing} and does not know {unexpected}")
    return model


def model_card(architecture: ModelArchitecture, manifest: Mapping[str, Any]) -> str:
    """README.md of the folder: what the model is and what it was trained on, from the checkpoint's manifest."""
    progress, config = manifest.get("progress", {}), manifest.get("config", {})
    method = config.get("distillation", {}).get("method", "none")
    teacher = f" from the teacher {config['teacher']['path']}" if method != "none" else ""
    return "\n".join([
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {config.get('model', {}).get('name', HF_ARCHITECTURE)}",
        "",
        f"A {HF_ARCHITECTURE} of {architecture.parameters:,} parameters, pre-trained with Megatron-KD.",
        "",
        f"- distillation: {method}{teacher}",
        f"- steps: {progress.get('step')}, predicted tokens: {progress.get('tokens')}",
        f"- dataset: {manifest.get('dataset_path')} (fingerprint {manifest.get('dataset_fingerprint')})",
        f"- sequence length in training: {manifest.get('seq_length')}, precision: {manifest.get('precision')}",
        f"- tokenizer hash: {manifest.get('tokenizer_hash')}",
        "",
        "The dataset decides what the model may be used for and under which licence: neither is known here.",
        "",
    ])


def _tokenizer_folder(given: str | None, manifest: Mapping[str, Any]) -> Path:
    folder = given or manifest.get("tokenizer_path")
    if not folder or not (Path(folder) / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder}: no tokenizer.json there, where the checkpoint's dataset kept its tokenizer; "
            "give 'tokenizer=FOLDER'"
        )
    return Path(folder)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
