"""What a person is told about a cache."""

import numpy as np
import pytest

from megatron_kd.evaluation.inspect_dataset import (
    InspectDatasetConfig,
    describe_codec,
    describe_tail_mass,
    run,
    tail_masses,
)
from megatron_kd.teachers.cache.codec import Codec
from tests.distributed.training.runs import VOCABULARY, make_dataset
from tests.reference.caches import write_cache


def test_inspect_dataset_prints_the_cache(tmp_path, capsys):
    dataset = make_dataset(tmp_path / "data", chunks=20)
    cache = write_cache(dataset, tmp_path / "cache", Codec("top_k", 4, VOCABULARY), chunks_per_shard=6)
    run(InspectDatasetConfig(str(cache.path), verify=True))
    printed = capsys.readouterr().out
    for part in (
        f"logit cache, fingerprint {cache.fingerprint}",
        "20 in 4 shards",
        dataset.fingerprint,
        "top_k, the largest 4 of a token; 300 ids of 9 bits",
        "4.0 ids and ",
        cache.teacher_fingerprint,
        "temperature=1.0, compute_dtype=fp32, mask_rule=input_is_not_pad, reset_attention_mask=False",
        f"mean {tail_masses(cache).mean():.4f} over {cache.manifest['tokens']} tokens",
        "every checksum agrees",
    ):
        assert part in printed, (part, printed)


def test_the_histogram_counts_every_token():
    lines = describe_tail_mass(np.array([0.0, 5e-5, 0.3, 0.35, 1.0], dtype=np.float32))
    assert "mean 0.3300 over 5 tokens" in lines[0] and "50% 0.3," in lines[0]
    shares = [float(line.split("%")[0].split()[-1]) for line in lines[1:]]
    assert shares == [40.0, 0, 0, 0, 0, 0, 40.0, 20.0]


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        (Codec("top_p", 9, 100, top_p=0.9), "top_p, the largest that hold 0.9, at most 9 of a token"),
        (Codec("sampled", 50, 100), "sampled, 50 draws a token (seed 0)"),
        (Codec("sampled", 50, 100, proposal_exponent=0.9), "to the power of 0.9"),
    ],
)
def test_codecs_in_words(codec, text):
    assert text in describe_codec(codec)
