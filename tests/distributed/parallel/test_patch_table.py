"""Every fault in the table of patches is still there. One that Megatron-Core has fixed fails here: its entry can go."""

import copy
import inspect
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
    param_and_grad_buffer,
)
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_kd.checkpoints.sharded_state import sharding_metadata
from megatron_kd.models import gpt
from megatron_kd.models.gpt import build_model
from megatron_kd.models.parameters import initialize_weights
from megatron_kd.parallel.groups import create_process_groups, is_last_stage
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.mcore_patches import cpu_backend
from megatron_kd.parallel.mcore_patches.patch_table import PATCHES, as_markdown
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.parallel.schedule import run_schedule
from megatron_kd.training import optimizer as training_optimizer
from megatron_kd.training.optimizer import OptimizerConfig, build_optimizer
from tests.distributed.models.whole_weights import ARCHITECTURE
from tests.distributed.ranks import shared_ranks
from tests.reference.one_rank import one_rank_groups, tiny_model

REPOSITORY = Path(__file__).resolve().parents[3]


def numbers(text: str) -> tuple[int, ...]:
    """``0.16.1`` as (0, 16, 1)."""
    return tuple(int(part) for part in text.split(".")[:3])


INSTALLED = numbers(version("megatron-core"))


class Operations(TorchDispatchMode):
    """Counts torch's operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


class Unpatched:
    """A small model and its optimizer as Megatron-Core builds them, without the remedies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bucket_size: int | None = None) -> None:
        monkeypatch.setattr(training_optimizer, "patch_optimizer", lambda *_: None)
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=bucket_size is not None,
            bucket_size=bucket_size,
        )
        self.chunk, groups = tiny_model(), one_rank_groups()
        self.model = DistributedDataParallel(self.chunk.config, settings, self.chunk, pg_collection=groups)
        config = OptimizerConfig(weight_decay=0.3, weight_decay_on_norms_and_biases=False)
        self.optimizer = build_optimizer(config, [self.model], groups, bf16=False)
        (self.part,) = self.optimizer.chained_optimizers

    def step(self) -> None:
        """One update, with gradients that differ everywhere."""
        for parameter in self.chunk.parameters():
            parameter.main_grad.copy_(torch.arange(parameter.numel()).view_as(parameter) % 7 - 3)
        self.optimizer.prepare_grads()
        self.optimizer.step_with_ready_grads()


def adam_fresh_state(monkeypatch):
    return raises(AssertionError, Unpatched(monkeypatch).part.state_dict)


def adam_missing_step(monkeypatch):
    made = Unpatched(monkeypatch)
    made.step()
    parameter = next(made.chunk.parameters())
    tensors = made.part._get_main_param_and_optimizer_states(parameter)
    stored = {name: tensor for name, tensor in tensors.items() if name != "step"}
    with torch.no_grad():
        return raises(KeyError, lambda: made.part._set_main_param_and_optimizer_states(parameter, stored))


def adam_shared_step(monkeypatch):
    made = Unpatched(monkeypatch)
    made.step()
    made.part.load_state_dict(made.part.state_dict())
    steps = {state["step"].data_ptr() for state in made.part.optimizer.state.values()}
    return len(steps) == 1 < len(made.part.optimizer.state)


def bucket_padding(monkeypatch):
    made = Unpatched(monkeypatch, bucket_size=2000)
    made.step()
    state = made.part.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
    for index, buffer in enumerate(made.part.buffers):
        (saved,) = (entry["exp_avg"] for entry in state[index].values())
        for parameter, (start, end, *_) in buffer.param_index_map.items():
            own = made.part._get_main_param_and_optimizer_states(parameter)["exp_avg"].flatten()
            if not torch.equal(saved[start:end], own):
                return True
    return False


def weight_decay_multiplier(monkeypatch):
    groups = Unpatched(monkeypatch).optimizer.param_groups
    return any(group["wd_mult"] == 0 and group["weight_decay"] != 0 for group in groups)


def unfused_adam(monkeypatch):
    return not Unpatched(monkeypatch).part.optimizer.defaults.get("fused")


def scaled_gradient_copies(monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    with Operations() as seen:
        clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=2.0)
    return any(name.startswith("aten.mul.") for name in seen.names)


