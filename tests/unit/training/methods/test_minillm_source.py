"""MiniLLM's rollouts: prompts of any lengths, which steps share them, and what a restored source does."""

import numpy as np
import pytest
import torch

from megatron_kd.generation.decoder import Decoder
from megatron_kd.generation.generate import MixedPolicy
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.distillation_config import RolloutConfig
from megatron_kd.training.methods.generated_text import Texts, TextWriter
from megatron_kd.training.methods.method_table import MiniLLMConfig
from megatron_kd.training.methods.minillm import MiniLLMSource
from megatron_kd.training.methods.source import Place
from tests.reference import naive_minillm as naive
from tests.reference.one_rank import tiny_model
from tests.unit.training.methods.made_batches import micro_batch

LENGTH, ROWS = 15, 4


class PromptLengths:
    """As a blend of datasets gives them: for arrays of chunks, 0 where a chunk has no prompt of its own."""

    def __getitem__(self, chunks):
        assert len(chunks)
        return np.array([3, 9, 0, 14])[chunks]


class Prompts:
    """Four chunks with prompts of 3, 9 and 14 ids, and one without."""

    pad_id = eos_id = 0
    prompt_lengths = PromptLengths()

    def __getitem__(self, chunk):
        return np.arange(1, LENGTH + 2) + chunk


def dataset_batches():
    ids = torch.zeros(ROWS, LENGTH + 1, dtype=torch.int64)
    return [micro_batch(Texts(ids, torch.full((ROWS,), 2), torch.ones(ROWS)))]


@pytest.fixture(scope="module")
def make_source():
    """Sources over one student and one teacher."""
    with distributed_runtime() as runtime:
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        groups = teacher.pg_collection = student.pg_collection

        def make(**keys):
            config = MiniLLMConfig(**keys)
            writer = TextWriter(
                RolloutConfig(prompt_length=6), Prompts(), groups, seq_length=LENGTH, seed=5, device=runtime.device
            )

            def policy(rows, length):
                decoders = (Decoder([model], groups, rows, length) for model in (student, teacher))
                return MixedPolicy(*decoders, config.teacher_mix)

            return MiniLLMSource(config, writer, policy, None, groups, global_batch_size=ROWS)

        yield make


def batch_of(source, position):
    (batch,) = source.batches(Place(position, 100, position), dataset_batches()).batches
    return batch


def test_prompts_are_the_chunks_own_or_the_first_ids(make_source):
    batch = batch_of(make_source(), 0)
    assert batch.payload.text.texts.prompt_lengths.tolist() == [3, 9, 6, 14]
    for row, length in enumerate((3, 9, 6, 14)):
        np.testing.assert_array_equal(batch.payload.text.texts.tokens[row, :length], np.arange(1, length + 1) + row)
        assert batch.loss_mask[row].sum() == batch.payload.text.texts.lengths[row] - length > 0


def test_released_advantages_are_whitened_over_the_places_that_each_prompt_leaves(make_source):
    config = MiniLLMConfig(variant="released")
    batch = batch_of(make_source(variant="released"), 0)
    texts, recorded = batch.payload.text.texts, batch.payload.text.log_probabilities
    rewards = (recorded["log_p"] - recorded["log_q"]).double()
    inside = [(int(n) - 1, int(end) - 1) for n, end in zip(texts.prompt_lengths, texts.lengths)]
    expected = naive.released_advantages(
        [rewards[row, a:b].tolist() for row, (a, b) in enumerate(inside)],
        config.reward_scaling, config.reward_clip, config.discount, [13, 7, 10, 2],
    )  # fmt: skip
    for row, (a, b) in enumerate(inside):
        found = batch.payload.terms.advantages[row, a:b].double()
        torch.testing.assert_close(found, torch.tensor(expected[row], dtype=torch.float64), atol=1e-4, rtol=1e-4)


def test_inner_epochs_share_rollouts_within_their_block_and_no_further(make_source):
    source = make_source(inner_epochs=3)
    tokens = [batch_of(source, position).tokens for position in range(5)]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])
    assert torch.equal(tokens[3], tokens[4]) and not torch.equal(tokens[0], tokens[3])
    assert source.counts.student == source.counts.teacher == 2 * ROWS


def test_restored_rollouts_serve_the_rest_of_their_block_alone(make_source):
    """After a rollback the batches up to the spike are passed over: the kept rollouts may be of an earlier block."""
    source = make_source(inner_epochs=3)
    first = batch_of(source, 0)
    again, later = make_source(inner_epochs=3), make_source(inner_epochs=3)
    again.restore(source.state())
    later.restore(source.state())
    resumed = batch_of(again, 1)
    assert torch.equal(resumed.tokens, first.tokens) and again.counts.student == ROWS
    for name, values in first.payload.text.log_probabilities.items():
        assert torch.equal(resumed.payload.text.log_probabilities[name], values), name
    assert torch.equal(resumed.payload.terms.advantages, first.payload.terms.advantages)
    assert not torch.equal(batch_of(later, 4).tokens, first.tokens) and later.counts.student == 2 * ROWS
