"""Unfinished work is taken over by the same recipe alone, and nothing comes out that was not put in by this recipe."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.artefacts import work_store
from megatron_kd.artefacts.folder_lock import LOCK_NAME
from megatron_kd.artefacts.work_store import RECIPE_NAME, WorkStore
from megatron_kd.errors import DataError

RECIPE = {"dataset": "d", "size": 2, "sampling": {"top_k": 5}}
OTHER = {**RECIPE, "size": 4}


STORES: list[WorkStore] = []


def claimed(folder: Path, recipe: dict = RECIPE, **how: bool) -> WorkStore:
    store = WorkStore(folder / "out", recipe)
    store.claim(**how)
    STORES.append(store)
    return store


@pytest.fixture(autouse=True)
def close_stores() -> Iterator[None]:
    yield
    while STORES:
        STORES.pop().close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "out.partial").iterdir()}


def worked_on(folder: Path) -> None:
    with claimed(folder) as store:
        store.write("first", b"one")
        store.write("second", b"two")
        store.append("7", b"seven")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = claimed(tmp_path)
    store.write("bytes", b"abc")
    store.write("array", np.arange(3, dtype="<i4"))
    store.write("empty", b"")
    part = store.new_part()
    for piece in (b"in ", b"", b"pieces"):
        part.write(piece)
    part.finish("pieces")
    store.write("bytes", b"replaced")
    assert [store.read(name).tobytes() for name in ("bytes", "empty", "pieces")] == [b"replaced", b"", b"in pieces"]
    assert store.read("array").view("<i4").tolist() == [0, 1, 2]
    assert store.is_whole("pieces") and not store.is_whole("never written")
    with pytest.raises(DataError, match="never written.part: missing"):
        store.read("never written")
    with pytest.raises(ValueError, match="at most 32 characters"):
        store.write("x" * 33, b"")
    assert not list(store.folder.glob("*.tmp-*"))


def test_the_same_recipe_takes_over_and_another_is_refused(tmp_path: Path) -> None:
    worked_on(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(DataError, match=r"unfinished work of another recipe \(size 2 there, 4 now\): continue"):
        claimed(tmp_path, OTHER)
    assert files_of(tmp_path) == before
    with claimed(tmp_path, dict(reversed(RECIPE.items()))) as store:
        assert store.read("first").tobytes() == b"one"
        assert [(name, payload.tobytes()) for name, payload in store.records()] == [("7", b"seven")]


def test_a_folder_without_work_is_anyones(tmp_path: Path) -> None:
    claimed(tmp_path).close()
    claimed(tmp_path, OTHER).close()
    with pytest.raises(DataError, match="cannot create the folder"):
        (tmp_path / "file").write_text("x")
        WorkStore(tmp_path / "file" / "out", RECIPE).claim()


@pytest.mark.parametrize("damage", ["missing", "cut", "not JSON", "a flipped bit", "a list"])
def test_a_damaged_recipe_is_written_again_where_a_part_proves_it(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    worked_on(tmp_path)
    path = tmp_path / "out.partial" / RECIPE_NAME
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:30], "not JSON": b"\xff{", "a flipped bit": whole.replace(b" 2", b" 3"),
                          "a list": b"[]"}[damage])  # fmt: skip
    with pytest.raises(DataError, match="missing or damaged, and no part is of this recipe"):
        claimed(tmp_path, OTHER)
    with claimed(tmp_path) as store:
        assert store.is_whole("first")
    assert path.read_bytes() == whole
    assert ("recipe.json: damaged" in capsys.readouterr().err) == (damage != "missing")


def test_damage_anywhere_in_a_part_is_found_and_the_part_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = claimed(tmp_path)
    path = store.path_of("first")
    store.write("first", b"some payload")
    whole = path.read_bytes()
    flipped = [whole[:n] + bytes([whole[n] ^ 1 << n % 8]) + whole[n + 1 :] for n in range(len(whole))]
    for damaged in [*flipped, *(whole[:size] for size in range(len(whole))), whole + b"x"]:
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="first.part: damaged part"):
            store.read("first")
        assert not store.is_whole("first") and not path.exists()
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].endswith("it is made again")


def test_swapped_parts_and_those_of_another_run_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, recipe in enumerate((RECIPE, OTHER)):
        with claimed(tmp_path / str(number), recipe) as store:
            store.write("first", b"1%d" % number)
            store.write("second", b"2%d" % number)
    ours, theirs = (tmp_path / number / "out.partial" for number in "01")
    with claimed(tmp_path / "0") as store:
        (ours / "first.part").rename(ours / "x")
        (ours / "second.part").rename(ours / "first.part")
        (ours / "x").rename(ours / "second.part")
        for name, other in (("first", "second"), ("second", "first")):
            with pytest.raises(DataError, match=f"it holds part {other}"):
                store.read(name)
        (theirs / "first.part").rename(ours / "first.part")
        assert not store.is_whole("first") and not store.is_whole("second")
    said = capsys.readouterr().err
    assert "first.part: damaged part (it is of another recipe)" in said


def test_a_journal_cut_at_any_byte_keeps_what_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with claimed(tmp_path) as store:
        for number in range(3):
            store.append(str(number), b"x" * number)
    (path,) = store.folder.glob("*.journal")
    whole = path.read_bytes()
    ends = [64, 64 + 65, 64 + 65 + 66]
    assert len(whole) == ends[-1]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with claimed(tmp_path) as store:
            kept = sum(end <= size for end in ends)
            assert [name for name, _ in store.records()] == ["0", "1", "2"][:kept]
            assert path.stat().st_size == [0, *ends][kept]
        assert ("cut short" in capsys.readouterr().err) == (size not in (0, *ends))


def test_a_flipped_bit_in_a_journal_loses_records_and_changes_none(tmp_path: Path) -> None:
    with claimed(tmp_path) as store:
        for number in range(3):
            store.append(str(number), b"payload %d" % number)
    (path,) = store.folder.glob("*.journal")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with claimed(tmp_path) as store:
            found = dict(store.records())
            assert len(found) < 3 and all(
                value.tobytes() == b"payload %s" % key.encode() for key, value in found.items()
            )


def test_journals_of_several_starts_add_up(tmp_path: Path) -> None:
    for start in range(3):
        with claimed(tmp_path) as store:
            store.append(str(start), b"")
            store.append("both", b"%d" % start)
    assert sorted(name for name, _ in store.records()) == ["0", "1", "2", "both", "both", "both"]


def test_who_may_hold_the_folder(tmp_path: Path) -> None:
    with claimed(tmp_path):
        for shared in (False, True):
            with pytest.raises(DataError, match="another run is writing into it; wait"):
                claimed(tmp_path, shared=shared)
    with claimed(tmp_path, shared=True), claimed(tmp_path, shared=True):
        with pytest.raises(DataError, match="another run is writing into it"):
            claimed(tmp_path)
    claimed(tmp_path).close()


def test_a_refusal_does_not_keep_the_lock(tmp_path: Path) -> None:
    worked_on(tmp_path)
    with pytest.raises(DataError, match="another recipe"):
        claimed(tmp_path, OTHER)
    claimed(tmp_path).close()


def test_removal(tmp_path: Path) -> None:
    worked_on(tmp_path)
    WorkStore(tmp_path / "out", OTHER).remove_leftovers()
    assert (tmp_path / "out.partial").is_dir()
    for _ in range(2):
        WorkStore(tmp_path / "out", RECIPE).remove_leftovers()
        assert not list(tmp_path.iterdir())
    claimed(tmp_path).remove()
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path):
        WorkStore(tmp_path / "out", RECIPE).remove_leftovers()
        assert (tmp_path / "out.partial").is_dir()


def test_an_artefact_that_grew_in_the_folder_gets_its_name(tmp_path: Path) -> None:
    store = claimed(tmp_path)
    (store.folder / "data.bin").write_bytes(b"grown")
    store.write("data", b"5 bytes")
    store.append("note", b"")
    store.new_part()
    store.publish()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {"data.bin": b"grown"}
    assert not store.folder.exists()
    again = claimed(tmp_path)
    with pytest.raises(DataError, match="out: already exists"):
        again.publish()


@pytest.mark.parametrize("calls", range(6))
def test_a_disk_that_is_full_is_named_and_no_half_part_appears(
    tmp_path: Path, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.fsync, [calls]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    store = claimed(tmp_path)
    monkeypatch.setattr(work_store.os, "fsync", full)
    written = []
    with pytest.raises(OSError) as refused:
        for name in ("a", "b", "c", "d"):
            store.write(name, b"payload")
            written.append(name)
    assert str(refused.value.filename).startswith(str(tmp_path / "out"))
    monkeypatch.undo()
    there = [path.stem for path in sorted(store.folder.glob("*.part"))]
    assert there == ["a", "b", "c"][: (calls + 1) // 2] and there[: calls // 2] == written
    assert all(store.is_whole(name) for name in there)
    assert {path.name for path in store.folder.iterdir()} == {RECIPE_NAME, LOCK_NAME, *(f"{n}.part" for n in there)}


def test_a_claim_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(work_store.os, "rename", full)
    with pytest.raises(OSError):
        claimed(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "grown.bin").touch()
    with pytest.raises(OSError):
        claimed(tmp_path)
    assert (tmp_path / "out.partial" / "grown.bin").exists()


@pytest.mark.parametrize("moment", ["before the rename", "in the journal"])
def test_a_killed_process_leaves_the_lock_and_what_was_whole(tmp_path: Path, moment: str) -> None:
    program = f"""
import os, signal
from collections.abc import Iterator
from pathlib import Path
from megatron_kd.artefacts import work_store
store = work_store.WorkStore(Path({str(tmp_path)!r}) / "out", {RECIPE!r})
store.claim()
store.write("first", b"one")
store.append("7", b"seven")
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if {moment!r} == "before the rename":
    work_store.os.rename = die
    store.write("second", b"two")
store._journal.write(b"half a record")
store._journal.flush()
die()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    died = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert died.returncode == -signal.SIGKILL
    with claimed(tmp_path) as store:
        assert store.is_whole("first") and not store.is_whole("second")
        assert [name for name, _ in store.records()] == ["7"]
