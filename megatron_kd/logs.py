"""What the program says while it works: one logger, one line a message, from one rank.

Modules use Python's own logging:

    logger = logging.getLogger(__name__)
    logger.info("3 of 8 units were finished before")        # said by rank 0 alone
    logger.warning("rank 3 is gone", extra=EVERY_RANK)      # said by whichever rank gets here

``start_logging(verb)`` sends these to standard error as ``<verb>: <message>``, one line each, above any progress bar.
What a command is asked for (a table, a plan, a resolved configuration) goes to standard output, not through here.
"""

import logging
import os
import sys
import warnings

EVERY_RANK = {"every_rank": True}
"""Passed as ``extra``: this message is not rank 0's alone."""

_PACKAGE = logging.getLogger("megatron_kd")
_KNOWN_NOISE = (
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


def start_logging(verb: str) -> None:
    """Send the package's messages to standard error, headed by ``verb``; a second call changes the heading."""
    for handler in list(_PACKAGE.handlers):
        if isinstance(handler, _StandardError):
            _PACKAGE.removeHandler(handler)
    _PACKAGE.addHandler(_StandardError(verb))
    _PACKAGE.setLevel(logging.INFO)


def is_reporting_rank() -> bool:
    """Whether this process speaks for the job: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def silence_known_noise() -> None:
    """Silence what libraries say about accelerators that a user may well not have; faults are never silenced.

    To be called before Megatron-Core is imported: most of these warnings come at import.
    """
    for message in _KNOWN_NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # A failed write is reported by the one line of training/checkpoint.py.
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)


class _StandardError(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at the time, above the progress bars that tqdm shows there."""

    def __init__(self, verb: str) -> None:
        super().__init__()
        self._verb = verb

    def emit(self, record: logging.LogRecord) -> None:
        if not (getattr(record, "every_rank", False) or is_reporting_rank()):
            return
        try:
            line = f"{self._verb}: {' '.join(record.getMessage().split())}"
            bars = sys.modules.get("tqdm")
            if bars is not None:
                bars.tqdm.write(line, file=sys.stderr)
            else:
                sys.stderr.write(line + "\n")
            sys.stderr.flush()
        except Exception:  # a broken pipe must not end the work; logging.raiseExceptions decides whether it is shown
            self.handleError(record)
