"""A batch source's state in a checkpoint: one small file beside the weights."""

import io

import numpy as np

from megatron_kd.models.weights import CheckpointInfo
from megatron_kd.training.methods.source import BatchSource

STATE_NAME = "batch_source.npz"


def source_files(source: BatchSource) -> dict[str, bytes]:
    """File name -> contents; nothing for a source without state."""
    state = source.state()
    if not state:
        return {}
    buffer = io.BytesIO()
    np.savez(buffer, **state)
    return {STATE_NAME: buffer.getvalue()}


def restore_source(source: BatchSource, info: CheckpointInfo) -> None:
    """Go on from a checkpoint; one of a run without generated text leaves the source as new."""
    path = info.path / STATE_NAME
    if path.is_file():
        with np.load(path) as state:
            source.restore(dict(state))
