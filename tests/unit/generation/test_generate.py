"""Greedy text equals transformers' on the same weights; sampled text depends on prompt and seed alone; draws follow the
distribution that temperature, top-k and top-p leave.
"""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_kd.data.random_numbers import sequence_seeds, uniforms
from megatron_kd.errors import DataError
from megatron_kd.generation import decoder as decoding_mode
from megatron_kd.generation.decoder import Decoder
from megatron_kd.generation.generate import MixedPolicy, ModelPolicy, choose, generate, sampling_logits
from megatron_kd.generation.generation_config import SamplingConfig
from megatron_kd.models.gpt import full_logits
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import TINY, tiny_model
from tests.unit.models.test_gpt import qwen2_with_the_weights_of

PLAIN = SamplingConfig()
GREEDY = SamplingConfig(temperature=0.0)


def prompts_of(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(1, TINY.vocab_size, size=length) for length in lengths]


def text_of(model, prompts, *, max_length=24, seed=7, sampling=PLAIN, eos_id=None, numbers=None):
    """Generated with an own decoder; the policy records log q."""
    numbers = np.arange(len(prompts)) if numbers is None else np.asarray(numbers)
    decoder = Decoder([model], model.pg_collection, len(prompts), max_length)
    return generate(
        ModelPolicy(decoder, record=True),
        prompts,
        sequence_seeds(seed, "test", numbers),
        max_length=max_length,
        eos_id=eos_id,
        pad_id=0,
        sampling=sampling,
    )


