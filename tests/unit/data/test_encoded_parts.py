"""A part on disk is the blocks that went into it; what is damaged, or of another corpus, is refused."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.data.corpus_files import BadLine
from megatron_kd.data.encoded_parts import EncodedBlock, EncodedParts, PartWriter, Unit, name_of
from megatron_kd.errors import DataError


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[EncodedParts]:
    with WorkStore(tmp_path / "corpus", {}) as store:
        store.claim()
        yield EncodedParts(store)


UNIT = Unit(3, "corpus.jsonl", 64, 128)


def block(seed: int, documents: int, has_hashes: bool, has_prompts: bool, dtype: str) -> EncodedBlock:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 9, documents)
    return EncodedBlock(
        UNIT.path, UNIT.start, documents + 2, generator.integers(0, 60_000, lengths.sum()).astype(dtype), lengths,
        [str(domain) for domain in generator.choice(["a", "b", "ü"], documents)],
        generator.integers(0, 1 << 63, documents if has_hashes else 0).astype(np.uint64),
        generator.integers(0, 5, documents if has_prompts else 0).astype(np.int32),
        [BadLine(UNIT.path, 2, "no text")], 10 * documents, 12 * documents,
    )  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    hashes=st.booleans(),
    prompts=st.booleans(),
    dtype=st.sampled_from(["<u2", "<i4"]),
)
def test_what_is_read_is_what_was_added(
    parts: EncodedParts, sizes: list[int], hashes: bool, prompts: bool, dtype: str
) -> None:
    blocks = [block(seed, size, hashes, prompts, dtype) for seed, size in enumerate(sizes)]
    writer = parts.new_part(UNIT)
    for added in blocks:
        writer.add(added)
    writer.finish(0, is_last=True)
    read = parts.read(name_of(UNIT, 0, is_last=True))
    for name in ("ids", "lengths", "split_hashes", "prompt_lengths"):
        whole = np.concatenate([getattr(added, name) for added in blocks])
        np.testing.assert_array_equal(getattr(read, name), whole)
        assert getattr(read, name).dtype == whole.dtype
    assert read.domains == sum((added.domains for added in blocks), [])
    firsts = np.cumsum([0, *(added.num_lines for added in blocks)])
    assert [line.line for line in read.bad] == [first + 2 for first in firsts[:-1]]
    assert (read.path, read.unit_start, read.num_lines) == (UNIT.path, 64, firsts[-1])
    assert (read.text_bytes, read.raw_bytes) == (10 * sum(sizes), 12 * sum(sizes))


def test_a_damaged_part_and_those_after_it_are_removed(parts: EncodedParts, tmp_path: Path) -> None:
    for part in range(3):
        writer = parts.new_part(UNIT)
        writer.add(block(part, 3, True, False, "<u2"))
        writer.finish(part, is_last=part == 2)
    assert parts.usable(UNIT) == parts.finished(UNIT)
    path = parts.store.path_of(name_of(UNIT, 1, is_last=False))
    data = bytearray(path.read_bytes())
    data[100] ^= 16
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged part .its checksum is"):
        parts.read(name_of(UNIT, 1, is_last=False))
    assert len(parts.usable(UNIT).names) == 1
    assert [path.name for path in tmp_path.glob("corpus.partial/*.part")] == ["000003-000000.part"]


def test_a_units_parts_are_counted_up_to_the_first_gap(parts: EncodedParts, tmp_path: Path) -> None:

    def finished() -> tuple[int, bool]:
        found = parts.finished(UNIT)
        return len(found.names), found.is_complete

    for part, is_last, expected in ((1, False, (0, False)), (0, False, (2, False)), (2, True, (3, True))):
        parts.new_part(UNIT).finish(part, is_last)
        assert finished() == expected
    parts.new_part(UNIT).abort()
    assert not list(tmp_path.rglob("part.tmp-*")) and parts.finished(Unit(4, "other")).names == []


def test_a_failure_leaves_what_is_worth_keeping(tmp_path: Path) -> None:
    """Two parts, or one for a merge, which could not make it again; what tasks share stays in any case."""
    for shared, keep, made, left in (
        (False, False, 1, 0), (False, False, 2, 2), (False, True, 1, 1), (False, True, 0, 0), (True, False, 1, 1),
    ):  # fmt: skip
        folder = tmp_path / f"{shared}-{keep}-{made}"
        with pytest.raises(ZeroDivisionError):
            with EncodedParts(WorkStore(folder / "corpus", {})).opened(shared, keep) as parts:
                for part in range(made):
                    PartWriter(parts.store, UNIT).finish(part, is_last=False)
                raise ZeroDivisionError
        assert len(list(folder.rglob("*.part"))) == left
        assert parts.store.folder.exists() == (left > 0)
