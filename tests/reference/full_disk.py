"""What a writer does where the disk is full: a process of its own whose files may not grow beyond a size."""

import errno
import os
import resource
from typing import Any, Callable


def said_on_a_full_disk(write: Callable[[], Any], file_bytes: int) -> str:
    """Fork, limit the files, ``write``: ``"full"`` for an error that says so and names a file, else what happened.

    ``write`` may use numpy and files alone, never the threads of the parent.
    """
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        try:
            write()
        except OSError as error:
            os._exit((7 if error.filename else 8) if error.errno == errno.EFBIG else 9)
        os._exit(10)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {7: "full", 8: "full, without a file", 9: "another error", 10: "written"}.get(status, f"died with {status}")
