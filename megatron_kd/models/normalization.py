"""RMSNorm that allows sequence parallelism without Transformer Engine or Apex."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension, with Megatron-Core's constructor arguments.

    Under sequence parallelism each rank normalises its slice of the sequence, so the weight's gradient is a partial
    sum: ``weight.sequence_parallel`` makes Megatron-Core sum it over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        if not torch.is_grad_enabled():
            return _normalize(hidden, self.weight, self.eps)[0]
        return _RMSNormFunction.apply(hidden, self.weight, self.eps)


def _normalize(hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result and the inverse RMS of every row."""
    rows = hidden.float()
    inverse_rms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
    normalized = rows * inverse_rms
    result = normalized.mul_(weight) if hidden.dtype == torch.float32 else normalized.to(hidden.dtype) * weight
    return result, inverse_rms


class _RMSNormFunction(torch.autograd.Function):
    """Keeps the input and one scalar a row for the backward pass; arithmetic in fp32."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        result, inverse_rms = _normalize(hidden, weight, eps)
        ctx.save_for_backward(hidden, weight, inverse_rms)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        # With g the upstream gradient, r the inverse RMS and p = g · x: r · g · w − x · r³ · mean(p · w), and Σ p · r.
        hidden, weight, inverse_rms = ctx.saved_tensors
        rows, upstream, scale, width = hidden.float(), gradient.float(), weight.float(), hidden.shape[-1]
        products = (upstream * rows).flatten(0, -2)
        weight_gradient = torch.mv(products.t(), inverse_rms.flatten())
        factor = torch.mv(products, scale).view(inverse_rms.shape).mul_(inverse_rms.pow(3)).div_(-width)
        hidden_gradient = (upstream * scale).mul_(inverse_rms).addcmul_(rows, factor)
        return hidden_gradient.to(hidden.dtype), weight_gradient.to(weight.dtype), None
