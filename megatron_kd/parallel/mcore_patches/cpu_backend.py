"""Megatron-Core on a machine without CUDA: the one module that knows what it assumes about CUDA.

``install()`` replaces, in this process, the few things that Megatron-Core uses: ``torch.cuda.current_device``, streams
and synchronisation, ``device="cuda"`` in tensor factories, ``.cuda()`` methods, CUDA random-number state, and
``tensor.type()`` names that its optimizer and gradient clipping compare with ``torch.cuda.*``. Collectives over a
single rank, which Megatron-Core calls too, become no-ops. Where CUDA is available it refuses.
"""

import contextlib
import ctypes
import functools
import os
import sys
from typing import Any, Callable

import torch
import torch.distributed as dist
import torch.utils._device

_FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
    "as_tensor",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
)
_TYPE_NAMES = {
    f"torch.{name}": f"torch.cuda.{name}" for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "DoubleTensor")
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
_LARGE_BLOCK = 1 << 30


def is_installed() -> bool:
    """Return whether this process runs Megatron-Core on its CPU."""
    return torch.cuda.Stream is _Stream


def install() -> None:
    """Make Megatron-Core run on the CPU in this process; a second call does nothing.

    Raises:
        RuntimeError: CUDA is available, where the replacements would break real work.
    """
    if is_installed():
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU backend was asked for on a machine with CUDA")
    # Without a driver the jit-fused functions would be compiled with a C++ compiler at first use: minutes, no gain.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _replace_cuda_functions()
    _replace_factories()
    _replace_methods()
    _replace_random_state()
    _skip_collectives_of_one_rank()
    _keep_freed_memory()


def _replace(owner: object, **replacements: Any) -> None:
    """Replace attributes of a module or class of torch's or Megatron-Core's."""
    for name, replacement in replacements.items():
        setattr(owner, name, replacement)


class _Stream:
    """A stream on a device that runs everything in order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


def _replace_cuda_functions() -> None:
    stream = _Stream()
    _replace(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda *_, **__: None,
        empty_cache=lambda: None,
        Stream=_Stream,
        current_stream=lambda *_, **__: stream,
        default_stream=lambda *_, **__: stream,
        stream=lambda *_, **__: contextlib.nullcontext(),
        manual_seed=lambda seed: torch.default_generator.manual_seed(seed) and None,
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        set_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
    )
    _replace(torch.cuda.nvtx, range_push=lambda *_, **__: None, range_pop=lambda *_, **__: None)


def _is_cuda(device: Any) -> bool:
    return (
        isinstance(device, str)
        and device.startswith("cuda")
        or (isinstance(device, torch.device) and device.type == "cuda")
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*arguments: Any, **options: Any) -> torch.Tensor:
        if _is_cuda(options.get("device")):
            options["device"] = "cpu"
        options.pop("pin_memory", None)
        return factory(*arguments, **options)

    return make


def _replace_factories() -> None:
    # torch.device(...) as a context looks factories up by identity: it must know the real ones before they are wrapped,
    # or transformers' from_pretrained would leave buffers on the meta device and uninitialised.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        _replace(torch, **{name: _on_cpu(getattr(torch, name))})


def _replace_methods() -> None:
    tensor_type, tensor_to = torch.Tensor.type, torch.Tensor.to

    def type_name(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        result = tensor_type(self, *arguments, **options)
        return _TYPE_NAMES.get(result, result) if isinstance(result, str) else result

    def to(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if arguments and _is_cuda(arguments[0]):
            arguments = ("cpu", *arguments[1:])
        if _is_cuda(options.get("device")):
            options["device"] = "cpu"
        return tensor_to(self, *arguments, **options)

    _replace(torch.Tensor, type=type_name, to=to, cuda=lambda self, *_, **__: self)
    _replace(torch.nn.Module, cuda=lambda self, *_, **__: self)


def _replace_random_state() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    _replace(
        megatron_random,
        _get_cuda_rng_state=lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
        _set_cuda_rng_state=lambda state, device=-1, graph_safe=False: torch.set_rng_state(state),
    )


class _Done:
    """The handle of an asynchronous collective over one rank, which is complete at once."""

    def wait(self, *_: Any) -> bool:
        return True


def _skip_collectives_of_one_rank() -> None:
    """Replace collectives over one rank, which are at most a copy, but which gloo makes in threads of its own.

    Those threads open OpenMP teams, and with more teams than processors OpenMP's threads sleep between operations
    instead of spinning: each small operation of the main thread would then pay for waking them.
    """
    from megatron.core.distributed import param_and_grad_buffer

    reduce_scatter, all_gather = _with_output(dist.reduce_scatter_tensor), _with_output(dist.all_gather_into_tensor)
    _replace(
        dist,
        all_reduce=_in_place(dist.all_reduce),
        broadcast=_in_place(dist.broadcast),
        reduce_scatter_tensor=reduce_scatter,
        all_gather_into_tensor=all_gather,
    )
    _replace(param_and_grad_buffer, dist_reduce_scatter_func=reduce_scatter, dist_all_gather_func=all_gather)


def _in_place(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(*arguments: Any, **options: Any) -> Any:
        if len(arguments) != 1 or not _is_alone(options.get("group")):  # another form of call stays as it is
            return collective(*arguments, **options)
        return _Done() if options.get("async_op") else None

    return call


def _with_output(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(*arguments: Any, **options: Any) -> Any:
        if len(arguments) != 2 or not _is_alone(options.get("group")):
            return collective(*arguments, **options)
        output, source = arguments
        if output.data_ptr() != source.data_ptr():
            output.copy_(source.view_as(output))
        return _Done() if options.get("async_op") else None

    return call


def _is_alone(group: Any) -> bool:
    return isinstance(group, dist.ProcessGroup) and group.size() == 1


def _keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: activations of the same sizes are allocated again in every step.

    Otherwise each is mapped and zeroed anew, page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _LARGE_BLOCK)
