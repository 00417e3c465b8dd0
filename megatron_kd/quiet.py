"""Silence for what libraries say about accelerators that a user may well not have; faults are never silenced."""

import logging
import warnings

_MESSAGES = (
    ".*Apex is not installed.*",
    ".*Apex are not installed.*",
    ".*[Tt]ransformer.?[Ee]ngine.*",
    ".*CPU RNG state.*",
    ".*full scope is deprecated.*",
    ".*The .grad attribute of a Tensor that is not a leaf.*",
    ".*torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor).* is deprecated.*",
    ".*.load_state_dict. is deprecated.*",
    ".*Please use DTensor instead.*",
    ".*CUDA is not available.*",
    ".*User provided device_type of 'cuda'.*",
    ".*MimoModelConfig is experimental.*",
    ".*torch.distributed is disabled, unavailable.*",
    ".*argument order of load has been changed.*",
    ".*invalid escape sequence.*",
)


def silence_known_noise() -> None:
    """Call before Megatron-Core is imported: most of these warnings come at import."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # What its writers could not write is reported by the one line of training/checkpoint.py.
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)
