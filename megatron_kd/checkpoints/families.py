"""The table of model families, and what is done with it: config.json in both directions, a model's tensor table."""

from typing import Any, Mapping

from megatron_kd.checkpoints.family import ConfigReader, Family, LlamaLike
from megatron_kd.checkpoints.rules import TensorTable
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LlamaLike(
            "qwen2",
            "Qwen2ForCausalLM",
            "Qwen1.5, Qwen2, Qwen2.5",
            add_qkv_bias=True,
            unsupported=("use_sliding_window",),
        ),
        LlamaLike(
            "qwen3",
            "Qwen3ForCausalLM",
            "Qwen3",
            qk_layernorm=True,
            head_dim=128,
            unsupported=("use_sliding_window", "attention_bias"),
        ),
        LlamaLike(
            "llama",
            "LlamaForCausalLM",
            "Llama 2, 3, 3.1, 3.2",
            unsupported=("attention_bias", "mlp_bias"),
            starts_with_bos=True,
        ),
        LlamaLike("mistral", "MistralForCausalLM", "Mistral", sliding_window=4096, starts_with_bos=True),
    )
}


def family_of(architecture: ModelArchitecture) -> Family:
    """Return the family that an architecture is exported as.

    Raises:
        CheckpointError: there is none, or the family's class in transformers cannot express the architecture.
    """
    family = FAMILIES.get(architecture.hf_model_type)
    if family is None:
        raise CheckpointError(
            f"'{architecture.hf_model_type}' is not a known family: choose one of {', '.join(FAMILIES)}"
        )
    faults = family.inexpressible(architecture)
    if faults:
        raise CheckpointError(f"{family.hf_class} cannot express this model: it has {', '.join(faults)}")
    return family


def exportable_as(architecture: ModelArchitecture) -> str | None:
    """Return the first family, by ``model_type``, that can express an architecture of unknown family."""
    return next((name for name, family in FAMILIES.items() if not family.inexpressible(architecture)), None)


def tensor_table(architecture: ModelArchitecture, where: str) -> TensorTable:
    """Return the rules of every tensor of a model, in ``where`` (for errors).

    Raises:
        CheckpointError: no family can express the architecture.
    """
    return TensorTable(family_of(architecture).rules(architecture), architecture, where)


def hf_config(
    architecture: ModelArchitecture, dtype: str, eos_token_id: int | None, bos_token_id: int | None = None
) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
        architecture: with its vocabulary size filled in.
        dtype: of the tensors, as torch calls it (``float32``).
        eos_token_id: ends a document.
        bos_token_id: begins one; None means eos does.

    Raises:
        CheckpointError: no family can express the model.
    """
    family = family_of(architecture)
    return {
        "architectures": [family.hf_class],
        "model_type": family.model_type,
        **family.write_config(architecture),
        "bos_token_id": eos_token_id if bos_token_id is None else bos_token_id,
        "eos_token_id": eos_token_id,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def architecture_from_hf(config: Mapping[str, Any], where: str) -> ModelArchitecture:
    """Return the architecture that a config.json describes.

    Args:
        config: its content.
        where: what errors call it.

    Raises:
        CheckpointError: the family is unknown, a key is missing or has an impossible value, or a feature is not
            supported.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        supported = "; ".join(f"{name} ({known.covers})" for name, known in FAMILIES.items())
        raise CheckpointError(f"{where}: model_type is {model_type!r}, where these are supported: {supported}")
    if config.get("quantization_config"):
        raise CheckpointError(f"{where}: quantized weights are not supported: give the folder they were made from")
    return family.read_config(ConfigReader(config, where))
