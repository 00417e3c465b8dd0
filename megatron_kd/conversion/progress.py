"""The bar of both conversions."""

import sys

from tqdm import tqdm


def progress_bar(total: int, what: str) -> tqdm:
    """Bytes, with an estimate of the time left."""
    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc=what,
        file=sys.stderr,
        disable=None,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )
