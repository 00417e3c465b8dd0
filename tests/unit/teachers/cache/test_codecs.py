"""The table of codecs: every row builds, describes itself and keeps its place in manifests; a new row is enough."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from megatron_kd.config import from_mapping
from megatron_kd.errors import ConfigError, DataError
from megatron_kd.teachers import teacher_config
from megatron_kd.teachers.cache.codec import Codec
from megatron_kd.teachers.cache.codecs import SampledCodec, TopKCodec, TopPCodec
from megatron_kd.teachers.teacher_config import CODECS, PAYLOADS, CacheTeacherLogitsConfig, CodecRow, TeacherConfig

NEUTRAL = {"top_p": None, "proposal_exponent": 1.0, "seed": 0}
KEYS = {"data": {"path": "d"}, "teacher": {"path": "t"}, "output": "o"}


def config_of(**keys):
    return from_mapping(CacheTeacherLogitsConfig, {**KEYS, **keys}, "test")


@pytest.mark.parametrize("name", CODECS)
def test_every_row_builds_a_codec_of_its_name(name):
    codec = Codec.build(name, config_of(codec=name, top_k=12, num_draws=12), 100)
    assert codec.name == name and codec.max_ids == 12 and codec.vocab_size == 100
    assert Codec.from_mapping(codec.to_mapping()) == codec
    assert codec.target_kind("auto", "here") == codec.target_kinds[0] and name in codec.describe()


@pytest.mark.parametrize("name", [name for name in PAYLOADS if name != "hidden"])
def test_every_sparse_payload_is_a_codec_with_the_teachers_keys(name):
    config = TeacherConfig(payload=name, top_k=7, num_draws=9)
    assert config.payload_ids == Codec.build(name, config, 100).max_ids == {"top_k": 7, "sampled": 9}[name]


@pytest.mark.parametrize(
    ("keys", "codec", "written"),
    [
        ({"codec": "top_k"}, TopKCodec(64, 100), {"name": "top_k", "max_ids": 64}),
        ({"codec": "top_p", "top_k": 9, "top_p": 0.9}, TopPCodec(9, 100, 0.9),
         {"name": "top_p", "max_ids": 9, "top_p": 0.9}),
        ({"num_draws": 16, "seed": 3}, SampledCodec(16, 100, seed=3), {"name": "sampled", "max_ids": 16, "seed": 3}),
        ({"proposal_exponent": 0.8}, SampledCodec(50, 100, 0.8),
         {"name": "sampled", "max_ids": 50, "proposal_exponent": 0.8}),
    ],
)  # fmt: skip
def test_manifests_say_the_same_as_ever(keys, codec, written):
    """A cache's identity is made from these values, in this form, so an older cache opens and is not made again."""
    assert Codec.build(keys.get("codec", "sampled"), config_of(**keys), 100) == codec
    assert codec.to_mapping() == {**NEUTRAL, "vocab_size": 100, **written}
    assert list(codec.to_mapping()) == ["name", "max_ids", "vocab_size", "top_p", "proposal_exponent", "seed"]


def test_the_old_names_of_keys_work():
    config = config_of(max_ids=12, draws=16)
    assert (config.top_k, config.num_draws) == (12, 16)
    with pytest.raises(ConfigError, match="'draws' is the old name of 'num_draws'"):
        config_of(draws=16, num_draws=16)


def test_a_codec_of_a_later_version_is_refused_by_name():
    with pytest.raises(DataError, match="codec 'toy' is not known to this version"):
        Codec.from_mapping({"name": "toy", "max_ids": 1, "vocab_size": 2})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"codec": "toy"}, "'codec' must be one of top_k, top_p, sampled, not 'toy'"),
        ({"top_k": 0}, "'top_k' must be between 1 and"),
        ({"num_draws": 40_000}, "'num_draws' must be between 1 and 32767"),
        ({"codec": "top_k", "proposal_exponent": 0.9}, "'proposal_exponent' is for 'codec' sampled, not top_k"),
    ],
)
def test_values_that_cannot_be(keys, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**keys)


@dataclass(frozen=True)
class ToyCodec(TopKCodec):
    """The most probable ids, of which it keeps one more than it is asked for."""

    name: ClassVar[str] = "toy"

    @property
    def fixed_count(self):
        return min(self.max_ids + 1, self.vocab_size)


def test_a_new_codec_is_a_class_and_a_row(monkeypatch):
    row = CodecRow(f"{__name__}.ToyCodec", {"max_ids": "top_k"})
    monkeypatch.setattr(teacher_config, "CODECS", {**CODECS, "toy": row})
    monkeypatch.setattr("megatron_kd.teachers.cache.codec.CODECS", {**CODECS, "toy": row})
    codec = Codec.build("toy", config_of(codec="toy", top_k=3), 100)
    assert codec == ToyCodec(3, 100) and Codec.from_mapping(codec.to_mapping()) == codec


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        (TopPCodec(9, 100, top_p=0.9), "top_p, the most probable ids that hold 0.9, at most 9 per token"),
        (SampledCodec(50, 100), "sampled, 50 draws per token (seed 0)"),
        (SampledCodec(50, 100, proposal_exponent=0.9), "to the power of 0.9"),
    ],
)
def test_codecs_in_words(codec, text):
    assert text in codec.describe()
