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

from megatron_kd.checkpoints.families import architecture_from_hf
from megatron_kd.checkpoints.rules import Rename, check_hf_names, decoder_rules, expand, uses_fused_norms
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.models.parameters import global_indices, global_parameter_name, global_shape, take_local_part

CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION_NAME = "generation_config.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def is_hf_folder(path: Path) -> bool:
    """Whether ``path`` looks like an exported model."""
    return (path / CONFIG_NAME).is_file()


class HFFolder:
    """The configuration and the tensors of a Hugging Face folder.

    Attributes:
        path: the folder.
        architecture: as config.json describes it.
        config: config.json.

    Raises:
        CheckpointError: no weights, another family, or tensors that do not fit the architecture (lists them).
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = _read_json(path / CONFIG_NAME)
        self.architecture: ModelArchitecture = architecture_from_hf(self.config, str(path / CONFIG_NAME))
        self._files = _locate_tensors(path)
        self._rules: dict[str, Rename] = {}
        check_hf_names(
            expand(decoder_rules(self.architecture), self.architecture.num_layers),
            self.architecture,
            set(self._files),
            str(path),
        )

    @property
    def bos_id(self) -> int | None:
        """What a text begins with, if the model has such an id.

        Raises:
            CheckpointError: config.json has something else there.
        """
        value = self.config.get("bos_token_id")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise CheckpointError(f"{self.path / CONFIG_NAME}: bos_token_id must be a whole number, not {value!r}")
        return value

    def generation_settings(self) -> dict[str, Any] | None:
        """generation_config.json, if there is one.

        Raises:
            CheckpointError: it cannot be read.
        """
        path = self.path / GENERATION_NAME
        return _read_json(path) if path.is_file() else None

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        try:
            with safe_open(self._files[name], framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._files[name]}: cannot read '{name}' ({error})") from None

    def dtypes(self) -> set[torch.dtype]:
        """Of the tensors that the table needs."""
        needed = {name for rule in self._rule_by_name().values() for name in rule.hf}
        found = set()
        for file in sorted({self._files[name] for name in needed}):
            try:
                with safe_open(file, framework="pt") as tensors:
                    found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys() if name in needed}
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from None
        return {_DTYPES.get(name, torch.uint8) for name in found}

    def mcore_tensor(self, name: str, vocab_rows: int) -> Tensor:
        """A whole mcore tensor (names of the local layer spec), its vocabulary padded to ``vocab_rows``.

        Raises:
            CheckpointError: a tensor cannot be read or has another shape than the architecture's.
        """
        rule = self._rule_by_name()[name]
        try:
            return rule.to_mcore([self.tensor(part) for part in rule.hf], self.architecture, vocab_rows)
        except RuntimeError as error:
            raise self._misfit(rule, error) from None

    def _rule_by_name(self) -> dict[str, Rename]:
        if not self._rules:
            rules = expand(decoder_rules(self.architecture), self.architecture.num_layers)
            self._rules = {rule.mcore: rule for rule in rules}
        return self._rules

    def _misfit(self, rule: Rename, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: '{rule.hf[0]}' does not fit the architecture in {CONFIG_NAME}: {str(error).splitlines()[0]}"
        )

    @torch.no_grad()
    def load_into(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Fill this rank's model chunks.

        Raises:
            CheckpointError: a tensor cannot be read or has another shape than the model's.
        """
        for chunk in chunks:
            parameters = dict(chunk.named_parameters())
            rules = {
                rule.mcore: rule
                for rule in expand(
                    decoder_rules(self.architecture, uses_fused_norms(parameters)), self.architecture.num_layers
                )
            }
            for local_name, parameter in parameters.items():
                name = global_parameter_name(chunk, local_name)
                rule = rules[name]
                try:
                    whole = rule.to_mcore(
                        [self.tensor(part) for part in rule.hf], self.architecture, self.architecture.vocab_size
                    )
                    shape = global_shape(name, parameter, chunk)
                    if tuple(whole.shape) != shape:  # a shorter one would be padded
                        raise RuntimeError(f"shape {list(whole.shape)}, not {list(shape)}")
                    parameter.copy_(take_local_part(whole, global_indices(name, parameter, chunk)))
                except (RuntimeError, IndexError) as error:
                    raise self._misfit(rule, error) from None


def _locate_tensors(path: Path) -> dict[str, Path]:
    """Tensor name -> file."""
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
