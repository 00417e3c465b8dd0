"""``convert_from_hf``: a Hugging Face folder to a checkpoint that loads under every layout.

python tools/convert_from_hf.py input=Qwen2.5-1.5B output=checkpoints/qwen2.5-1.5b

config.json  →  architecture  →  save plan without data
safetensors  →  rules, one tensor when the plan asks for it  →  torch_dist files, manifest, tokenizer
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from megatron_kd.artefacts.artefact_folder import building, refuse_existing
from megatron_kd.artefacts.checksums import Checksums
from megatron_kd.checkpoints.checkpoint_writer import FORMAT, write_checkpoint_manifest
from megatron_kd.checkpoints.hf_folder import HFFolder
from megatron_kd.checkpoints.sharded_save import ShardedSave
from megatron_kd.checkpoints.sharded_state import PlacedTensors, meta_state, meta_tensors
from megatron_kd.checkpoints.weights import load_whole_model
from megatron_kd.conversion.conversion_config import ConvertFromHFConfig
from megatron_kd.conversion.parity import compare_logits
from megatron_kd.data.chunk_dataset import TOKENIZER_FOLDER
from megatron_kd.data.tokenization import is_tokenizer_file, load_tokenizer
from megatron_kd.errors import CheckpointError, DataError
from megatron_kd.logs import progress_bar
from megatron_kd.models.architecture import Precision
from megatron_kd.models.gpt import padded_vocab_size
from megatron_kd.parallel.runtime import distributed_runtime

logger = logging.getLogger(__name__)

PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def run(config: ConvertFromHFConfig) -> Path:
    """Write the checkpoint and return its path.

    Raises:
        CheckpointError: the folder cannot be read, is of an unknown family, its tensors are not the family's, or the
            logits do not agree.
        DataError: the output exists.
    """
    output = Path(config.output)
    refuse_existing(output)
    if not (Path(config.input) / "config.json").is_file():
        raise CheckpointError(f"{config.input}: no config.json there: give the folder of a Hugging Face model")
    source = HFFolder(Path(config.input))
    with distributed_runtime() as runtime, building(output) as folder:
        if runtime.world_size > 1:
            raise CheckpointError("convert_from_hf runs in one process: start it without torchrun")
        dtype = common_dtype(source)
        checksums = write_weights(source, folder, dtype)
        about = describe_source(source, folder, dtype, config.seq_length)
        write_checkpoint_manifest(folder, checksums, source.architecture, about)
        if config.verify:
            model, _ = load_whole_model(folder)
            compare_logits(model, source.path, "the imported model's")
    return output


def write_weights(source: HFFolder, folder: Path, dtype: torch.dtype) -> Checksums:
    """Write the tensors of ``source`` as a checkpoint, each converted when it is its turn.

    Returns:
        The checksums of the checkpoint's large files.

    Raises:
        CheckpointError: a tensor cannot be read or has another shape than the architecture's.
    """
    state = meta_state(source.architecture, PRECISIONS[dtype])
    total = sum(tensor.nbytes for tensor in meta_tensors(state).values())
    reader = _TensorsInTurn(source, state, dtype)
    save = ShardedSave(reader.resolve)
    dist_checkpointing.save(state, str(folder), sharded_strategy=save, content_metadata=dict(FORMAT))
    with progress_bar(total, "convert") as bar:
        save.write(bar.update)
    if reader.error is not None:
        raise reader.error
    failure, checksums = save.finish()
    if failure is not None:
        raise CheckpointError(f"{folder.name.split('.tmp')[0]} could not be written: {failure}")
    return checksums


class _TensorsInTurn:
    """The tensors of a Hugging Face folder for a save plan. The last one is kept: its parts are asked for in turn."""

    def __init__(self, source: HFFolder, state: dict[str, Any], dtype: torch.dtype):
        self._source, self._dtype = source, dtype
        self._placed = PlacedTensors(state)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in meta_tensors(state).items()}
        self._vocab_rows = padded_vocab_size(source.architecture.vocab_size, 1)
        self._kept: tuple[str, Tensor] | None = None
        self.error: CheckpointError | None = None

    def resolve(self, item: WriteItem) -> Tensor:
        """Return the part of a tensor that ``item`` stands for, in the shape of its chunk."""
        name, start, rows = self._placed.find(item)
        if self._kept is None or self._kept[0] != name:
            self._kept = None  # released before the next is read
            self._kept = (name, self._whole(name))
        assert item.tensor_data is not None
        return self._kept[1][start : start + rows].reshape(item.tensor_data.chunk.sizes)

    def _whole(self, name: str) -> Tensor:
        try:
            tensor = self._source.mcore_tensor(name, self._vocab_rows).to(self._dtype)
            if tuple(tensor.shape) != self._shapes[name]:
                raise CheckpointError(
                    f"{self._source.path}: the tensors of '{name}' have shape {list(tensor.shape)} together, the "
                    f"architecture in config.json says {list(self._shapes[name])}"
                )
            return tensor
        except CheckpointError as error:  # the writer would wrap it
            self.error = error
            raise


def common_dtype(source: HFFolder) -> torch.dtype:
    """Return fp32 or bf16, whichever all tensors have; fp32 for float16 and mixtures, with a line that says so.

    Raises:
        CheckpointError: there are tensors of another dtype.
    """
    found = source.dtypes()
    if len(found) == 1 and found <= PRECISIONS.keys():
        return next(iter(found))
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
    if not found <= {*PRECISIONS, torch.float16}:
        raise CheckpointError(f"{source.path}: has tensors of {names}; float32, bfloat16 and float16 are supported")
    logger.info(f"{names} becomes float32, which holds it exactly")
    return torch.float32


def describe_source(source: HFFolder, folder: Path, dtype: torch.dtype, seq_length: int | None) -> dict[str, Any]:
    """Copy the tokenizer's files into ``folder``, and return what the manifest says of the checkpoint's origin.

    Raises:
        CheckpointError: there is no tokenizer that can be read.
    """
    try:
        tokenizer = load_tokenizer(source.path).info
    except DataError as error:
        raise CheckpointError(f"{source.path}: its tokenizer cannot be read: {error}") from None
    (folder / TOKENIZER_FOLDER).mkdir()
    for file in sorted(source.path.iterdir()):
        if is_tokenizer_file(file):
            shutil.copyfile(file, folder / TOKENIZER_FOLDER / file.name)
    return {
        "progress": {"step": 0, "tokens": 0, "seconds": 0.0},
        "tokenizer_hash": tokenizer.hash,
        "tokenizer_path": TOKENIZER_FOLDER,
        "eos_id": tokenizer.eos_id,
        "bos_id": source.bos_id,
        "dataset_fingerprint": None,
        "dataset_path": None,
        "seq_length": seq_length or source.architecture.max_position_embeddings,
        "precision": PRECISIONS[dtype],
        "generation_config": source.generation_settings(),
        "config": {},
        "parents": [{"kind": "hf_folder", "path": str(source.path.absolute())}],
    }
