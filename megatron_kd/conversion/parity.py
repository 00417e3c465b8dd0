"""Parity of logits between Megatron-Core and transformers: what ``verify=true`` of both conversions compares."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_kd.errors import CheckpointError
from megatron_kd.models.gpt import HiddenStateGPTModel, full_logits

LOGIT_TOLERANCE = 1e-4  # of the largest logit where that is above 1: fp32 rounds no finer through dozens of layers
VERIFIED_TOKENS = (2, 64)


@torch.no_grad()
def compare_logits(model: HiddenStateGPTModel, folder: Path, whose: str) -> float:
    """Return the largest absolute difference between the logits of ``model`` and transformers' of ``folder``, in fp32.

    Args:
        model: the unsharded mcore model; it is converted to fp32 in place.
        folder: a Hugging Face folder.
        whose: what errors call the model that was just made.

    Raises:
        CheckpointError: the difference is not below 1e-4, times the largest logit where that is above 1.
    """
    theirs: Any = transformers_model(folder)
    generator = torch.Generator().manual_seed(0)
    length = min(VERIFIED_TOKENS[1], model.max_sequence_length, theirs.config.max_position_embeddings)
    tokens = torch.randint(0, model.valid_vocab_size, (VERIFIED_TOKENS[0], length), generator=generator)
    ours = full_logits(model.float(), tokens)
    found = theirs(input_ids=tokens).logits
    if found.shape != ours.shape:
        raise CheckpointError(f"{whose} logits: transformers gives shape {list(found.shape)}, not {list(ours.shape)}")
    difference = (found - ours).abs().max().item()
    limit = LOGIT_TOLERANCE * max(1.0, found.abs().max().item())
    if not difference < limit:
        raise CheckpointError(
            f"{whose} logits differ between transformers and Megatron-Core by {difference:.2e}, not below {limit:.1e}: "
            "nothing was written"
        )
    return difference


def transformers_model(folder: Path) -> torch.nn.Module:
    """Build transformers' model of a folder, in fp32, beside a running Megatron-Core.

    ``from_pretrained`` builds on the meta device, which the CPU backend's tensor factories do not follow. So the model
    is built from config.json and filled from the files. Code in the folder is never run.

    Raises:
        CheckpointError: the files do not hold what the model needs, or more.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, trust_remote_code=False).eval()
    wanted: dict[str, torch.Tensor] = dict(model.state_dict())
    given: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name in wanted:
                wanted[name].copy_(tensor)
        given |= set(tensors)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted(set(wanted) - given - tied)
    unexpected = sorted(name for name in given - set(wanted) if not name.endswith("rotary_emb.inv_freq"))
    if missing or unexpected:
        raise CheckpointError(f"{folder}: transformers misses {missing} and does not know {unexpected}")
    return model
