"""The stash keeps every tensor and counts where its bytes are."""

import pytest
import torch

from megatron_kd.teachers.colocated import Stash


def test_beyond_the_budget_tensors_wait_in_host_memory_and_come_back():
    stash = Stash(device_bytes=2 * 40)
    values = [torch.full((10,), float(i)) for i in range(5)]
    for i, value in enumerate(values):
        stash.put(i, value)
    assert (stash.peak_device_bytes, stash.peak_host_bytes) == (80, 120)
    for i in (3, 0, 4):
        torch.testing.assert_close(stash.take(i), values[i])
    assert (stash.device_bytes, stash.host_bytes) == (40, 40)
    stash.put(5, values[0])
    assert stash.device_bytes == 80 and 5 in stash and 0 not in stash
    with pytest.raises(KeyError):
        stash.take(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_host_copies_are_pinned_and_come_back_to_the_device():
    stash = Stash(device_bytes=0)
    value = torch.randn(1000, device="cuda")
    stash.put("a", value.clone())
    assert stash._kept["a"][0].is_pinned()
    torch.testing.assert_close(stash.take("a"), value)
