"""A Hugging Face folder as a source of weights: read tensor by tensor, straight into a sharded model.

Only safetensors are read, and only files inside the folder. Every rank reads what it holds: a whole tensor is in
memory one at a time.
"""

import json
from pathlib import Path
from typing import Any, Sequence

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_kd.checkpoints.families import architecture_from_hf, tensor_table
from megatron_kd.errors import CheckpointError
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.models.parameters import global_indices, global_parameter_name, global_shape, take_local_part

CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION_NAME = "generation_config.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def is_hf_folder(path: Path) -> bool:
    """Return whether ``path`` looks like an exported model."""
    return (path / CONFIG_NAME).is_file()


class HFFolder:
    """The configuration and the tensors of a Hugging Face folder.

    Attributes:
        path: the folder.
        config: content of config.json.
        architecture: what config.json describes.
        table: the rule of every tensor.

    Raises:
        CheckpointError: there are no weights, the family is unknown, or tensors do not fit the architecture (lists
            them).
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = _read_json(path / CONFIG_NAME)
        self.architecture = architecture_from_hf(self.config, str(path / CONFIG_NAME))
        self.table = tensor_table(self.architecture, str(path))
        self._files = _locate_tensors(path)
        self.table.require_hf_names(set(self._files))

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, if the model has one.

        Raises:
            CheckpointError: config.json has something else there.
        """
        value = self.config.get("bos_token_id")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise CheckpointError(f"{self.path / CONFIG_NAME}: bos_token_id must be a whole number, not {value!r}")
        return value

    def generation_settings(self) -> dict[str, Any] | None:
        """Return the content of generation_config.json, if there is one.

        Raises:
            CheckpointError: it cannot be read.
        """
        path = self.path / GENERATION_NAME
        return _read_json(path) if path.is_file() else None

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, on the CPU.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            with safe_open(self._files[name], framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._files[name]}: cannot read '{name}' ({error})") from None

    def dtypes(self) -> set[torch.dtype]:
        """Return the dtypes of the tensors that the table needs.

        Raises:
            CheckpointError: a file cannot be read.
        """
        needed = self.table.hf_names
        found = set()
        for file in sorted({self._files[name] for name in needed}):
            try:
                with safe_open(file, framework="pt") as tensors:
                    found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys() if name in needed}
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from None
        return {_DTYPES.get(name, torch.uint8) for name in found}

    def mcore_tensor(self, name: str, vocab_rows: int) -> Tensor:
        """Return a whole mcore tensor, its vocabulary padded to ``vocab_rows``.

        Raises:
            CheckpointError: a tensor cannot be read or has another shape than the architecture's.
        """
        return self.table.to_mcore(name, self.tensor, vocab_rows)

    @torch.no_grad()
    def load_into(self, chunks: Sequence[HiddenStateGPTModel]) -> None:
        """Fill this rank's model chunks.

        Raises:
            CheckpointError: a tensor cannot be read or has another shape than the model's.
        """
        for chunk in chunks:
            for local_name, parameter in chunk.named_parameters():
                name = global_parameter_name(chunk, local_name)
                whole = self.mcore_tensor(name, self.architecture.vocab_size)
                shape = global_shape(name, parameter, chunk)
                if tuple(whole.shape) != shape:  # a shorter one would be padded
                    raise CheckpointError(
                        f"{self.path}: '{self.table.hf_names_of(name)[0]}' does not fit the architecture in "
                        f"{CONFIG_NAME}: shape {list(whole.shape)}, not {list(shape)}"
                    )
                parameter.copy_(take_local_part(whole, global_indices(name, parameter, chunk)))


def _locate_tensors(path: Path) -> dict[str, Path]:
    """Map every tensor's name to its file."""
    if (path / INDEX_NAME).is_file():
        located = {}
        weight_map = _read_json(path / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path / INDEX_NAME}: has no 'weight_map' of tensor names to files")
        for name, file in weight_map.items():
            if not isinstance(file, str) or "\0" in file or Path(file).name != file:
                raise CheckpointError(f"{path / INDEX_NAME}: names {file!r}, which is not a file of its folder")
            located[name] = path / file
        missing = sorted({str(file) for file in located.values() if not file.is_file()})
        if missing:
            raise CheckpointError(f"{path / INDEX_NAME}: names files that are missing: {', '.join(missing)}")
        return located
    if not (path / WEIGHTS_NAME).is_file():
        raise CheckpointError(
            f"{path}: has a {CONFIG_NAME} but neither {WEIGHTS_NAME} nor {INDEX_NAME}: only safetensors are read"
        )
    try:
        with safe_open(path / WEIGHTS_NAME, framework="pt") as file:
            return {name: path / WEIGHTS_NAME for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / WEIGHTS_NAME}: not a readable safetensors file ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold an object, not {type(content).__name__}")
    return content
