"""Calls that ``bench_losses.py`` compares: bare matrix products, this project's loss, other public losses."""

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_kd.losses import (
    DenseKnowledge,
    DistillationObjective,
    OutputHead,
    Workspace,
    divergence_from_config,
    linear_distillation_loss,
)


@dataclass(frozen=True)
class Shape:
    """tokens × (student hidden, teacher hidden) × vocabulary."""

    tokens: int
    hidden: int
    teacher_hidden: int
    vocabulary: int
    dtype: torch.dtype = torch.float32

    def describe(self) -> str:
        return (
            f"{self.tokens} tokens, hidden {self.hidden} / {self.teacher_hidden}, V = {self.vocabulary}, "
            f"{str(self.dtype).removeprefix('torch.')}"
        )


class Inputs:
    """Tensors of a shape; the student's weight has ``main_grad``, as under Megatron-Core's data parallelism."""

    def __init__(self, shape: Shape, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, scale: float) -> Tensor:
            return (torch.randn(size, generator=generator) * scale).to(device, shape.dtype)

        self.shape = shape
        self.hidden = normal(shape.tokens, shape.hidden, scale=1.0).requires_grad_()
        self.weight = torch.nn.Parameter(normal(shape.vocabulary, shape.hidden, scale=0.02))
        self.weight.main_grad = torch.zeros(self.weight.shape, device=device)
        self.teacher_hidden = normal(shape.tokens, shape.teacher_hidden, scale=1.0)
        self.teacher_weight = normal(shape.vocabulary, shape.teacher_hidden, scale=0.02)
        self.labels = torch.randint(0, shape.vocabulary, (shape.tokens,), generator=generator).to(device)
        self.token_weights = torch.ones(shape.tokens, device=device)

        self.clear()

    def clear(self) -> None:
        """Return to the state before the first call, except for the contents of ``main_grad``."""
        self.hidden.grad = self.weight.grad = None
        self.weight.grad_added_to_main_grad = False

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that a call has left, without the dummy that stands for ``main_grad``."""
        grads = [self.hidden.grad, None if self.weight.grad_added_to_main_grad else self.weight.grad]
        return sum(grad.nbytes for grad in grads if grad is not None)

    def logits(self) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's logits, whole."""
        with torch.no_grad():
            teacher = self.teacher_hidden @ self.teacher_weight.t()
        return self.hidden @ self.weight.t(), teacher


Call = Callable[[], None]


def bare_products(inputs: Inputs, tile: int) -> Call:
    """Four matrix products in tiles of tokens, with buffers made beforehand."""
    shape = inputs.shape
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    buffers = [hidden.new_empty((tile, shape.vocabulary)) for _ in range(2)]
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)

    def call() -> None:
        for start in range(0, shape.tokens, tile):
            rows = slice(start, min(start + tile, shape.tokens))
            student, teacher = (buffer[: rows.stop - rows.start] for buffer in buffers)
            torch.mm(hidden[rows], weight.t(), out=student)
            torch.mm(inputs.teacher_hidden[rows], inputs.teacher_weight.t(), out=teacher)
            torch.mm(student, weight, out=grad_hidden[rows])
            grad_weight.addmm_(student.t(), hidden[rows])

    return call


def fused(inputs: Inputs, divergence: str, workspace: Workspace | None = None, backend: str = "torch") -> Call:
    """This project's loss: LM and the divergence."""
    objective = DistillationObjective(0.5, 0.5, divergence_from_config(divergence))
    head = OutputHead(inputs.weight, inputs.shape.vocabulary)
    knowledge = DenseKnowledge(inputs.teacher_hidden, OutputHead(inputs.teacher_weight, inputs.shape.vocabulary))

    def call() -> None:
        linear_distillation_loss(
            inputs.hidden,
            head,
            inputs.labels,
            inputs.token_weights,
            objective,
            knowledge,
            workspace=workspace,
            backend=backend,
        ).loss_sum.backward()

    return call


def plain_torch(inputs: Inputs) -> Call:
    """Whole logits, log_softmax and kl_div, as training scripts on Hugging Face models do it."""

    def call() -> None:
        student, teacher = inputs.logits()
        log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
        F.kl_div(log_q, log_p, reduction="sum", log_target=True).backward()

    return call


def modelopt(inputs: Inputs) -> Call | None:
    """NVIDIA ModelOpt's LogitsKLLoss on whole logits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.transformer import TransformerConfig
            from modelopt.torch.distill.plugins.megatron import LogitsKLLoss
    except ImportError:
        return None
    loss = LogitsKLLoss(TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=1))

    def call() -> None:
        student, teacher = inputs.logits()
        value = loss(student.unsqueeze(1), teacher.unsqueeze(1))
        (value[0] if isinstance(value, tuple) else value).sum().backward()

    return call


def torchtune(inputs: Inputs) -> Call | None:
    """torchtune's chunked forward KL, from its own file (its package imports torchao at start)."""
    package = importlib.util.find_spec("torchtune")
    if package is None:
        return None
    path = Path(package.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chunks = 8
    loss = module.ForwardKLWithChunkedOutputLoss(num_output_chunks=chunks)

    def call() -> None:
        labels = inputs.labels.unsqueeze(0).chunk(chunks, 1)
        student = [part.unsqueeze(0) @ inputs.weight.t() for part in inputs.hidden.chunk(chunks)]
        with torch.no_grad():
            teacher = [part.unsqueeze(0) @ inputs.teacher_weight.t() for part in inputs.teacher_hidden.chunk(chunks)]
        loss(student, teacher, torch.cat(labels, 1)).backward()

    return call


def liger(inputs: Inputs) -> Call | None:
    """Liger-Kernel's fused linear JSD at its forward-KL end; CUDA only."""
    if inputs.hidden.device.type != "cuda":
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError:
        return None
    loss = LigerFusedLinearJSD(jsd_beta=0.0)
    return lambda: loss(
        inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels
    ).backward()
