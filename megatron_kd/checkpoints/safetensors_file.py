"""Safetensors written one tensor at a time; the library's own writer needs all of them in memory.

    8 bytes: n, little-endian   n bytes: JSON {name: {dtype, shape, data_offsets}}   the tensors' bytes in turn

Files larger than a limit are cut into ``model-00001-of-0000N.safetensors`` with an index, as transformers does.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Iterable, Mapping

import torch
from torch import Tensor

from megatron_kd.artefacts.artefact_folder import start_flush

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_ALIGNMENT, _FLUSH_BYTES = 8, 64 << 20


@dataclass(frozen=True)
class TensorSpec:
    """A tensor in a file's header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_files(specs: Mapping[str, TensorSpec], limit: int) -> dict[str, list[str]]:
    """Map file names to the names of their tensors, in the order of ``specs``.

    A file is larger than ``limit`` bytes only where a single tensor is.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + spec.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.nbytes
    if len(groups) == 1:
        return {WEIGHTS_NAME: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


class SafetensorsWriter:
    """Context that writes tensors, given in the planned order, into the planned files.

    Args:
        folder: where the files go.
        specs: every tensor, in the order of writing.
        limit: largest size of a file in bytes.

    Raises:
        ValueError: a tensor is not the next planned one, or one is missing at the end.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], limit: int):
        self._folder, self._specs = folder, specs
        self._files = plan_files(specs, limit)
        self._order = iter([(file, name) for file, names in self._files.items() for name in names])
        self._open: _OpenFile | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        file, expected = next(self._order, ("", ""))
        spec = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if name != expected or spec != self._specs[name]:
            planned = f"'{expected}' {self._specs[expected]}" if expected else "nothing"
            raise ValueError(f"'{name}' {spec} was given where {planned} was planned")
        if self._open is None or file != self._open.name:
            self._close()
            self._open = _OpenFile(self._folder, file, _header(self._specs, self._files[file]))
        self._open.write(tensor)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._close()
        if kind is not None:
            return
        missing = [name for _, name in self._order]
        if missing:
            raise ValueError(f"planned tensors were never given: {', '.join(missing[:3])}")
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self._specs.values())},
                "weight_map": {name: file for file, names in self._files.items() for name in names},
            }
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


class _OpenFile:
    """A file being written; what is there is flushed to the disk along the way."""

    def __init__(self, folder: Path, name: str, header: bytes):
        self.name, self._stream, self._flushed = name, open(folder / name, "wb"), 0
        self._stream.write(header)

    def write(self, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._stream.write(data.numpy().data)
        written = self._stream.tell()
        if written - self._flushed >= _FLUSH_BYTES:
            self._stream.flush()
            start_flush(self._stream.fileno(), self._flushed, written - self._flushed)
            self._flushed = written

    def close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def _header(specs: Mapping[str, TensorSpec], names: Iterable[str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        spec = specs[name]
        entries[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.nbytes],
        }
        start += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
