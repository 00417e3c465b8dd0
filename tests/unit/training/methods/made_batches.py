"""Generated micro-batches without a model."""

import torch

from megatron_kd.data.batch import Batch
from megatron_kd.training.methods.generated_text import GeneratedText, Texts, generated_batch


def micro_batch(texts: Texts, pad_id: int = 0) -> Batch:
    """The micro-batch of some sequences, their prompts from the first chunks of a dataset."""
    nothing = torch.empty(0)
    prompts = Batch(nothing, nothing, nothing, nothing, torch.arange(len(texts)), key=1)
    return generated_batch(GeneratedText(texts), prompts, pad_id)
