"""A head applied to a chunk of hidden states, in buffers that are reused from chunk to chunk.

The matrix product runs in the head's dtype; all that follows is fp32 (fp64 for fp64 heads). For a 16-bit head on CPU
the product is 16-bit too, as in the model itself, and is widened; on CUDA it is written in fp32. No collectives.
"""

import torch
from torch import Tensor

from megatron_kd.errors import ConfigError
from megatron_kd.losses.types import OutputHead

MATMUL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CPU_COLUMN_TILE, CPU_ROWS_OF_WHOLE_PRODUCTS = 1536, 1536
LOGIT_FLOOR = -1.0e5  # what a bias of -inf makes of a logit: its probability is exactly 0, and 0 * LOGIT_FLOOR is 0


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and statistics for a head of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether logits are widened from this dtype."""
    return dtype in (torch.bfloat16, torch.float16)


class HeadLogits:
    """The columns ``first_row .. first_row + rows - 1`` of a head, for chunk after chunk."""

    def __init__(self, head: OutputHead, first_row: int, rows: int) -> None:
        if head.weight.dtype not in MATMUL_DTYPES:
            raise ConfigError(f"an output head's weight must be floating point, not {head.weight.dtype}")
        self.weight = head.weight.detach()[first_row : first_row + rows]
        self.bias = None if head.bias is None else head.bias.detach()[first_row : first_row + rows]
        self.scale = head.scale
        self.softcap = head.final_softcap

    def product(self, hidden: Tensor, out: Tensor) -> None:
        """``out`` [n, R] = hidden [n, h] @ weight.T, in out's dtype."""
        own = self.weight.dtype
        if out.dtype == own:
            for columns in self._column_tiles(out):
                torch.mm(hidden, self.weight[columns].t(), out=out[:, columns])
        elif out.device.type == "cuda" and is_narrow(own) and out.dtype == torch.float32:
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            out.copy_(torch.mm(hidden, self.weight.t()))

    def _column_tiles(self, out: Tensor) -> list[slice]:
        """Few rows: the parts of the weight that a CPU's product copies stay in its cache from one use to the next."""
        columns = self.weight.shape[0]
        if out.device.type != "cpu" or len(out) >= CPU_ROWS_OF_WHOLE_PRODUCTS:
            return [slice(0, columns)]
        return [slice(start, min(columns, start + CPU_COLUMN_TILE)) for start in range(0, columns, CPU_COLUMN_TILE)]

    def finish(self, logits: Tensor) -> None:
        """Scale, bias and softcap of ``logits`` [n, R], in place."""
        if self.bias is not None:
            logits.add_(self.bias).clamp_min_(LOGIT_FLOOR)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
