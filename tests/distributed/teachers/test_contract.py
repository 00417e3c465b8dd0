"""Every placement under every pair of layouts gives the losses and gradients of one process.

Student and teacher are filled up with data parallelism to four ranks each way (DP2 of the student: to two).
``make test`` runs the cells of PAIRWISE, ``make test-slow`` all.
"""

import dataclasses
from unittest.mock import patch

import pytest

from tests.distributed.ranks import shared_ranks
from tests.distributed.teachers.contract import assert_same, two_steps
from tests.distributed.training.runs import make_dataset

STUDENTS = {
    "TP1 PP1": (4, {}),
    "TP2": (4, {"tensor": 2}),
    "PP2": (4, {"pipeline": 2}),
    "TP2 PP2": (4, {"tensor": 2, "pipeline": 2}),
    "PP2 VPP2": (4, {"pipeline": 2, "virtual": 2}),
    "DP2": (2, {}),
    "CP2": (2, {"context": 2}),
    "PP2 CP2": (4, {"pipeline": 2, "context": 2}),
}
TEACHERS = {"same": None, "TP1 PP1": (1, 1), "TP2": (2, 1), "PP2": (1, 2)}
PAIRWISE = {
    ("TP1 PP1", "TP2"), ("TP1 PP1", "PP2"), ("TP2", "TP1 PP1"), ("TP2", "PP2"), ("PP2", "same"), ("PP2", "TP2"),
    ("TP2 PP2", "PP2"), ("PP2 VPP2", "TP1 PP1"), ("DP2", "TP2"), ("DP2", "PP2"), ("CP2", "same"), ("CP2", "TP2"),
}  # fmt: skip
NAMES = {"tensor": "tensor_model_parallel_size", "pipeline": "pipeline_model_parallel_size",
         "virtual": "virtual_pipeline_model_parallel_size", "context": "context_parallel_size"}  # fmt: skip
RATIO_INTERVAL = "metrics.kd_lm_gradient_ratio_interval"
MICRO_BATCHES = 8  # in the world and a step


def cells():
    for student in STUDENTS:
        for teacher in TEACHERS:
            marks = [] if (student, teacher) in PAIRWISE else [pytest.mark.slow]
            yield pytest.param(student, teacher, marks=marks, id=f"{student}, teacher {teacher}")


def keys_of(student, teacher):
    keys = [f"parallel.{NAMES[name]}={size}" for name, size in STUDENTS[student][1].items()]
    if TEACHERS[teacher] is not None:
        tensor, pipeline = TEACHERS[teacher]
        keys += [f"teacher.{NAMES['tensor']}={tensor}", f"teacher.{NAMES['pipeline']}={pipeline}"]
    return keys


@pytest.fixture(scope="module")
def common(dataset, teacher):
    return [f"data.path={dataset.path}", f"teacher.path={teacher}"]


@pytest.fixture(scope="module")
def reference(common, tmp_path_factory):
    keys = ["teacher.placement=colocated"]
    return two_steps(1, [*common, *keys], tmp_path_factory.mktemp("reference") / "run")


@pytest.mark.parametrize(("student", "teacher_layout"), list(cells()))
def test_colocated(student, teacher_layout, common, reference, tmp_path):
    keys = ["teacher.placement=colocated", *keys_of(student, teacher_layout)]
    ours = two_steps(STUDENTS[student][0], [*common, *keys], tmp_path / "run")
    assert_same(ours, reference)
    passes = [answer["passes"] for answer in ours["answers"] if answer["replica"][1:] == (0, 0)]
    assert sum(passes) == 2 * MICRO_BATCHES, "each micro-batch goes through the teacher once in the world"
    assert all(answer["trainable_teacher_parameters"] == 0 for answer in ours["answers"])


REMOTE_PAIRWISE = {
    ("TP1 PP1", "TP1 PP1"), ("TP1 PP1", "TP2"), ("TP2", "TP1 PP1"), ("TP2", "PP2"), ("PP2", "TP2"), ("PP2", "TP1 PP1"),
    ("PP2 VPP2", "PP2"), ("CP2", "TP2"),
}  # fmt: skip


