"""Every method trains under every layout as on one rank, and resumes after a kill as if it had never stopped."""

import shutil

import pytest

from megatron_kd.errors import ConfigError
from megatron_kd.metrics.tracker import read_metrics
from tests.distributed.fresh_world import run_in_fresh_world
from tests.distributed.ranks import RankError
from tests.distributed.training.runs import largest_relative_difference, make_dataset, train_here, train_in_ranks

TOLERANCE = 2e-4
COMMON = [
    "model.name=qwen_toy_student",
    "training.train_iters=6",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "optimizer.lr_warmup_iters=1",
    "optimizer.lr=2e-3",
    "teacher.placement=colocated",
    "distillation.rollout.prompt_length=12",
]
METHODS = {
    "gkd": ["distillation.method=gkd", "distillation.gkd.student_fraction=0.5", "distillation.gkd.seq_kd=true"],
    "distillm": [
        "distillation.method=distillm",
        "distillation.distillm.initial_threshold=0.9",
        "distillation.distillm.replay_capacity=16",
        "distillation.pretraining_weight=0.5",
        "training.eval_interval=2",
    ],
    "minillm": [
        "distillation.method=minillm",
        "distillation.pretraining_weight=1",
        "distillation.minillm.inner_epochs=2",
    ],
    "minillm released": [
        "distillation.method=minillm",
        "distillation.minillm.variant=released",
        "distillation.minillm.teacher_mix=0",
    ],
}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "chunks")


@pytest.fixture(scope="session")
def teacher(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train_in_ranks("TP1 PP1", [f"data.path={dataset.path}", "model.name=qwen_toy_reference", "training.train_iters=15"],
                   folder)  # fmt: skip
    return folder


def settings(method, dataset, teacher):
    paths = [f"data.path={dataset.path}", f"data.eval_path={dataset.path}", f"teacher.path={teacher}"]
    return [*paths, *COMMON, *METHODS[method]]


def steps_of(rows):
    return [row for row in rows if "loss" in row]


@pytest.fixture(scope="session")
def one_rank(dataset, teacher, tmp_path_factory):
    """Steps and folder of each method's one-rank run, computed at first use."""
    runs = {}

    def run(method):
        if method not in runs:
            folder = tmp_path_factory.mktemp("one-rank") / "run"
            runs[method] = steps_of(train_in_ranks("TP1 PP1", settings(method, dataset, teacher), folder)), folder
        return runs[method]

    return run


def assert_same(ours, reference):
    assert [row["origin"] for row in ours] == [row["origin"] for row in reference]
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in reference]
    for key in ("kd_loss", "grad_norm"):
        assert largest_relative_difference(ours, reference, key) < TOLERANCE, key
    for a, b in zip(ours, reference):
        assert a["loss"] == pytest.approx(b["loss"], rel=TOLERANCE, abs=TOLERANCE)
        assert a["train_flops"] == b["train_flops"]


@pytest.mark.parametrize(
    ("method", "layout"),
    [*((method, layout) for method in METHODS for layout in ("TP2", "PP2")), ("minillm released", "DP2")],
)
def test_layout_agrees_with_one_rank(layout, method, one_rank, dataset, teacher, tmp_path):
    ours = train_in_ranks(layout, settings(method, dataset, teacher), tmp_path / "run")
    assert_same(steps_of(ours), one_rank(method)[0])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["DP2", "TP2 SP", "PP2 VPP2", "DP2 overlapped", "TP2 PP2"])
@pytest.mark.parametrize("method", METHODS)
def test_other_layouts_agree_with_one_rank(layout, method, one_rank, dataset, teacher, tmp_path):
    ours = train_in_ranks(layout, settings(method, dataset, teacher), tmp_path / "run")
    assert_same(steps_of(ours), one_rank(method)[0])


