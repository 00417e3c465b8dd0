"""Random parts: exact sizes, disjoint, whole together, a function of seed and root id."""

from pathlib import Path

import numpy as np
import pytest

from megatron_kd.config import from_mapping
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import ConfigError, DataError
from megatron_kd.scoring.leakage import num_shared_chunks
from megatron_kd.selection.split_dataset import SplitDatasetConfig, draw_chunks, run


def split(dataset: ChunkDataset, folder: Path, name: str, **keys: object) -> tuple[ChunkDataset, ChunkDataset]:
    outputs = {"output": str(folder / name), "rest_output": str(folder / f"{name}-rest")}
    tree = {"data": {"path": str(dataset.path)}, **outputs}
    run(from_mapping(SplitDatasetConfig, {**tree, **keys}, "test"))
    return ChunkDataset.open(folder / name), ChunkDataset.open(folder / f"{name}-rest")


def test_parts_are_disjoint_and_whole(
    tmp_path: Path, dataset: ChunkDataset, chunks: list[np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    drawn, rest = split(dataset, tmp_path, "a", fraction=0.3, role="reference")
    assert len(drawn) == 12 and sorted([*drawn.chunk_ids, *rest.chunk_ids]) == list(range(40))
    for part in (drawn, rest):
        assert part.root_fingerprint == dataset.fingerprint
        assert [part[i].tolist() for i in range(len(part))] == [chunks[i].tolist() for i in part.chunk_ids]
    assert drawn.manifest["producer"]["role"] == "reference" and rest.manifest["producer"]["role"] == "train"
    assert num_shared_chunks(drawn, rest) == 0 and num_shared_chunks(drawn, dataset) == 12
    split(dataset, tmp_path, "a", fraction=0.3, role="reference")
    assert capsys.readouterr().err.count("already made") == 2
    with pytest.raises(DataError, match="not this same"):
        split(dataset, tmp_path, "a", fraction=0.4, role="reference")


def test_the_draw_follows_the_root_id(tmp_path: Path, dataset: ChunkDataset) -> None:
    """A larger fraction contains a smaller one; another seed draws others; a part is split by the same keys."""
    small, large = (set(np.flatnonzero(draw_chunks(dataset, fraction, 1))) for fraction in (0.25, 0.5))
    assert small < large and large != set(np.flatnonzero(draw_chunks(dataset, 0.5, 2)))
    _, rest = split(dataset, tmp_path, "b", fraction=0.25, seed=1)
    again = set(rest.chunk_ids[draw_chunks(rest, 1 / 3, 1)].tolist())
    assert again == large - small


def test_refusals(tmp_path: Path, dataset: ChunkDataset) -> None:
    with pytest.raises(DataError, match="leaves a part empty"):
        split(dataset, tmp_path, "none", fraction=0.01)
    with pytest.raises(ConfigError, match="fraction must be above 0 and below 1"):
        split(dataset, tmp_path, "all", fraction=1.0)