@pytest.mark.parametrize("groups", [4, 2])
def test_greedy_ids_equal_transformers(groups):
    architecture = dataclasses.replace(TINY, num_query_groups=groups)
    with distributed_runtime(), torch.no_grad():
        model = tiny_model(architecture).eval()
        reference = qwen2_with_the_weights_of(model, architecture)
        prompts = prompts_of([9] * 5)
        theirs = reference.generate(
            torch.from_numpy(np.stack(prompts)), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        ours = text_of(model, prompts, max_length=39, sampling=GREEDY)
    assert torch.equal(ours.tokens, theirs)
    assert len(ours.tokens[:, 9:].unique()) > 20, "the comparison needs text that varies"


def test_megatron_cores_own_layers_give_the_same_text(monkeypatch):
    """Those of Transformer Engine keep their forward and Megatron-Core's cache."""
    prompts = prompts_of([3, 11, 7])
    with distributed_runtime():
        model = tiny_model(dataclasses.replace(TINY, qk_layernorm=True))
        ours = text_of(model, prompts)
        assert not any("forward" in vars(module) for module in model.modules()), "the model is left as it was"
        monkeypatch.setattr(decoding_mode, "_forward_of", lambda module: None)
        theirs = text_of(model, prompts)
    assert torch.equal(ours.tokens, theirs.tokens)
    for name, values in ours.log_probabilities.items():
        torch.testing.assert_close(values, theirs.log_probabilities[name], atol=1e-5, rtol=1e-4)


def test_unequal_prompts_are_continued_as_each_alone():
    prompts = prompts_of([3, 11, 1, 24, 7])
    with distributed_runtime():
        model = tiny_model()
        together = text_of(model, prompts)
        for row, prompt in enumerate(prompts):
            alone = text_of(model, [prompt], numbers=[row])
            assert torch.equal(together.tokens[row], alone.tokens[0]), row
            np.testing.assert_array_equal(together.tokens[row, : len(prompt)], prompt)
    assert together.prompt_lengths.tolist() == [3, 11, 1, 24, 7]
    assert model.training, "the model is left as it was"


def test_text_depends_on_the_seed_of_the_sequence_only():
    prompts = prompts_of([4]) * 6
    with distributed_runtime():
        model = tiny_model()
        whole = text_of(model, prompts)
        parts = torch.cat([text_of(model, prompts[:2], numbers=[k, k + 1]).tokens for k in (0, 2, 4)])
        other = text_of(model, prompts, seed=8)
    assert torch.equal(whole.tokens, parts)
    assert len({tuple(row.tolist()) for row in whole.tokens}) == 6
    assert not torch.equal(whole.tokens, other.tokens)


def test_recorded_log_probabilities_are_those_of_a_whole_forward_pass():
    prompts = prompts_of([5, 9])
    with distributed_runtime(), torch.no_grad():
        model = tiny_model()
        made = text_of(model, prompts)
        log_q = full_logits(model, made.tokens[:, :-1]).log_softmax(-1)
        expected = log_q.gather(2, made.tokens[:, 1:, None]).squeeze(2)
    for row, prompt in enumerate(prompts):
        recorded = made.log_probabilities["log_q"][row]
        torch.testing.assert_close(recorded[len(prompt) :], expected[row, len(prompt) - 1 :], atol=1e-4, rtol=1e-4)
        assert not recorded[: len(prompt)].any()


def test_end_of_sequence_ends_a_row_and_not_the_others():
    prompts = prompts_of([4, 4, 4])
    with distributed_runtime():
        model = tiny_model()
        free = text_of(model, prompts)
        eos = int(free.tokens[0, 8])
        ended = text_of(model, prompts, eos_id=eos)
    for row in range(3):
        text = free.tokens[row, 4:].tolist()
        length = 4 + text.index(eos) + 1 if eos in text else 24
        assert ended.lengths[row] == length
        assert torch.equal(ended.tokens[row, :length], free.tokens[row, :length])
        assert not ended.tokens[row, length:].any() and not ended.log_probabilities["log_q"][row, length:].any()
    assert ended.lengths[0] <= 9


def test_everyone_ends_at_once():
    with distributed_runtime():
        model = tiny_model()
        prompts = prompts_of([6]) * 3
        first = int(text_of(model, prompts, sampling=GREEDY).tokens[0, 6])
        made = text_of(model, prompts, sampling=GREEDY, eos_id=first)
    assert made.lengths.tolist() == [7, 7, 7] and made.tokens[:, 6].tolist() == [first] * 3
    assert not made.tokens[:, 7:].any()


def test_a_full_prompt_gets_no_response():
    prompts = prompts_of([12, 12])
    with distributed_runtime():
        made = text_of(tiny_model(), prompts, max_length=12)
    np.testing.assert_array_equal(made.tokens.numpy(), np.stack(prompts))
    assert made.lengths.tolist() == [12, 12] and not made.log_probabilities["log_q"].any()


@pytest.mark.parametrize("lengths", [[13], [4, 0]])
def test_prompts_that_do_not_fit_are_refused(lengths):
    with distributed_runtime(), pytest.raises(DataError, match="1 to 12 fit"):
        text_of(tiny_model(), prompts_of(lengths), max_length=12)


def test_mixed_policy_draws_from_the_mixture():
    prompts = prompts_of([5, 8])
    with distributed_runtime(), torch.no_grad():
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        teacher.pg_collection = student.pg_collection
        decoders = [Decoder([model], student.pg_collection, 2, 20) for model in (student, teacher)]
        seeds = sequence_seeds(3, "test", np.arange(2))
        made = generate(MixedPolicy(*decoders, alpha=0.3), prompts, seeds, max_length=20, eos_id=None, pad_id=0)
        log_q, log_p = (
            full_logits(model, made.tokens[:, :-1]).log_softmax(-1).gather(2, made.tokens[:, 1:, None]).squeeze(2)
            for model in (student, teacher)
        )
    expected = torch.log(0.3 * log_p.exp() + 0.7 * log_q.exp())
    for row, start in enumerate((5, 8)):
        for name, values in (("log_q", log_q), ("log_p", log_p), ("log_mixed", expected)):
            recorded = made.log_probabilities[name][row, start:]
            torch.testing.assert_close(recorded, values[row, start - 1 :], atol=1e-4, rtol=1e-4, msg=name)


def test_ids_that_a_side_lacks_are_never_drawn():
    """A teacher with fewer ids than the student, and a tokenizer with fewer than either."""
    prompts = prompts_of([5] * 6)
    with distributed_runtime(), torch.no_grad():
        student = tiny_model(seed=1)
        teacher = tiny_model(dataclasses.replace(TINY, vocab_size=20), seed=2)
        teacher.pg_collection = student.pg_collection
        for vocab_size, ids in ((None, 20), (9, 9)):
            decoders = [Decoder([model], student.pg_collection, 6, 40, vocab_size) for model in (student, teacher)]
            policy = MixedPolicy(*decoders, alpha=0.3)
            with policy.decoding():
                made = policy.next_token(torch.tensor([[1, 2, 3]] * 6))
            for values in (made.logits, *made.log_probabilities):
                assert values.shape == (6, ids)
                torch.testing.assert_close(values.exp().sum(1), torch.ones(6))
        prompts = [prompt % 9 for prompt in prompts]
        decoder = Decoder([student], student.pg_collection, 6, 40, vocab_size=9)
        seeds = np.arange(6, dtype=np.uint64)
        made = generate(ModelPolicy(decoder), prompts, seeds, max_length=40, eos_id=None, pad_id=0)
    assert made.tokens.max() == 8


def test_frequencies_are_probabilities():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, -torch.inf]]).expand(40_000, 5)
    seeds = sequence_seeds(1, "test", np.arange(40_000))
    tokens = choose(logits, torch.from_numpy(uniforms(seeds, 5)), SamplingConfig(temperature=0.7))
    expected = (logits[0].double() / 0.7).softmax(0)
    found = torch.bincount(tokens, minlength=5) / 40_000
    assert (found - expected).abs().max() < 4 * 0.5 / 200
    assert found[4] == 0


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-53])
def test_ends_of_the_interval_give_ids_that_have_probability(draw):
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf, -torch.inf]])
    token = choose(logits, torch.tensor([draw], dtype=torch.float64), SamplingConfig())
    assert token.item() == (1 if draw == 0 else 2)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.9, 20, 0.6)]
)
def test_what_is_left_equals_transformers(temperature, top_k, top_p):
    logits = 2 * torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    ours = sampling_logits(logits, SamplingConfig(temperature, top_k, top_p))
    assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


@pytest.mark.parametrize("keys", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_values_that_cannot_be(keys):
    assert len(list(SamplingConfig(**keys).validate())) == 1
