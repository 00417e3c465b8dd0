"""Chunk losses the plain way: whole logits, log_softmax in float64, one chunk after another."""

import numpy
import torch

from megatron_kd.data.batch import make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.models.gpt import HiddenStateGPTModel, full_logits


@torch.no_grad()
def naive_chunk_losses(model: HiddenStateGPTModel, dataset: ChunkDataset) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Summed negative log-likelihood and unmasked positions of every chunk; the model on one rank."""
    nats, tokens = numpy.zeros(dataset.num_chunks), numpy.zeros(dataset.num_chunks, dtype=numpy.int64)
    for chunk in range(dataset.num_chunks):
        batch = make_batch(dataset, numpy.array([chunk]), dataset.seq_length)
        log_probabilities = full_logits(model, batch.tokens).double().log_softmax(-1)
        for position in range(dataset.seq_length):
            if batch.loss_mask[0, position]:
                nats[chunk] -= float(log_probabilities[0, position, batch.labels[0, position]])
                tokens[chunk] += 1
    return nats, tokens
