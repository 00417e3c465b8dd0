"""Who may write where (tests/unit/training/test_run_lock.py has owners that are killed)."""

from pathlib import Path

import pytest

from megatron_kd.artefacts.folder_lock import LOCK_NAME, lock_folder, release, try_lock
from megatron_kd.errors import DataError


def test_one_writer_or_several_that_share(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with lock_folder(folder):
        with pytest.raises(DataError, match="b: another run is writing into it; wait until it ends, or stop it"):
            lock_folder(folder)
        with pytest.raises(DataError, match="another run"):
            lock_folder(folder, shared=True)
    with lock_folder(folder, shared=True), lock_folder(folder, shared=True):
        assert try_lock(folder / LOCK_NAME) is None
    release(lock_folder(folder))


def test_a_lock_that_must_be_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        try_lock(tmp_path / LOCK_NAME, "r+")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="cannot create the folder"):
            lock_folder(folder)
    assert (tmp_path / "file").read_text() == "mine"
