"""Weight gradients under Megatron-Core's DDP: ``main_grad`` against plain autograd, on two data-parallel ranks.

With ``overlap_grad_reduce`` and ``overlap_param_gather`` on and off, embeddings tied (one stage and last stage) and
untied, in fp32 and bf16, over two micro-batches of which the first does not synchronise.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import shared_ranks
from tests.reference import naive_losses

VOCAB, ROWS, HIDDEN, TOKENS, MICRO_BATCHES = 45, 48, 16, 12, 2


@dataclass(frozen=True)
class Setting:
    """``tied``: the embedding is the head; ``copy``: the head alone, as on the last of several stages.

    ``masked``: the micro-batches, as (rank, number), whose tokens are all masked.
    """

    embedding: str = "untied"
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    dtype: torch.dtype = torch.float32
    masked: tuple[tuple[int, int], ...] = ()


SETTINGS = [
    Setting(embedding, overlap_grad_reduce, overlap_param_gather, dtype)
    for embedding in ("untied", "tied", "copy")
    for overlap_grad_reduce, overlap_param_gather in ((False, False), (True, False), (True, True))
    for dtype in (torch.float32, torch.bfloat16)
]
SETTINGS += [
    Setting(embedding, overlap, overlap, masked=masked)
    for embedding, overlap in (("untied", False), ("tied", True))
    for masked in (((1, 0),), ((1, 0), (1, 1)))
]


class Model(torch.nn.Module):
    """Embedding, one linear layer, and an output layer whose ``forward`` is never called."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.4).to(setting.dtype))

        self.embedding = torch.nn.Embedding(ROWS, HIDDEN, _weight=parameter(ROWS, HIDDEN), dtype=setting.dtype)
        if setting.embedding == "copy":
            self.embedding.weight.requires_grad_(False)
        self.layer = torch.nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=setting.dtype)
        self.layer.weight = parameter(HIDDEN, HIDDEN)
        self.output_layer = torch.nn.Linear(HIDDEN, ROWS, bias=False, dtype=setting.dtype)
        self.output_layer.weight = self.embedding.weight if setting.embedding == "tied" else parameter(ROWS, HIDDEN)
        if setting.embedding == "tied":
            self.embedding.weight.zero_out_wgrad = True  # as GPTModel marks it

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(self.embedding(ids)))


def batch(setting: Setting, rank: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + micro_batch)
    ids, labels = torch.randint(0, VOCAB, (2, TOKENS), generator=generator)
    share = 0.0 if (rank, micro_batch) in setting.masked else 0.8
    return ids, labels, (torch.rand(TOKENS, generator=generator) < share).float()


def expected(setting: Setting) -> dict[str, torch.Tensor]:
    """Gradients by plain autograd in float64, summed over micro-batches, averaged over ranks as DDP does."""
    model = Model(setting).double()
    for rank in range(2):
        for micro_batch in range(MICRO_BATCHES):
            ids, labels, weights = batch(setting, rank, micro_batch)
            z = naive_losses.logits(model(ids), model.output_layer.weight, None, 1.0, None)
            (naive_losses.lm_loss(z, VOCAB, labels) * weights).sum().div(2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def main_grads(setting: Setting, scale: float = 1.0) -> tuple[dict[str, torch.Tensor], bool]:
    """``main_grad`` of every parameter after two micro-batches; whether dummies were dropped."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    from megatron_kd.losses import OutputHead, linear_distillation_loss, run_forward_pre_hooks
    from megatron_kd.parallel.groups import create_process_groups
    from megatron_kd.parallel.layout import ParallelLayout
    from megatron_kd.parallel.mcore_patches import cpu_backend

    cpu_backend.install()
    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=setting.overlap_grad_reduce, bucket_size=64,
        use_distributed_optimizer=True, overlap_param_gather=setting.overlap_param_gather,
    )  # fmt: skip
    groups = create_process_groups(ParallelLayout(tensor=1, pipeline=1, context=1, data=2))
    model = Model(setting)
    wrapped = DistributedDataParallel(config, settings, model, pg_collection=groups)
    wrapped.zero_grad_buffer()
    if setting.overlap_param_gather:
        _forget_what_other_ranks_own(wrapped)
    for micro_batch in range(MICRO_BATCHES):
        last = micro_batch == MICRO_BATCHES - 1
        context = torch.enable_grad() if last else wrapped.no_sync()
        with context:
            ids, labels, weights = batch(setting, dist.get_rank(), micro_batch)
            hidden = wrapped(ids)
            run_forward_pre_hooks(model.output_layer)
            head = OutputHead(model.output_layer.weight, VOCAB)
            output = linear_distillation_loss(
                hidden, head, labels, weights, tile_bytes=5 * ROWS * 4, gradient_scale=scale
            )
            (output.loss_sum * scale).backward()
    wrapped.finish_grad_sync()
    result = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            result[name] = _own_part(wrapped, parameter) / scale
    return result, all(parameter.grad is None for parameter in model.parameters())


def _forget_what_other_ranks_own(wrapped: torch.nn.Module) -> None:
    """As after an optimizer step: each rank has the new values of its own shard only."""
    for buffer in wrapped.buffers:
        for bucket in buffer.buckets:
            shards = bucket.param_data.tensor_split(2)
            shards[1 - dist.get_rank()].fill_(float("nan"))


def _own_part(wrapped: torch.nn.Module, parameter: torch.nn.Parameter) -> torch.Tensor:
    """``main_grad``, NaN where another rank keeps the reduced value (reduce-scatter of the distributed optimizer)."""
    for buffer in wrapped.buffers:
        for bucket in buffer.buckets:
            if parameter in bucket.params:
                bucket.grad_data.tensor_split(2)[1 - dist.get_rank()].fill_(float("nan"))
    return parameter.main_grad.clone()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_main_grad_matches_plain_autograd(setting):
    want = expected(setting)
    by_rank = shared_ranks(2).run(main_grads, setting)
    tolerance = 1e-6 if setting.dtype == torch.float32 else 2e-2
    for name, gradient in want.items():
        parts = torch.stack([gradients[name] for gradients, _ in by_rank]).double()
        assert (torch.isfinite(parts).sum(0) == 1).all()  # each entry reduced on exactly one rank
        got = torch.nan_to_num(parts, nan=0.0).sum(0)
        assert (got - gradient).abs().max() <= tolerance * gradient.abs().max(), name
    assert all(dropped for _, dropped in by_rank)


def test_a_loss_scale_goes_into_main_grad_once():
    want = expected(Setting())
    by_rank = shared_ranks(2).run(main_grads, Setting(overlap_grad_reduce=True), scale=1024.0)
    for name, gradient in want.items():
        parts = torch.stack([gradients[name] for gradients, _ in by_rank]).double()
        got = torch.nan_to_num(parts, nan=0.0).sum(0)
        assert (got - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name
