"""Passes of a small model through Megatron-Core's schedule on one rank."""

import torch

from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.parallel.schedule import forward_only, run_schedule
from tests.reference.one_rank import one_rank_groups, tiny_model


def items(count):
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(8).expand(2, 8)
    return [(torch.randint(0, 300, (2, 8), generator=generator), positions) for _ in range(count)]


def test_forward_only_collects_in_order_and_leaves_no_graph():
    with distributed_runtime():
        model, groups, batches = tiny_model(), one_rank_groups(), items(3)
        hidden = forward_only(
            [model],
            groups,
            lambda item: item,
            lambda item, output: (item, output),
            batches,
            seq_length=8,
            micro_batch_size=2,
        )
        assert [item is batch for (item, _), batch in zip(hidden, batches)] == [True] * 3
        for (tokens, positions), output in hidden:
            assert output.shape == (8, 2, 32) and not output.requires_grad
            torch.testing.assert_close(output, model(tokens, positions, None).detach())


def test_training_sums_gradients_over_items_and_divides_by_nothing():
    with distributed_runtime():
        model, groups, batches = tiny_model(), one_rank_groups(), items(2)

        def step(iterator, chunk):
            hidden = chunk(*next(iterator), None)
            return hidden, lambda output: (
                output.sum(),
                torch.tensor(5, dtype=torch.int),
                {"sum": output.detach().sum()},
            )

        reports = run_schedule([model], groups, step, batches, seq_length=8, micro_batch_size=2)
        assert len(reports) == 2
        name, parameter = next(iter(model.named_parameters()))
        expected = torch.autograd.grad(sum(model(*item, None).sum() for item in batches), parameter)[0]
        torch.testing.assert_close(parameter.grad, expected, msg=name)
