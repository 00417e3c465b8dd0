"""Checkpoints of Megatron-LM itself (``torch_dist``) as a source of weights: teacher, student's start, export.

Megatron-LM keeps its arguments in the checkpoint (``common.pt``, or an object in the sharded files in newer versions),
which describe the architecture. They are unpickled with ``weights_only``: plain containers and enumerations are
allowed, any other class is refused by name. torch's own ``.metadata`` is a pickle without such a guard: read
checkpoints whose origin you trust.
"""

import argparse
import enum
import importlib
import io
import pathlib
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch

from megatron_kd.artefacts.checksums import SIDECAR_NAME
from megatron_kd.artefacts.manifest import MANIFEST_NAME
from megatron_kd.checkpoints.families import exportable_as
from megatron_kd.checkpoints.sharded_state import StoredTensors, sharded_weights, tensor_entries
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.models.gpt import HiddenStateGPTModel

ITERATION_NAME, COMMON_NAME, METADATA_NAME = "latest_checkpointed_iteration.txt", "common.pt", ".metadata"
_CONTAINERS = (argparse.Namespace, types.SimpleNamespace, pathlib.PosixPath, pathlib.PurePosixPath)
_WANTED = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "num_experts": None,
    "multi_latent_attention": False,
    "apply_layernorm_1p": False,
    "window_size": None,
    "rotary_seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "heterogeneous_layers_config_path": None,
}


def find_stock_checkpoint(path: Path) -> Path | None:
    """Return the folder of a Megatron-LM checkpoint that ``path`` is or points to; None if it is something else."""
    tracker = path / ITERATION_NAME
    if tracker.is_file():
        name = tracker.read_text(encoding="utf-8").strip()
        path = path / (name if name == "release" else f"iter_{int(name):07d}" if name.isdigit() else "iter_unknown")
    is_ours = (path / MANIFEST_NAME).exists() or (path / SIDECAR_NAME).exists()
    return path if (path / METADATA_NAME).is_file() and not is_ours else None


class StockCheckpoint:
    """A Megatron-LM checkpoint.

    Attributes:
        path: its folder (``iter_0001000``).
        arguments: Megatron-LM's.
        architecture: what the arguments describe; ``vocab_size`` is the padded one.

    Raises:
        CheckpointError: it is damaged, or of an architecture that is not supported.
    """

    def __init__(self, path: Path):
        self.path = path
        self._stored = StoredTensors(path)
        self.arguments = self._arguments()
        self.architecture = architecture_from_arguments(self.arguments, str(path))

    @torch.no_grad()
    def load_into(self, model_chunks: Sequence[HiddenStateGPTModel]) -> None:
        """Fill this rank's model chunks; every rank reads what it holds.

        Raises:
            CheckpointError: tensors are missing (lists them) or have another shape than the model's.
        """
        for chunk in model_chunks:
            parameters = dict(chunk.named_parameters())
            state = tensor_entries(sharded_weights(chunk, chunk.pg_collection))
            entries = {name: entry for name, entry in state.items() if name in parameters}
            self._stored.require_entries(entries.values())
            for name, entry in entries.items():
                parameters[name].copy_(self._stored.read(entry))

    def _arguments(self) -> Any:
        common = self.path / COMMON_NAME
        data = common.read_bytes() if common.is_file() else self._stored.read_object("common_state")
        if data is None:
            raise CheckpointError(f"{self.path}: has neither {COMMON_NAME} nor 'common_state'; is it a checkpoint?")
        content = _unpickle(data, str(common))
        content = content[0] if isinstance(content, list) else content
        if not isinstance(content, dict) or "args" not in content:
            raise CheckpointError(f"{self.path}: holds no Megatron-LM arguments, so its architecture is not known")
        return content["args"]


def architecture_from_arguments(arguments: Any, where: str) -> ModelArchitecture:
    """Return the architecture that Megatron-LM's arguments describe.

    Raises:
        CheckpointError: an argument is missing, or some ask for what is not supported (names all such).
    """

    def get(name: str, *default: Any) -> Any:
        value = getattr(arguments, name, default[0] if default else None)
        if value is None and not default:
            raise CheckpointError(f"{where}: Megatron-LM's argument '{name}' is missing")
        return value

    faults = [f"{name}={get(name, wanted)!r}" for name, wanted in _WANTED.items() if get(name, wanted) != wanted]
    if faults:
        raise CheckpointError(f"{where}: Megatron-LM's arguments {', '.join(faults)} are not supported")
    heads = get("num_attention_heads")
    scaled = bool(get("use_rope_scaling", False))
    architecture = ModelArchitecture(
        num_layers=get("num_layers"),
        hidden_size=get("hidden_size"),
        ffn_hidden_size=get("ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=get("num_query_groups") if get("group_query_attention", False) else heads,
        vocab_size=get("padded_vocab_size"),
        kv_channels=get("kv_channels", None) or 0,
        tie_word_embeddings=not get("untie_embeddings_and_output_weights", False),
        add_qkv_bias=bool(get("add_qkv_bias", False)),
        qk_layernorm=bool(get("qk_layernorm", False)),
        rope_theta=float(get("rotary_base", 10_000)),
        rope_scaling_factor=float(get("rope_scaling_factor", 8.0)) if scaled else 1.0,
        norm_epsilon=get("norm_epsilon", 1e-5),
        init_std=get("init_method_std", 0.02),
        max_position_embeddings=get("max_position_embeddings", 32_768),
    )
    return replace(architecture, hf_model_type=exportable_as(architecture) or architecture.hf_model_type)


def _unpickle(data: bytes, where: str) -> Any:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        allowed = list(_harmless(names, where))
        with torch.serialization.safe_globals(allowed):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - unpickling damaged data raises anything
        raise CheckpointError(f"{where}: cannot be read ({' '.join(str(error).split())[:200]})") from None


def _harmless(names: Sequence[str], where: str) -> Iterator[Any]:
    """Yield the classes behind names; only plain containers, and enumerations of imported modules or Megatron-Core."""
    for name in names:
        module_name, _, attribute = name.rpartition(".")
        is_megatron = module_name.startswith("megatron.core.")
        module = importlib.import_module(module_name) if is_megatron else sys.modules.get(module_name)
        found = getattr(module, attribute, None)
        is_enumeration = isinstance(found, type) and issubclass(found, enum.Enum)
        if found not in _CONTAINERS and not is_enumeration:
            raise CheckpointError(f"{where}: holds a '{name}', which is not loaded: it could run code")
        yield found