REMOTE = {
    "gkd": ["distillation.method=gkd", "distillation.gkd.student_fraction=0.5"],
    "distillm": METHODS["distillm"],
    "minillm released": METHODS["minillm released"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layout"),
    [
        ("gkd", ["parallel.tensor_model_parallel_size=2", "teacher.pipeline_model_parallel_size=2"]),
        ("distillm", ["parallel.pipeline_model_parallel_size=2", "teacher.tensor_model_parallel_size=2"]),
        ("minillm released", ["teacher.pipeline_model_parallel_size=2"]),
        ("minillm released", ["parallel.pipeline_model_parallel_size=2", "teacher.tensor_model_parallel_size=2"]),
    ],
)
def test_a_teacher_on_ranks_of_its_own_agrees_with_a_colocated_one(layout, method, dataset, teacher, tmp_path):
    """Generated text travels to two ranks, the teacher's knowledge comes back to two others; DP2 with MiniLLM."""
    common = [key for key in settings("gkd", dataset, teacher) if key not in METHODS["gkd"]] + REMOTE[method]
    expected = steps_of(train_in_ranks("TP1 PP1", common, tmp_path / "colocated"))
    remote = [*common, "teacher.placement=remote", "teacher.num_ranks=2", *layout, f"output={tmp_path / 'remote'}"]
    run_in_fresh_world(4, train_here, remote)
    ours = steps_of(read_metrics(tmp_path / "remote"))
    assert_same(ours, expected)
    assert {row["origin"] for row in ours} & {"student", "replay"}


TIMES = {"step_seconds", "tokens_per_second", "tflops_per_second", "memory_bytes", "seconds"}


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.mark.parametrize(("method", "layout"), [("gkd", None), ("distillm", "DP2"), ("minillm", "TP2")])
def test_a_resumed_run_is_as_if_it_had_not_stopped(method, layout, one_rank, dataset, teacher, tmp_path):
    """In its own layout to the last bit: MiniLLM in the middle of its rollouts, DistiLLM with a buffer to replay."""
    keys = [*settings(method, dataset, teacher), "training.save_interval=3", "training.keep_checkpoints=null"]
    whole, _ = one_rank(method)
    train_in_ranks("TP1 PP1", keys, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_6")
    (tmp_path / "run/checkpoints/latest").write_text("step_3\n")
    if layout is not None:
        shutil.copytree(tmp_path / "run", tmp_path / "elsewhere")
        assert_same(steps_of(train_in_ranks(layout, keys, tmp_path / "elsewhere")), whole)
    again = steps_of(train_in_ranks("TP1 PP1", keys, tmp_path / "run"))
    assert without_times(again) == without_times(whole)


def test_the_methods_do_what_they_are_named_for(one_rank):
    """The comparisons above would also hold for sources that always take the dataset."""
    gkd, distillm, minillm = (one_rank(name)[0] for name in ("gkd", "distillm", "minillm"))
    assert {row["origin"] for row in gkd} == {"student", "teacher"}
    assert {"student", "replay"} <= {row["origin"] for row in distillm}
    assert all(row["reward"] != 0 and row["pretraining"] > 0 for row in minillm)
    assert read_metrics(one_rank("distillm")[1])[-1]["eval_loss"] > 0
    rewards = [row["reward"] for row in minillm]
    assert rewards[::2] == rewards[1::2] and len(set(rewards)) == 3, "two steps on each rollout"
    costs = {name: one_rank(name)[0][-1]["train_flops"] for name in METHODS}
    assert costs["gkd"] < costs["minillm released"] < costs["minillm"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["distillation.method=minillm", "teacher.placement=remote"], "token by token"),
        (["distillation.method=distillm"], "data.eval_path"),
        (["distillation.method=gkd", "distillation.gkd.seq_kd=true", "teacher.placement=remote"], "token by token"),
        (
            ["distillation.method=gkd", "teacher.placement=cached"],
            "generates text, which .* cached does not cover",
        ),
        (["distillation.method=gkd", "distillation.rollout.prompt_length=33"], "leaves no room"),
        (["distillation.method=minillm", "distillation.rollout.sampling.top_k=5"], "must be plain"),
        (["distillation.method=minillm", "distillation.temperature=2"], "describe minillm's pre-training loss"),
        (
            [
                "distillation.method=minillm",
                "distillation.minillm.teacher_mix=0",
                "distillation.pretraining_weight=1",
                "distillation.divergence=forward_kl",
                "teacher.placement=remote",
                "teacher.num_ranks=1",
                "teacher.payload=top_k",
            ],
            "whole distribution",
        ),
    ],
)
def test_what_cannot_be_is_refused(keys, message, dataset, teacher, tmp_path):
    given = [f"data.path={dataset.path}", "model.name=qwen_toy_student", f"teacher.path={teacher}",
             "teacher.placement=colocated", *keys]  # fmt: skip
    with pytest.raises(RankError, match=message) as refused:
        train_in_ranks("TP1 PP1", given, tmp_path / "run")
    assert ConfigError.__name__ in str(refused.value)
    assert not (tmp_path / "run").exists()
