"""A remote teacher off the beaten track: batches that it is sent, jumps in the data, foreign data, running ahead."""

import time
from types import SimpleNamespace

import numpy
import pytest
import torch

from megatron_kd.teachers.interface import Action, Decision
from tests.distributed.fresh_world import run_in_fresh_world
from tests.distributed.ranks import shared_ranks
from tests.distributed.teachers.contract import assert_same, two_steps
from tests.distributed.training.runs import call_verb

DEPTH = 3


def serve_or_ask(settings, ask):
    """On rank 1 the teacher of a run; on rank 0 ``ask`` with the student's end of it."""
    from megatron_kd.config import load_config
    from megatron_kd.parallel.groups import create_process_groups
    from megatron_kd.parallel.runtime import distributed_runtime
    from megatron_kd.training import train
    from megatron_kd.training.train_config import TrainConfig
    from megatron_kd.training.training_run import ScheduledData, build_teacher, open_run

    config = load_config(TrainConfig, None, settings)
    with distributed_runtime(teacher_ranks=1) as runtime:
        run = open_run(config, runtime)
        if runtime.is_teacher:
            server = []
            build = train.build_teacher_ranks
            train.build_teacher_ranks = lambda *a, **k: server.append(build(*a, **k)) or server[0]
            try:
                train.serve_student(run)
            finally:
                train.build_teacher_ranks = build
            return server[0].started
        groups = create_process_groups(run.layout)
        teacher = build_teacher(run, groups)
        return ask(
            SimpleNamespace(config=config, teacher=teacher, data=run.data, groups=groups, batches=ScheduledData(run),
                            run=run.as_student())
        )  # fmt: skip


def step_of(parts, position):
    return [parts.batches.read(position, 0, m) for m in range(parts.batches.micro_batches)]


def local_teacher(parts):
    """The same weights on this rank, as a function of a batch."""
    from megatron_kd.checkpoints.weights import open_checkpoint
    from megatron_kd.parallel.layout import ParallelLayout
    from megatron_kd.teachers.placements import TeacherPlan, load_teacher

    plan = TeacherPlan(open_checkpoint(parts.config.teacher.path), ParallelLayout(1, 1, 1, 1))
    (model,) = load_teacher(plan, parts.run, parts.groups)

    @torch.no_grad()
    def hidden(batch):
        return model(batch.tokens, batch.position_ids, None).flatten(0, 1)

    return hidden


def off_the_beaten_track(parts):
    """Scheduled, sent, scheduled again, a jump, and data that the teacher does not have."""
    from megatron_kd.data.batch import make_batch
    from megatron_kd.errors import DataError

    teacher, expected = parts.teacher, local_teacher(parts)

    def check(batches, **options):
        teacher.begin_step(batches, **options)
        for batch in batches:
            torch.testing.assert_close(teacher.knowledge(batch).hidden, expected(batch), rtol=1e-5, atol=1e-6)

    teacher.follow(Decision(Action.CONTINUE, 0, 0))
    check(step_of(parts, 0))
    others = [make_batch(parts.data, numpy.array([3, 1 + i]), parts.data.seq_length) for i in range(3)]
    check(others, scheduled=False)
    check(step_of(parts, 1))
    teacher.follow(Decision(Action.SAVE, 2, 2))
    teacher.follow(Decision(Action.REWIND, 2, 2))
    check(step_of(parts, 2))
    teacher.follow(Decision(Action.CONTINUE, 5, 1))
    check(step_of(parts, 5))
    wrong = step_of(parts, 9)
    teacher.begin_step(wrong)
    with pytest.raises(DataError, match="sent knowledge of step 6, .* key .* same data.path"):
        teacher.knowledge(wrong[0])
    teacher.follow(Decision(Action.STOP, 7, 3))
    return True


def slow_student(parts):
    """When each micro-batch of three steps was done with, 50 ms after it was asked for."""
    ended = []
    parts.teacher.follow(Decision(Action.CONTINUE, 0, 0))
    for position in range(3):
        batches = step_of(parts, position)
        parts.teacher.begin_step(batches)
        for batch in batches:
            parts.teacher.knowledge(batch)
            time.sleep(0.05)
            ended.append(time.monotonic())
        parts.teacher.follow(Decision(Action.CONTINUE if position < 2 else Action.STOP, position + 1, position + 1))
    return ended


@pytest.fixture(scope="module")
def settings(dataset, teacher, tmp_path_factory):
    return [
        f"data.path={dataset.path}", f"teacher.path={teacher}", f"output={tmp_path_factory.mktemp('run')}",
        "model.name=qwen_toy_student", "distillation.method=vanilla_kd", "teacher.placement=remote",
        "teacher.num_ranks=1", f"teacher.prefetch_depth={DEPTH}", "training.train_iters=30",
        "training.global_batch_size=8", "training.micro_batch_size=2",
    ]  # fmt: skip


def test_sent_batches_jumps_and_foreign_data(settings):
    assert run_in_fresh_world(2, serve_or_ask, settings, off_the_beaten_track)[0]


def test_the_teacher_runs_ahead(settings):
    """It starts micro-batch i + prefetch_depth before the student is done with i."""
    keys = [*settings, "training.train_iters=3"]
    ended, started = run_in_fresh_world(2, serve_or_ask, keys, slow_student)
    begins = [moment for *_, moment in started]
    assert len(begins) == len(ended) == 12, "each once, none beyond the last step"
    for i in range(1, len(ended) - DEPTH):
        assert begins[i + DEPTH] < ended[i], i


@pytest.mark.parametrize(
    ("payload", "layout"),
    [
        ("top_k", ["parallel.tensor_model_parallel_size=2", "teacher.pipeline_model_parallel_size=2"]),
        ("sampled", ["parallel.pipeline_model_parallel_size=2", "teacher.tensor_model_parallel_size=2"]),
    ],
)
def test_sparse_payloads_are_what_a_cache_holds(payload, layout, dataset, teacher, tmp_path):
    """Losses and gradients of a remote payload, under another layout, equal those with a cache of the same settings."""
    common = [f"data.path={dataset.path}", "distillation.temperature=1.5"]
    keys = [f"data.path={dataset.path}", f"teacher.path={teacher}", f"output={tmp_path / 'cache'}",
            f"codec={payload}", "top_k=20", "num_draws=30", "temperature=1.5"]  # fmt: skip
    shared_ranks(1).run(
        call_verb, "megatron_kd.teachers.cache_teacher_logits", "CacheTeacherLogitsConfig", keys, timeout=300
    )
    cached = [*common, "teacher.placement=cached", f"teacher.cache_path={tmp_path / 'cache'}"]
    remote = [*common, "teacher.placement=remote", f"teacher.path={teacher}", "teacher.num_ranks=2",
              f"teacher.payload={payload}", "teacher.top_k=20", "teacher.num_draws=30"]  # fmt: skip
    expected = two_steps(1, cached, tmp_path / "cached")
    # A cache keeps probabilities in 16 or 10 bits, a payload all of them. Another layout rounds otherwise: a few of the
    # 30,720 draws may so fall to the next id, each of which moves the gradients by about 0.1%.
    assert_same(two_steps(4, [*remote, *layout], tmp_path / "remote"), expected, 1e-2 if payload == "sampled" else 3e-2)
