import json
from pathlib import Path

import pytest

from megatron_kd.artefacts.checksums import SIDECAR_NAME, Checksums
from megatron_kd.artefacts.manifest import (
    MANIFEST_NAME,
    already_made,
    fingerprint_of,
    read_manifest,
    recipe_of,
    write_manifest,
)
from megatron_kd.errors import DataError


def write(folder: Path, **body: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "data").write_bytes(b"data")
    checksums = Checksums()
    checksums.add_file(folder, "data")
    write_manifest(folder, "score_file", {"producer": {"recipe": "r1"}, **body}, checksums)
    return folder


def test_round_trip(tmp_path: Path) -> None:
    manifest, checksums = read_manifest(write(tmp_path / "a", name='Zürich "quoted"', number=1.5), "score_file")
    assert manifest["name"] == 'Zürich "quoted"' and manifest["number"] == 1.5
    checksums.verify_file(tmp_path / "a", "data")


@pytest.mark.parametrize("name", [MANIFEST_NAME, SIDECAR_NAME])
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a", note="é") / name
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (0, 3, 7):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(bytes(damaged))
            with pytest.raises(DataError):
                read_manifest(tmp_path / "a", "score_file")
    path.write_bytes(whole)
    read_manifest(tmp_path / "a", "score_file")


@pytest.mark.parametrize("name", [MANIFEST_NAME, SIDECAR_NAME])
def test_truncated_or_missing(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a") / name
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=name):
            read_manifest(tmp_path / "a")
    path.unlink()
    with pytest.raises(DataError, match="missing; this folder is not a whole artefact"):
        read_manifest(tmp_path / "a")


def test_another_kind_or_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    with pytest.raises(DataError, match="is a score file, where a chunk dataset is needed"):
        read_manifest(folder, "chunk_dataset")
    with pytest.raises(DataError, match="no such folder"):
        read_manifest(tmp_path / "b", "chunk_dataset")
    newer = write(tmp_path / "c", format_version=99)
    with pytest.raises(DataError, match="format version 99, but this program reads up to 1; use a newer one"):
        read_manifest(newer)


def test_already_made(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    assert already_made(folder, "score_file", "r1")
    assert not already_made(tmp_path / "none", "score_file", "r1")
    with pytest.raises(DataError, match="not this same artefact"):
        already_made(folder, "score_file", "r2")
    with pytest.raises(DataError, match="not this same artefact"):
        already_made(folder, "chunk_dataset", "r1")
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(DataError, match="not this same artefact"):
        already_made(folder, "score_file", "r1")


def test_identities_depend_on_contents_alone(tmp_path: Path) -> None:
    _, one = read_manifest(write(tmp_path / "a"))
    _, two = read_manifest(write(tmp_path / "b"))
    assert fingerprint_of({"x": 1, "y": 2}, one) == fingerprint_of({"y": 2, "x": 1}, two)
    assert fingerprint_of({"x": 1}, one) != fingerprint_of({"x": 2}, one)
    assert fingerprint_of({"x": 1}, one) != fingerprint_of({"x": 1}, Checksums())
    assert recipe_of({"x": 1, "y": [2]}) == recipe_of({"y": [2], "x": 1}) != recipe_of({"x": 1, "y": [3]})
    assert len(json.dumps(recipe_of({}))) == 34