def remote_cells():
    """Two ranks of the teacher behind two of the student; four behind four for the student that needs four."""
    for student in STUDENTS:
        ranks = 4 if student in ("TP2 PP2", "PP2 CP2") else 2
        for teacher in TEACHERS:
            if student == "DP2":
                continue  # TP1 PP1 on two ranks is DP2
            marks = [] if (student, teacher) in REMOTE_PAIRWISE else [pytest.mark.slow]
            yield pytest.param(student, teacher, ranks, marks=marks, id=f"{student}, teacher {teacher}")


def remote_keys(student, teacher, teacher_ranks):
    sizes = STUDENTS[student][1]
    tensor, pipeline = TEACHERS[teacher] or (sizes.get("tensor", 1), sizes.get("pipeline", 1))
    keys = [f"parallel.{NAMES[name]}={size}" for name, size in sizes.items()]
    keys += [f"teacher.{NAMES['tensor']}={tensor}", f"teacher.{NAMES['pipeline']}={pipeline}"]
    return [*keys, "teacher.placement=remote", f"teacher.num_ranks={teacher_ranks}"]


@pytest.mark.parametrize(("student", "teacher_layout", "ranks"), list(remote_cells()))
def test_remote(student, teacher_layout, ranks, common, reference, tmp_path):
    teacher_ranks = 4 if teacher_layout == "same" and ranks == 4 else 2
    keys = remote_keys(student, teacher_layout, teacher_ranks)
    ours = two_steps(ranks + teacher_ranks, [*common, *keys], tmp_path / "run")
    assert_same(ours, reference)
    teachers = ours["answers"][ranks:]
    assert sum(answer["passes"] for answer in teachers if answer["replica"][1:] == (0, 0)) == 2 * MICRO_BATCHES
    assert all(answer["trainable_teacher_parameters"] == 0 for answer in teachers)


@pytest.mark.parametrize(
    ("student", "teacher_layout", "more"),
    [
        ("PP2", "TP2", []),
        ("TP2", "TP2", ["parallel.sequence_parallel=true"]),
        ("TP2 PP2", "same", ["parallel.sequence_parallel=true"]),
        ("TP1 PP1", "TP2", ["parallel.overlap_grad_reduce=true"]),
    ],
)
def test_small_stashes_and_sequence_parallelism(student, teacher_layout, more, common, reference, tmp_path):
    """A stash of one micro-batch: waves of one each, the others wait in host memory."""
    item_bytes = 2 * 32 * 64 * 4
    keys = ["teacher.placement=colocated", *keys_of(student, teacher_layout), *more]
    ours = two_steps(4, [*common, *keys], tmp_path / "run", stash_bytes=2 * item_bytes)
    assert_same(ours, reference)
    stashes = [answer["stash"] for answer in ours["answers"]]
    assert max(stash["peak_device_bytes"] for stash in stashes) == item_bytes
    if "PP2" in student:
        assert max(stash["peak_host_bytes"] for stash in stashes) >= 3 * item_bytes