def one_rank_collectives(monkeypatch):
    made, calls = Unpatched(monkeypatch), []
    monkeypatch.setattr(param_and_grad_buffer, "dist_reduce_scatter_func", lambda *_, group, **__: calls.append(group))
    made.model.finish_grad_sync()
    return any(group.size() == 1 for group in calls)


def world_collectives(monkeypatch):
    groups = []
    original = dist.all_gather_object
    monkeypatch.setattr(
        dist, "all_gather_object", lambda *a, group=None: (groups.append(group), original(*a, group=group))
    )
    Unpatched(monkeypatch)
    return None in groups


def sharding_attributes(monkeypatch):
    monkeypatch.setattr(gpt, "mark_sharded_weights", lambda _: None)
    layers = [module for module in tiny_model().modules() if isinstance(module, ColumnParallelLinear)]
    return any(layer.weight is not None and not hasattr(layer.weight, "tensor_model_parallel") for layer in layers)


def llama3_rope_bounds(monkeypatch):
    names = {name for kind in (GPTModel, RotaryEmbedding) for name in inspect.signature(kind).parameters}
    return "rope_scaling_factor" in names and not any("low_freq" in name for name in names)


def unfused_swiglu(monkeypatch):
    mlp = tiny_model().decoder.layers[0].mlp
    del mlp.activation_func
    mlp.activation_func, mlp.config.use_te_activation_func = torch.nn.functional.silu, False
    with Operations() as seen:
        mlp(torch.ones(2, 1, 32))
    return any(name.startswith("aten.add.") for name in seen.names)


def norm_sequence_parallel(monkeypatch):
    config = copy.copy(tiny_model().config)
    config.sequence_parallel = True
    return raises(AssertionError, lambda: WrappedTorchNorm(config, 32))


def attention_workspace(monkeypatch):
    model = tiny_model()
    attention = DotProductAttention(model.config, 1, AttnMaskType.causal, "self", pg_collection=model.pg_collection)
    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", None)
    query, key = torch.ones(3, 1, 4, 8), torch.ones(3, 1, 2, 8)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    return raises(AssertionError, lambda: attention(query, key, key, mask))


def mlp_spec(monkeypatch):
    return isinstance(get_gpt_layer_local_spec(normalization="RMSNorm").submodules.mlp, ModuleSpec)


def inference_mode(monkeypatch):
    from megatron.core.inference import utils

    return not hasattr(utils, "InferenceMode")


def save_in_memory(monkeypatch):
    resolved = []

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item):
            resolved.append(write_item)
            return super().resolve_data(write_item)

    planner, writer = Planner(), FileSystemWriterAsync("unused", thread_count=1)
    planner.set_up_planner({"a": torch.ones(3), "b": torch.ones(4)}, is_coordinator=True)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    writer.prepare_write_data(plan, planner)
    return len(resolved) == 2


IN_A_FRESH_PROCESS = """
import json, sys
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
try:
    model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    needs_cuda = False
except Exception:
    needs_cuda = True
print(json.dumps({"cuda": needs_cuda, "unfused_rotary": rope_utils.fused_apply_rotary_pos_emb is None}))
"""


@pytest.fixture(scope="module")
def fresh_process():
    """What a process finds in which nothing has been replaced."""
    command = [sys.executable, "-W", "ignore", "-c", IN_A_FRESH_PROCESS]
    return json.loads(subprocess.run(command, check=True, timeout=300, stdout=subprocess.PIPE).stdout)


def pipelined(**keys):
    """Model chunks of a two-rank layout, with weights."""
    cpu_backend.install()
    layout = ParallelLayout.for_world(ParallelConfig(**keys), dist.get_world_size())
    groups = create_process_groups(layout)
    chunks = build_model(
        ARCHITECTURE, layout, groups, precision="fp32", device=torch.device("cpu"), max_sequence_length=32
    )
    for chunk in chunks:
        initialize_weights(chunk, ARCHITECTURE.init_std, seed=1)
    return chunks, groups


