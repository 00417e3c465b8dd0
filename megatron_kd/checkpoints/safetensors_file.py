"""Safetensors written one tensor at a time: the library's own writer wants all of them in memory.

    8 bytes: n, little-endian   n bytes: JSON {name: {dtype, shape, data_offsets}}   the tensors' bytes in turn

Files larger than a limit are cut into ``model-00001-of-0000N.safetensors`` with an index, as transformers does.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Iterable, Mapping

import torch
from torch import Tensor

from megatron_kd.artefacts.artefact_folder import start_flush

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_ALIGNMENT, _FLUSH_BYTES = 8, 64 << 20
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class TensorSpec:
    """What a file's header says about a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``200MB`` or ``40KB``.

    Raises:
        ValueError: it is something else.
    """
    number, unit = text[:-2], text[-2:]
    if not (number.isascii() and number.isdigit() and int(number) > 0 and unit in _UNITS):
        raise ValueError(f"'{text}' is not a whole number with KB, MB or GB")
    return int(number) * _UNITS[unit]


def plan_files(specs: Mapping[str, TensorSpec], limit: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in the order of ``specs``; only a single tensor makes a file larger."""
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
    """Writes tensors, given in the planned order, into the planned files; a context.

    Args:
        folder: where.
        specs: every tensor that will come, in order.
        limit: bytes of a file.

    Raises:
        ValueError: another tensor comes than the next planned one.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], limit: int):
        self._folder, self._specs = folder, specs
        self._files = plan_files(specs, limit)
        self._order = iter([(file, name) for file, names in self._files.items() for name in names])
        self._current: str | None = None
        self._stream: IO[bytes] | None = None
        self._flushed = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        file, expected = next(self._order, (None, None))
        spec = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if name != expected or spec != self._specs[name]:
            raise ValueError(f"'{name}' {spec} came where '{expected}' {self._specs.get(expected)} was planned")
        if file != self._current:
            self._start(file)
        data = tensor.detach().cpu().contiguous()
        self._stream.write(memoryview(data.reshape(-1).view(torch.uint8).numpy()))
        written = self._stream.tell()
        if written - self._flushed >= _FLUSH_BYTES:
            self._stream.flush()
            start_flush(self._stream.fileno(), self._flushed, written - self._flushed)
            self._flushed = written

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._end()
        if kind is not None:
            return
        missing = [name for _, name in self._order]
        if missing:
            raise ValueError(f"tensors were planned and never came: {', '.join(missing[:3])}")
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self._specs.values())},
                "weight_map": {name: file for file, names in self._files.items() for name in names},
            }
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _start(self, file: str) -> None:
        self._end()
        self._current, self._stream, self._flushed = file, open(self._folder / file, "wb"), 0
        self._stream.write(_header(self._specs, self._files[file]))

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None


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
