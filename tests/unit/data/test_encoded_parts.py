"""A part on disk is the blocks that went into it; what is damaged, or of another corpus, is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_kd.data.documents import BadLine
from megatron_kd.data.encoded_parts import EncodedBlock, PartFolder, Unit, read_part
from megatron_kd.errors import DataError

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
    tmp_path: Path, sizes: list[int], hashes: bool, prompts: bool, dtype: str
) -> None:
    folder = PartFolder(tmp_path, {})
    blocks = [block(seed, size, hashes, prompts, dtype) for seed, size in enumerate(sizes)]
    writer = folder.new_part(UNIT)
    for added in blocks:
        writer.add(added)
    writer.close(0, is_last=True)
    read = read_part(folder.path_of(UNIT, 0, is_last=True))
    for name in ("ids", "lengths", "split_hashes", "prompt_lengths"):
        whole = np.concatenate([getattr(added, name) for added in blocks])
        np.testing.assert_array_equal(getattr(read, name), whole)
        assert getattr(read, name).dtype == whole.dtype
    assert read.domains == sum((added.domains for added in blocks), [])
    firsts = np.cumsum([0, *(added.num_lines for added in blocks)])
    assert [line.line for line in read.bad] == [first + 2 for first in firsts[:-1]]
    assert (read.path, read.unit_start, read.num_lines) == (UNIT.path, 64, firsts[-1])
    assert (read.text_bytes, read.raw_bytes) == (10 * sum(sizes), 12 * sum(sizes))


def test_a_flipped_bit_or_a_missing_end_is_found(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path, {})
    writer = folder.new_part(UNIT)
    writer.add(block(0, 3, True, False, "<u2"))
    writer.close(0, is_last=False)
    path = folder.path_of(UNIT, 0, is_last=False)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(DataError, match="damaged part; remove it and run"):
            read_part(path)
    for size in (0, 5, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="damaged part"):
            read_part(path)


def test_a_units_parts_are_counted_up_to_the_first_gap(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path, {})

    def finished() -> tuple[int, bool]:
        found = folder.finished(UNIT)
        return len(found.paths), found.is_complete

    for part, is_last, expected in ((1, False, (0, False)), (0, False, (2, False)), (2, True, (3, True))):
        folder.new_part(UNIT).close(part, is_last)
        assert finished() == expected
    folder.new_part(UNIT).abort()
    assert not list(tmp_path.glob("part.tmp-*")) and folder.finished(Unit(4, "other")).paths == []


def test_who_may_hold_the_folder_together(tmp_path: Path) -> None:
    def opened(info: dict, **how: bool):
        return PartFolder(tmp_path / "parts", info).opened(**how)

    with opened({"tokenizer": 1}, shared=True):
        with opened({"tokenizer": 1}, shared=True):
            pass
        with pytest.raises(DataError, match="another run is writing there"), opened({"tokenizer": 1}, shared=False):
            pass
    with pytest.raises(DataError, match="tokenizer 1 there, 2 now"), opened({"tokenizer": 2}, shared=True):
        pass
