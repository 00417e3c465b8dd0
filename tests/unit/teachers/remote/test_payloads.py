"""What a payload's sender makes of hidden states, its receiver turns into the knowledge that the loss takes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_kd.errors import ConfigError
from megatron_kd.losses import OutputHead
from megatron_kd.teachers.cache.codec import Codec
from megatron_kd.teachers.cache.sparsifier import Sparsifier
from megatron_kd.teachers.remote.payloads import HEADER_NUMBERS, Header, receiver_of, sender_of
from megatron_kd.teachers.teacher_config import PAYLOADS, TeacherConfig

VOCABULARY, HIDDEN, ROWS, LENGTH = 40, 8, 3, 5
HEAD = OutputHead(torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1)), VOCABULARY)
PLAN = SimpleNamespace(info=SimpleNamespace(architecture=SimpleNamespace(vocab_size=VOCABULARY, hidden_size=HIDDEN)))
CHUNK_IDS = torch.tensor([4, 9, 2])


def run_of(**options):
    return SimpleNamespace(**{"dtype": torch.float32, "temperature": 2.0, "sparse_target": "auto", **options})


def config_of(payload):
    return TeacherConfig("remote", "p", num_ranks=1, payload=payload, top_k=6, num_draws=7)


def hand_off(config, hidden):
    """What arrives in a receiver's buffer."""
    receiver = receiver_of(config, run_of(), PLAN, HEAD)
    content = sender_of(config, run_of(), PLAN, HEAD, SimpleNamespace(tp=None)).encode(hidden, CHUNK_IDS)
    buffer = receiver.buffer(ROWS, LENGTH, hidden.device)
    assert (buffer.shape, buffer.dtype) == (content.shape, content.dtype)
    return receiver.decode(buffer.copy_(content))


@pytest.fixture
def hidden():
    return torch.randn(LENGTH, ROWS, HIDDEN, generator=torch.Generator().manual_seed(2))


def test_a_header_keeps_63_bits():
    header = Header(-1, 3, (1 << 63) - 5)
    tensor = header.to_tensor(torch.device("cpu"))
    assert tensor.shape == (HEADER_NUMBERS,) and Header.from_tensor(tensor) == header


def test_hidden_states_arrive_with_the_head(hidden):
    knowledge = hand_off(config_of("hidden"), hidden)
    assert torch.equal(knowledge.hidden, hidden.flatten(0, 1)) and knowledge.head is HEAD


@pytest.mark.parametrize("payload", [name for name in PAYLOADS if name != "hidden"])
def test_a_sparse_payload_is_what_its_codec_keeps(payload, hidden):
    config = config_of(payload)
    knowledge = hand_off(config, hidden)
    codec = Codec.build(payload, config, VOCABULARY)
    owners, places = np.tile(CHUNK_IDS.numpy(), LENGTH), np.repeat(np.arange(LENGTH), ROWS)
    entries = Sparsifier(codec, HEAD, None, 2.0)(hidden.flatten(0, 1), owners, places)
    weights, starts = codec.weights(entries), np.cumsum(entries.counts) - entries.counts
    assert knowledge.kind == codec.target_kinds[0] and knowledge.vocab_size == VOCABULARY
    for token, (start, count) in enumerate(zip(starts, entries.counts, strict=True)):
        assert knowledge.ids[token, :count].tolist() == entries.ids[start : start + count].tolist()
        assert knowledge.weights[token, :count].tolist() == weights[start : start + count].tolist()
        assert (knowledge.ids[token, count:] == -1).all() and not knowledge.weights[token, count:].any()
    assert knowledge.tail_mass.tolist() == entries.tail.tolist()


def test_a_sparse_target_that_a_payload_does_not_give_is_refused():
    with pytest.raises(ConfigError, match="renormalised cannot be made of teacher.payload sampled"):
        receiver_of(config_of("sampled"), run_of(sparse_target="renormalised"), PLAN, None)
