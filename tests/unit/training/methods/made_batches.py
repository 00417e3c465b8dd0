"""Micro-batches, hidden states and a generator of text without a model."""

import dataclasses
from types import SimpleNamespace

import torch

from megatron_kd.data.batch import Batch
from megatron_kd.losses import DenseKnowledge, OutputHead
from megatron_kd.training.methods import policy_gradient as pg
from megatron_kd.training.methods.generated_text import GeneratedText, Texts, generated_batch, text_of
from megatron_kd.training.methods.minillm import Rollout


def micro_batch(texts: Texts, pad_id: int = 0) -> Batch:
    """The micro-batch of some sequences, their prompts from the first chunks of a dataset."""
    nothing = torch.empty(0)
    prompts = Batch(nothing, nothing, nothing, nothing, torch.arange(len(texts)), key=1)
    return generated_batch(GeneratedText(texts), prompts, pad_id)


VOCABULARY, HIDDEN, LENGTH, ROWS = 7, 5, 6, 3
LOSS_GROUPS = SimpleNamespace(tp=None, cp=None)


class Case:
    """Student and teacher hidden states and heads in float64, and a batch of prompts and responses."""

    def __init__(self, lengths=(7, 4, 6), prompts=(2, 2, 5)):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = randn(LENGTH, ROWS, HIDDEN).requires_grad_()
        self.weight = torch.nn.Parameter(randn(VOCABULARY, HIDDEN))
        self.teacher_hidden, self.teacher_weight = randn(LENGTH, ROWS, HIDDEN), randn(VOCABULARY, HIDDEN)
        self.model = SimpleNamespace(
            output_head=lambda: OutputHead(self.weight, VOCABULARY), config=SimpleNamespace(sequence_parallel=False)
        )
        self.knowledge = DenseKnowledge(self.teacher_hidden.flatten(0, 1), OutputHead(self.teacher_weight, VOCABULARY))
        ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
        self.batch = micro_batch(Texts(ids, torch.tensor(lengths), torch.tensor(prompts)))
        self.mask = self.batch.loss_mask.double()

    def log_probabilities(self):
        """log q and log p [b, s, v], the first with its graph."""
        log_q = (self.hidden @ self.weight.t()).log_softmax(-1).transpose(0, 1)
        return log_q, (self.teacher_hidden @ self.teacher_weight.t()).log_softmax(-1).transpose(0, 1)

    def of_labels(self, values):
        return values.gather(2, self.batch.labels.unsqueeze(2)).squeeze(2)

    def rollout(self, config, alpha=0.3):
        log_q, log_p = (self.of_labels(values).detach() for values in self.log_probabilities())
        drawn = torch.log(alpha * log_p.exp() + (1 - alpha) * log_q.exp())
        known = pg.Drawn(log_q, log_p, drawn, self.mask)
        text = GeneratedText(text_of(self.batch).texts, {"log_mixed": drawn})
        rollout = Rollout(text, pg.paper_terms(known, config), pg.rewards(known))
        return dataclasses.replace(self.batch, payload=rollout), drawn

    def gradients(self, loss):
        return torch.autograd.grad(loss, [self.hidden, self.weight])


def sums_of(loss, batch, case, knowledge=None):
    """Loss, count and reported sums of a micro-batch."""
    sums = loss(batch, case.model, case.hidden, knowledge or case.knowledge)
    return sums.loss, sums.count, sums.reported


DP_GROUPS = SimpleNamespace(dp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))


def texts(count, first=0):
    """Sequences of one id each, so that they can be told apart."""
    ids = torch.arange(first, first + count)
    return Texts(ids.unsqueeze(1).expand(count, 6).clone(), torch.full((count,), 6), torch.full((count,), 2))


class Generator:
    """Generates sequences that are numbered through, and remembers who was asked."""

    def __init__(self):
        self.asked, self.count = [], 0

    def generate(self, policy, batches, global_batch, stream):
        self.asked.append((policy, global_batch, stream))
        made = texts(4, 4 * self.count)
        self.count += 1
        return self.as_micro_batches(made, batches)

    def as_micro_batches(self, made, batches):
        return [micro_batch(made)]


def dataset_batches():
    return [micro_batch(texts(4, 900))]