@pytest.mark.parametrize(
    "keys",
    [
        ["distillation.divergence=jsd", "distillation.temperature=2.0", "distillation.kd_ratio=0.7"],
        pytest.param(
            ["distillation.divergence=reverse_kl", "distillation.kd_ratio=1.0", f"{RATIO_INTERVAL}=null"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["distillation.divergence=skew_reverse_kl"], marks=pytest.mark.slow),
        pytest.param(["distillation.divergence=tvd"], marks=pytest.mark.slow),
    ],
)
def test_divergences_mixing_and_temperature(keys, common, tmp_path):
    common = [*common, "teacher.placement=colocated", *keys]
    expected = two_steps(1, common, tmp_path / "one")
    assert_same(two_steps(4, [*common, *keys_of("TP2 PP2", "TP2")], tmp_path / "four"), expected)


def test_uneven_pipelines_of_a_student(common, reference, tmp_path):
    """Three layers on the first stage, one beside the loss and the teacher's head."""
    keys = ["teacher.placement=colocated", *keys_of("PP2", "TP2"), "parallel.num_layers_in_last_pipeline_stage=1"]
    assert_same(two_steps(4, [*common, *keys], tmp_path / "run"), reference)


def train_wide_here(settings):
    """Train a model with more ids than the tokenizer has, as published checkpoints have."""
    from megatron_kd.models.architecture import ModelArchitecture
    from tests.distributed.training.runs import train_here

    with patch.object(ModelArchitecture, "with_vocab_size", lambda self, _: dataclasses.replace(self, vocab_size=436)):
        train_here(settings)


@pytest.fixture(scope="module")
def wide_teacher(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide") / "run"
    keys = ["model.name=qwen_toy_reference", "training.train_iters=5", "training.global_batch_size=8"]
    shared_ranks(1).run(train_wide_here, [f"data.path={dataset.path}", f"output={folder}", *keys], timeout=300)
    return folder


@pytest.mark.parametrize("placement", ["colocated", pytest.param("remote", marks=pytest.mark.slow)])
def test_vocabularies_that_differ_in_unused_ids(placement, dataset, wide_teacher, tmp_path):
    """436 ids of the teacher in 512 rows, 300 of the student in 384: the common ones are compared."""
    common = [f"data.path={dataset.path}", f"teacher.path={wide_teacher}"]
    expected = two_steps(1, [*common, "teacher.placement=colocated"], tmp_path / "one")
    if placement == "colocated":
        keys = ["teacher.placement=colocated", *keys_of("TP2 PP2", "PP2")]
    else:
        keys = remote_keys("TP2", "PP2", 2)
    assert_same(two_steps(4, [*common, *keys], tmp_path / "four"), expected)


@pytest.mark.parametrize(
    "keys",
    [
        ["teacher.placement=colocated", *keys_of("TP2 PP2", "PP2")],
        remote_keys("TP1 PP1", "TP2", 2),
        pytest.param(remote_keys("PP2", "TP1 PP1", 2), marks=pytest.mark.slow),
    ],
)
def test_validation(keys, common, dataset, tmp_path):
    """Held-out distillation loss, with 96 chunks that do not divide by ranks and micro-batches, in between steps."""
    common = [*common, f"data.eval_path={dataset.path}", "training.eval_interval=1", "training.micro_batch_size=4"]
    (first, last), (ours_first, ours_last) = (
        two_steps(world, [*common, *more], tmp_path / str(world))["evaluations"]
        for world, more in ((1, ["teacher.placement=colocated"]), (4, keys))
    )
    assert first["eval_kd_loss"] > 0 and first["eval_kd_loss"] != last["eval_kd_loss"]
    for row, expected in ((ours_first, first), (ours_last, last)):
        for key in ("eval_loss", "eval_kd_loss", "eval_teacher_entropy"):
            assert row[key] == pytest.approx(expected[key], rel=1e-4), key


@pytest.mark.slow
def test_validation_with_an_interleaved_pipeline_and_an_odd_number_of_micro_batches(common, tmp_path):
    """20 held-out chunks are three micro-batches of four for each of two data-parallel ranks."""
    heldout = make_dataset(tmp_path / "heldout", chunks=20)
    common = [*common, f"data.eval_path={heldout.path}", "training.micro_batch_size=4", "teacher.placement=colocated"]
    (expected,) = two_steps(1, common, tmp_path / "one")["evaluations"]
    (ours,) = two_steps(4, [*common, *keys_of("PP2 VPP2", "TP1 PP1")], tmp_path / "four")["evaluations"]
    for key in ("eval_loss", "eval_kd_loss", "eval_teacher_entropy"):
        assert ours[key] == pytest.approx(expected[key], rel=1e-4), key
