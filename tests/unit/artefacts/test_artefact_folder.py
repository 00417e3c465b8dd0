import errno
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.artefacts.artefact_folder import building, write_array, write_file
from megatron_kd.errors import DataError

# the forked children use numpy and files alone, never the threads of the parent
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_appears_whole_under_its_name(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "output"
    with building(output) as folder:
        (folder / "file").write_text("x")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["file"]
    assert [path.name for path in output.parent.iterdir()] == ["output"]


def test_an_error_leaves_nothing_and_says_where_the_disk_was_full(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, building(tmp_path / "output") as folder:
        (folder / "file").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "output")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "values",
    [np.arange(5), np.zeros((0,), np.float32), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(9)[::2]],
    ids=["whole", "empty", "columns first", "every other"],
)
def test_an_array_is_written_as_numpy_does(tmp_path: Path, values: np.ndarray) -> None:
    write_array(tmp_path / "ours.npy", values)
    np.save(tmp_path / "theirs.npy", np.ascontiguousarray(values))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "output"
    {"folder": output.mkdir, "file": output.touch, "dangling link": lambda: output.symlink_to("nowhere")}[kind]()
    with pytest.raises(DataError, match="already exists and is not this same artefact"), building(output):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_what_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with pytest.raises(DataError, match="already exists"), building(output) as folder:
        (folder / "ours").touch()
        output.mkdir()
    assert list(output.iterdir()) == []


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot create the output folder"), building(tmp_path / "file" / "output"):
        pass


def test_a_dead_writers_folder_is_removed_and_a_live_ones_is_not(tmp_path: Path) -> None:
    output = tmp_path / "out[1]"
    child = os.fork()
    if child == 0:
        with building(output):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    never_locked = tmp_path / "out[1].tmp-1-0"
    never_locked.mkdir()
    os.utime(never_locked, (0, 0))
    abandoned = [path.name for path in tmp_path.iterdir()]
    assert len(abandoned) == 2 and all(name.startswith("out[1].tmp-") for name in abandoned)
    with building(output) as live:
        assert [path for path in tmp_path.iterdir()] == [live]
        with building(output) as second:
            assert live.exists() and second.exists()
            (second / "file").touch()
        assert live.exists()
        output.joinpath("file").unlink()
        output.rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out[1]"]


def test_write_file_replaces_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "one")
    write_file(tmp_path / "file", b"two")
    assert (tmp_path / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
