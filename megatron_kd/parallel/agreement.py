"""How ranks agree on what only one of them knows: work of the main rank, and which rank reports a failure."""

from typing import Any, Callable

import torch.distributed as dist

from megatron_kd.errors import UserError, disk_full

_FAILURES_KEY = "megatron_kd/failures"


def on_main_rank(action: Callable[[], Any]) -> Any:
    """``action()`` on rank 0; its value on every rank. Collective over the world.

    Raises:
        UserError: rank 0 raised one (on every rank, of the same type and text), or an OSError.
    """
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [("value", action())]
        except UserError as error:
            outcome = [("error", error)]
        except OSError as error:
            other = UserError(f"{error.strerror or error} ({error.filename or 'output'})")
            outcome = [("error", disk_full(error) or other)]
    dist.broadcast_object_list(outcome, src=0)
    kind, value = outcome[0]
    if kind == "error":
        raise value
    return value


def first_to_fail(store: dist.Store | None = None) -> bool:
    """Whether no other rank has failed before this one: the first one reports, the others end quietly.

    ``store`` is shared by all ranks of the job; None means the default group's.
    """
    try:
        return (store or dist.distributed_c10d._get_default_store()).add(_FAILURES_KEY, 1) == 1
    except Exception:  # noqa: BLE001 - the store went away with the rank that failed first
        return False


def another_rank_failed(store: dist.Store | None = None) -> bool:
    """Whether a rank has reported a failure: what this rank ran into is then its consequence."""
    try:
        return (store or dist.distributed_c10d._get_default_store()).add(_FAILURES_KEY, 0) > 0
    except Exception:  # noqa: BLE001 - nothing is known of the others
        return False