def interleaved_p2p() -> bool:
    chunks, groups = pipelined(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    items = [torch.arange(16).view(1, 16) + number for number in range(4)]

    def step(iterator, chunk):
        hidden = chunk(next(iterator), torch.arange(16).view(1, 16), None)
        return hidden, lambda output: (output.square().sum(), torch.tensor(1), {})

    def gradients() -> list[torch.Tensor]:
        for chunk in chunks:
            chunk.zero_grad()
        run_schedule(chunks, groups, step, items, seq_length=16, micro_batch_size=1)
        parameters = (parameter for chunk in chunks for parameter in chunk.parameters())
        return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    right = gradients()
    assert all(torch.equal(*pair) for pair in zip(right, gradients(), strict=True))
    for chunk in chunks:
        chunk.config.overlap_p2p_comm, chunk.config.batch_p2p_comm = False, True
    return any(not torch.allclose(*pair, rtol=1e-3) for pair in zip(right, gradients(), strict=True))


def tied_output_replica() -> bool:
    (chunk,), groups = pipelined(pipeline_model_parallel_size=2)
    if not is_last_stage(groups):
        return False
    return raises(AssertionError, lambda: chunk.sharded_state_dict(metadata=sharding_metadata(groups)))


def sequence_parallel_workspace() -> bool:
    groups = create_process_groups(ParallelLayout.for_world(ParallelConfig(tensor_model_parallel_size=2), 2))
    buffer, parallel_state._GLOBAL_MEMORY_BUFFER = parallel_state._GLOBAL_MEMORY_BUFFER, None
    try:
        return raises(
            AssertionError,
            lambda: gather_from_sequence_parallel_region(torch.ones(2, 2), group=groups.tp, use_global_buffer=True),
        )
    finally:
        parallel_state._GLOBAL_MEMORY_BUFFER = buffer


def overlapped_gather() -> bool:
    (chunk,), groups = pipelined()
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    model = DistributedDataParallel(chunk.config, settings, chunk, pg_collection=groups)
    optimizer = build_optimizer(OptimizerConfig(), [model], groups, bf16=False)
    finalize_model_grads([model], None, pg_collection=groups)
    for parameter in chunk.parameters():
        parameter.main_grad.fill_(1.0)
    optimizer.prepare_grads()
    optimizer.step_with_ready_grads()
    mine = torch.cat([parameter.detach().flatten() for parameter in chunk.parameters()])
    theirs = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(theirs, mine)
    return not torch.equal(*theirs)


def raises(kind: type[Exception], action) -> bool:
    """Whether ``action`` fails in this way."""
    try:
        action()
    except kind:
        return True
    return False


HERE = (
    adam_fresh_state, adam_missing_step, adam_shared_step, bucket_padding, weight_decay_multiplier, unfused_adam,
    scaled_gradient_copies, one_rank_collectives, world_collectives, sharding_attributes, llama3_rope_bounds,
    unfused_swiglu, norm_sequence_parallel, attention_workspace, mlp_spec, inference_mode, save_in_memory,
)  # fmt: skip
ON_TWO_RANKS = (interleaved_p2p, tied_output_replica, sequence_parallel_workspace, overlapped_gather)
IN_FRESH = ("cuda", "unfused_rotary")


def check(name: str, is_there: bool) -> None:
    """Compare with the table."""
    patch = PATCHES[name]
    expected = patch.fixed_in is None or INSTALLED < numbers(patch.fixed_in)
    assert is_there == expected, (
        f"Megatron-Core {version('megatron-core')}: '{patch.fault}' is {'there again' if is_there else 'gone'}: "
        f"correct its entry, and remove {patch.remedy} once no supported version needs it"
    )


@pytest.mark.parametrize("probe", HERE, ids=lambda probe: probe.__name__)
def test_still_wrong(probe, monkeypatch):
    with distributed_runtime():
        check(probe.__name__, probe(monkeypatch))


@pytest.mark.parametrize("probe", ON_TWO_RANKS, ids=lambda probe: probe.__name__)
def test_still_wrong_on_two_ranks(probe):
    check(probe.__name__, any(shared_ranks(2).run(probe)))


@pytest.mark.parametrize("name", IN_FRESH)
def test_still_wrong_in_a_fresh_process(name, fresh_process):
    check(name, fresh_process[name])


def test_every_entry_is_checked():
    assert {*(probe.__name__ for probe in (*HERE, *ON_TWO_RANKS)), *IN_FRESH} == set(PATCHES)


@pytest.mark.parametrize("name", PATCHES)
def test_remedies_are_where_the_table_says(name):
    path, _, symbol = PATCHES[name].remedy.partition(": ")
    assert symbol and symbol in (REPOSITORY / "megatron_kd" / path).read_text("utf-8")


def test_the_page_has_the_table():
    assert as_markdown() in (REPOSITORY / "docs/architecture.md").read_text("utf-8")
