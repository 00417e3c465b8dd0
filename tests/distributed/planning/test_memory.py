"""The plan's memory against the bytes of the tensors of a real step, by category, on every rank of several layouts."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from megatron_kd.costs.memory import (
    STASH_BYTES,
    loss_tile_bytes,
    rank_parameters,
    student_memory,
    teacher_layout,
    teacher_memory,
    waiting_micro_batches,
)
from megatron_kd.models.architecture import architecture_by_name
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import train_in_ranks
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset
from tests.reference.tensor_bytes import measure_step

REPOSITORY = Path(__file__).resolve().parents[3]
WITHIN = 0.10
VOCABULARY, SEQ_LENGTH = 3000, 128
BATCH, MICRO_BATCH = 16, 2
T, P, S, V, C = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.sequence_parallel",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size",
)
AS_STUDENT = (None, None)
CASES = {
    "one rank": (1, {}, AS_STUDENT),
    "TP2": (2, {T: 2}, AS_STUDENT),
    "TP2 SP": (2, {T: 2, S: True}, AS_STUDENT),
    "PP2": (2, {P: 2}, AS_STUDENT),
    "PP2 VPP2": (2, {P: 2, V: 2}, AS_STUDENT),
    "DP2": (2, {}, AS_STUDENT),
    "CP2": (2, {C: 2}, AS_STUDENT),
    "TP2, teacher PP2": (2, {T: 2}, (1, 2)),
    "PP2, teacher TP2": (2, {P: 2}, (2, 1)),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """16 full chunks of ids below 3,000."""
    generator = numpy.random.default_rng(0)
    chunks = (generator.integers(1, VOCABULARY, SEQ_LENGTH + 1) for _ in range(BATCH))
    folder = tmp_path_factory.mktemp("rows") / "chunks"
    return write_chunk_dataset(folder, chunks, plain_tokenizer_info(VOCABULARY, 0), SEQ_LENGTH)


@pytest.fixture(scope="module")
def big_teacher(rows, tmp_path_factory):
    """The run folder of a toy teacher over the same vocabulary."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train_in_ranks(
        "TP1 PP1",
        [
            f"data.path={rows.path}",
            "model.name=qwen_toy_teacher",
            "training.train_iters=1",
            "training.global_batch_size=2",
            "training.micro_batch_size=2",
        ],
        folder,
    )
    return folder


def assert_within(planned, measured, what):
    assert planned == pytest.approx(measured, rel=WITHIN, abs=0.01), f"{what}: {planned:.0f} planned, {measured:.0f}"


@pytest.mark.parametrize(
    ("case", "precision"), [*((case, "bf16") for case in CASES), ("one rank", "fp32"), ("DP2", "fp32")]
)
def test_every_part_is_within_ten_per_cent(case, precision, rows, big_teacher, tmp_path):
    world, keys, teacher_keys = CASES[case]
    with_teacher = precision == "bf16" and V not in keys
    settings = [
        f"data.path={rows.path}",
        f"output={tmp_path}",
        "model.name=qwen_toy_student",
        f"training.global_batch_size={BATCH}",
        f"training.micro_batch_size={MICRO_BATCH}",
        f"training.precision={precision}",
        *(f"{key}={str(value).lower()}" for key, value in keys.items()),
    ]
    if with_teacher:
        settings += [
            f"teacher.{name}_model_parallel_size={size}"
            for name, size in zip(("tensor", "pipeline"), teacher_keys)
            if size
        ]
        settings += ["distillation.method=vanilla_kd", "teacher.placement=colocated", f"teacher.path={big_teacher}"]
    measured = shared_ranks(world).run(measure_step, settings)
    parallel = ParallelConfig(**{key.split(".")[1]: value for key, value in keys.items()})
    layout = ParallelLayout.for_world(parallel, world)
    own = teacher_layout(layout, *teacher_keys)
    student = architecture_by_name("qwen_toy_student").with_vocab_size(VOCABULARY)
    teacher = architecture_by_name("qwen_toy_teacher").with_vocab_size(VOCABULARY)
    sizes = {
        "precision": precision,
        "micro_batch_size": MICRO_BATCH,
        "seq_length": SEQ_LENGTH,
        "micro_batches": layout.micro_batches(BATCH, MICRO_BATCH),
    }
    for rank, found in enumerate(measured):
        stage = layout.coordinates(rank).pipeline
        planned = student_memory(student, layout, stage, fused=False, device="cpu", **sizes)
        where = f"{case}, rank {rank}"
        assert_within(planned.weights, found["weights"], f"{where}, weights")
        assert_within(planned.gradients, found["gradients"], f"{where}, gradients")
        assert_within(planned.optimizer, found["optimizer"], f"{where}, optimizer")
        hidden = MICRO_BATCH * SEQ_LENGTH // layout.context * student.hidden_size * (2 if precision == "bf16" else 4)
        last = stage == layout.pipeline - 1
        if precision == "bf16":  # fp32 attention is blocked on a CPU and keeps other tensors
            assert_within(planned.activations + (hidden if last else 0), found["saved"], f"{where}, activations")
        if last and precision == "fp32":
            chunks = loss_tile_bytes(student, layout, MICRO_BATCH * SEQ_LENGTH, precision, 1, "cpu")
            assert_within(chunks, found["loss_tiles"], f"{where}, loss")
        if with_teacher:
            frozen = teacher_memory(teacher, layout, own, rank, **sizes)
            assert_within(frozen.teacher_weights, found["teacher_weights"], f"{where}, teacher's weights")
            states = MICRO_BATCH * SEQ_LENGTH * teacher.hidden_size * 2
            waiting = waiting_micro_batches(layout, own, states, sizes["micro_batches"], STASH_BYTES) if last else 0
            assert_within(waiting * states / layout.context, found["waiting"], f"{where}, hidden states that wait")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_total_is_within_ten_per_cent_of_the_peak_on_a_gpu(rows, tmp_path):
    """``max_memory_allocated`` of a step in a process of its own; layers of 200M, so that little else counts."""
    settings = [
        f"data.path={rows.path}",
        f"output={tmp_path}",
        "model.name=qwen_200m",
        "training.precision=bf16",
        f"training.global_batch_size={BATCH}",
        f"training.micro_batch_size={BATCH}",
    ]
    code = (
        "import sys; from tests.reference.tensor_bytes import measure_step\nprint(measure_step(sys.argv[1:])['peak'])"
    )
    ended = subprocess.run([sys.executable, "-c", code, *settings], capture_output=True, text=True, cwd=REPOSITORY)
    assert ended.returncode == 0, ended.stderr
    student = architecture_by_name("qwen_200m").with_vocab_size(VOCABULARY)
    layout = ParallelLayout.for_world(ParallelConfig(), 1)
    planned = student_memory(
        student, layout, 0, precision="bf16", micro_batch_size=BATCH, seq_length=SEQ_LENGTH, micro_batches=1
    )
    assert_within(planned.total, float(ended.stdout.split()[-1]), "peak")


def test_the_parameters_of_all_ranks_are_the_model():
    student = architecture_by_name("qwen_1.2b")  # untied, nothing twice
    layout = ParallelLayout.for_world(ParallelConfig(pipeline_model_parallel_size=4), 4)
    total = sum(rank_parameters(student, layout, stage) for stage in range(4))
    assert total == student.parameters  # 151,936 rows need no padding
    assert sum(rank_parameters(student, layout, stage, (7, 7, 7, 3)) for stage in range(4)) == total
