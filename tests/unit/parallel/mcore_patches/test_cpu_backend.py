"""The CPU backend answers what Megatron-Core asks of CUDA, and refuses where there is CUDA."""

import subprocess
import sys

import pytest
import torch

from megatron_kd.parallel.mcore_patches import cpu_backend


def test_refuses_where_cuda_is(monkeypatch):
    monkeypatch.setattr(cpu_backend, "is_installed", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device
    with pytest.raises(RuntimeError, match="machine with CUDA"):
        cpu_backend.install()
    assert torch.cuda.current_device is before


PROGRAM = """
import torch
from megatron_kd.parallel.mcore_patches import cpu_backend
plain = torch.zeros
assert not cpu_backend.is_installed()
cpu_backend.install(); first = torch.zeros; cpu_backend.install()
assert cpu_backend.is_installed() and torch.zeros is first is not plain, "a second call wraps nothing again"
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.empty(1, device=torch.device("cuda", 0), pin_memory=True).device.type == "cpu"
assert torch.ones(1).to("cuda").cuda().device.type == "cpu"
assert torch.ones(1).to(device="cuda", dtype=torch.bfloat16).dtype == torch.bfloat16
assert torch.ones(1).type() == "torch.cuda.FloatTensor"
assert torch.ones(1).type(torch.int64).dtype == torch.int64
assert torch.nn.Linear(1, 1).cuda().weight.device.type == "cpu"
torch.cuda.synchronize()
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.current_stream().wait_stream(torch.cuda.current_stream())
state = torch.cuda.get_rng_state(); a = torch.rand(3); torch.cuda.set_rng_state(state)
assert torch.equal(a, torch.rand(3))
import os
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group, threads = dist.group.WORLD, len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
values = torch.arange(200_000.0); kept = values.clone()
dist.all_reduce(values, group=group); dist.broadcast(values, src=0, group=group)
assert dist.all_reduce(values, group=group, async_op=True).wait() and torch.equal(values, kept)
dist.all_reduce(values, dist.ReduceOp.MAX, group); dist.broadcast(values, 0, group); dist.all_reduce(tensor=values)
dist.all_gather_into_tensor(torch.zeros_like(values), values, group)
assert torch.equal(values, kept)
for collective in (dist.all_gather_into_tensor, dist.reduce_scatter_tensor):
    output = torch.zeros_like(values)
    assert collective(output, values, group=group, async_op=True).wait() and torch.equal(output, kept)
    collective(values, values, group=group)
    assert torch.equal(values, kept)
from torch.distributed import _coalescing_manager
output = torch.zeros_like(values)
with _coalescing_manager(group, async_ops=True) as handle:
    dist.reduce_scatter_tensor(output, values, group=group, async_op=True)
handle.wait(); assert torch.equal(output, kept)
"""


def test_answers_of_the_backend():
    """In a process of its own: the replacements stay for the life of a process."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], check=True, timeout=120)
