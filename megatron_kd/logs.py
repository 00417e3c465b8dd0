"""Log messages: one logger, one line per message, printed by one rank.

Modules use Python's own logging:

    logger = logging.getLogger(__name__)
    logger.info("3 of 8 units were finished before")        # printed by rank 0 only
    logger.warning("rank 3 is gone", extra=EVERY_RANK)      # printed by every rank that logs it

``start_logging(verb)`` sends them to standard error as ``<verb>: <message>``, above any progress bar. The result of a
command (a table, a plan, a resolved configuration) goes to standard output, not through the logger.
"""

import logging
import os
import sys
import warnings

from tqdm import tqdm

EVERY_RANK = {"every_rank": True}
"""Pass as ``extra`` to print a message on every rank that logs it."""

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
    """Send the package's messages to standard error, prefixed with ``verb``; a second call changes the prefix."""
    for handler in list(_PACKAGE.handlers):
        if isinstance(handler, _StandardError):
            _PACKAGE.removeHandler(handler)
    _PACKAGE.addHandler(_StandardError(verb))
    _PACKAGE.setLevel(logging.INFO)


def is_reporting_rank() -> bool:
    """Return whether this process prints for the job: rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def silence_known_noise() -> None:
    """Silence library warnings about accelerators that need not be present; errors are never silenced.

    Call it before Megatron-Core is imported: most of these warnings are raised at import.
    """
    for message in _KNOWN_NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # training/checkpoint.py reports a failed write, in one line.
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)


def progress_bar(total: int, description: str, unit: str = "B", initial: int = 0, shown: bool | None = None) -> tqdm:
    """Return a bar with an estimate of the time left.

    Args:
        total: how many of ``unit`` there are; bytes by default.
        initial: how many of them were done before.
        shown: whether it is shown; None shows it on a terminal alone. Elsewhere it is a line every 10 seconds.
    """
    interval = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=True,
        desc=description,
        file=sys.stderr,
        disable=None if shown is None else not shown,
        mininterval=interval,
    )


class _StandardError(logging.Handler):
    """Writes to the current ``sys.stderr``, above the progress bars that tqdm shows there."""

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
        except Exception:  # A broken pipe must not end the work.
            self.handleError(record)
