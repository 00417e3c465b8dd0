"""How many processors this process may use."""

import os


def cpu_count() -> int:
    """Those that the scheduler gives to this process, or all where the system does not say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
