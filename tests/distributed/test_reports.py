"""Which of several ranks tells the user what went wrong."""

import errno
import time

from megatron_kd.errors import UserError
from megatron_kd.parallel.coordination import another_rank_failed
from megatron_kd.parallel.runtime import distributed_runtime
from tests.distributed.fresh_world import run_in_fresh_world


def fill_the_disk_of_rank_1() -> tuple[str, bool] | None:
    """What this rank ends with, and whether it leaves the report to another."""
    try:
        with distributed_runtime() as runtime:
            if runtime.rank == 1:
                raise OSError(errno.ENOSPC, "No space left on device", "part_1.bin")
            deadline = time.monotonic() + 30
            while not another_rank_failed() and time.monotonic() < deadline:
                time.sleep(0.01)
    except UserError as error:
        return str(error), bool(error.is_reported)
    return None


def test_a_full_disk_is_told_by_the_rank_that_met_it():
    line = "the disk is full while writing part_1.bin: free space and run again"
    assert run_in_fresh_world(2, fill_the_disk_of_rank_1) == [None, (line, False)]
