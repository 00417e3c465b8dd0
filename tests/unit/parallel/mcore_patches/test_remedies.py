"""Checkpoints of torch's AdamW: state before the first step, step counts, moments of padded buckets."""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_kd.checkpoints.weights import open_checkpoint
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.mcore_patches.remedies import clipped_step
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.checkpoint import Progress, load_checkpoint, training_state
from megatron_kd.training.optimizer import build_optimizer
from megatron_kd.training.train_config import OptimizerConfig
from tests.reference.one_rank import one_rank_groups, tiny_model
from tests.reference.saved_checkpoint import save_checkpoint

ODD = ModelArchitecture(2, 40, 44, 4, 2, vocab_size=300, rope_theta=10_000.0)
ABOUT = {"tokenizer_hash": "x", "seq_length": 32, "precision": "fp32"}


def wrapped(bucket_size, precision):
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=bucket_size is not None,
        bucket_size=bucket_size,
    )
    chunk, groups = tiny_model(ODD, precision=precision), one_rank_groups()
    model = [DistributedDataParallel(chunk.config, settings, chunk, pg_collection=groups)]
    return model, build_optimizer(OptimizerConfig(), model, groups, bf16=precision == "bf16"), groups


def moments(model, optimizer):
    [part] = optimizer.chained_optimizers
    return {
        name: part._get_main_param_and_optimizer_states(parameter) for name, parameter in model[0].named_parameters()
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("saved", "loaded"), [(2000, None), (None, 2000)])
def test_moments_stay_with_their_parameter_across_padded_buckets(saved, loaded, precision, tmp_path):
    with distributed_runtime():
        model, optimizer, groups = wrapped(saved, precision)
        buffers = [*model[0].buffers, *wrapped(2000, precision)[0][0].buffers]
        assert any(bucket.numel_unpadded % 128 for buffer in buffers for bucket in buffer.buckets[:-1])
        with torch.no_grad():
            for number, tensors in enumerate(moments(model, optimizer).values()):
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    tensors[key].uniform_(generator=torch.Generator().manual_seed(number))
        path = save_checkpoint(tmp_path, Progress(step=3), model, optimizer, groups, architecture=ODD, about=ABOUT)
        other, other_optimizer, groups = wrapped(loaded, precision)
        load_checkpoint(open_checkpoint(path), other, other_optimizer, groups)
        expected, found = moments(model, optimizer), moments(other, other_optimizer)
        for name, tensors in expected.items():
            for key in ("param", "exp_avg", "exp_avg_sq"):
                assert torch.equal(found[name][key], tensors[key]), (name, key)


def update(model, optimizer):
    for parameter in model[0].parameters():
        parameter.main_grad.fill_(0.01)
    optimizer.prepare_grads()
    clipped_step(optimizer, 1.0, 1.0)


def test_step_counts_are_independent_after_a_load():
    with distributed_runtime():
        model, optimizer, _ = wrapped(None, "fp32")
        (part,) = optimizer.chained_optimizers
        update(model, optimizer)
        part.load_state_dict(part.state_dict())
        steps = [state["step"] for state in part.optimizer.state.values()]
        assert len({step.data_ptr() for step in steps}) == len(steps) > 10
        assert {float(step) for step in steps} == {1.0}
        update(model, optimizer)
        assert {float(state["step"]) for state in part.optimizer.state.values()} == {2.0}


def test_an_optimizer_that_has_not_stepped_has_a_state():
    with distributed_runtime():
        model, optimizer, groups = wrapped(None, "fp32")
        assert "optimizer" in training_state(model, optimizer, groups, is_loading=False)
        states = optimizer.chained_optimizers[0].optimizer.state.values()
        assert all(float(state["step"]) == 0 and not state["exp_avg"].any() for state in states)
