"""The same text under every layout, greedy and sampled, with prompts of unequal lengths."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.distributed.ranks import shared_ranks
from tests.reference.one_rank import TINY

FOUR_LAYERS = dataclasses.replace(TINY, num_layers=4)
LAYOUTS = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2 SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2 VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "TP2 PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}


def texts_here(keys):
    """Greedy and sampled text on this rank, and the recorded log-probabilities where there are any."""
    from megatron_kd.data.random_numbers import sequence_seeds
    from megatron_kd.generation.decoder import Decoder
    from megatron_kd.generation.generate import MixedPolicy, ModelPolicy, generate
    from megatron_kd.generation.generation_config import SamplingConfig
    from megatron_kd.models.gpt import build_model
    from megatron_kd.models.parameters import initialize_weights
    from megatron_kd.parallel.groups import create_process_groups
    from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
    from megatron_kd.parallel.runtime import distributed_runtime, seed_everything

    with distributed_runtime() as runtime:
        layout = ParallelLayout.for_world(ParallelConfig(**keys), runtime.world_size)
        groups = create_process_groups(layout)
        seed_everything(0, groups)
        models = []
        for seed in (1, 2):
            chunks = build_model(
                FOUR_LAYERS, layout, groups, precision="fp32", device=runtime.device, max_sequence_length=32
            )
            for chunk in chunks:
                initialize_weights(chunk, FOUR_LAYERS.init_std, seed)
            models.append(chunks)
        generator = np.random.default_rng(0)
        prompts = [generator.integers(1, 300, size=length) for length in (3, 9, 9, 32, 1)]

        def decoder(chunks):
            return Decoder(chunks, groups, len(prompts), 32)

        policies = {
            "greedy": (ModelPolicy(decoder(models[0])), SamplingConfig(temperature=0.0)),
            "sampled": (ModelPolicy(decoder(models[0]), record=True), SamplingConfig(temperature=0.8, top_p=0.9)),
            "mixed": (MixedPolicy(decoder(models[0]), decoder(models[1]), 0.2), SamplingConfig()),
        }
        seeds = sequence_seeds(5, "test", np.arange(5))
        made = {
            name: generate(policy, prompts, seeds, max_length=32, eos_id=7, pad_id=0, sampling=sampling)
            for name, (policy, sampling) in policies.items()
        }
    return {name: (text.tokens, text.lengths, text.log_probabilities) for name, text in made.items()}


@pytest.fixture(scope="module")
def one_rank():
    return shared_ranks(1).run(texts_here, {})[0]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one rank"])
def test_layout_gives_the_text_of_one_rank(layout, one_rank):
    world, keys = LAYOUTS[layout]
    recorded = 0
    for result in shared_ranks(world).run(texts_here, keys):
        for name, (tokens, lengths, log_probabilities) in one_rank.items():
            assert torch.equal(result[name][0], tokens), name
            assert torch.equal(result[name][1], lengths), name
            for key, values in result[name][2].items():
                torch.testing.assert_close(values, log_probabilities[key], atol=2e-4, rtol=1e-4, msg=key)
                recorded += 1
    assert recorded >= 4, "the last stage records"


def test_the_texts_differ(one_rank):
    """The comparison would also hold for a model that repeats itself."""
    assert len({tuple(tokens.flatten().tolist()) for tokens, *_ in one_rank.values()}) == 3
    assert len(one_rank["sampled"][0].unique()) > 40
