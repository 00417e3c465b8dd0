"""Every parallel layout trains as one rank does: 20 losses and gradient norms within 1e-4 relative (fp32)."""

import pytest
import torch

from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import LAYOUTS, largest_relative_difference, train_in_ranks, whole_weights

TOLERANCE = 1e-4
SLOW = ("PP2 DP2 overlapped", "TP2 SP DP2 overlapped")
OTHER_LAYOUTS = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS if name != "TP1 PP1"]
COMMON = [
    "model.name=qwen_toy_student",
    "training.train_iters=20",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "optimizer.lr_warmup_iters=3",
]
OBJECTIVES = {
    "lm": [],
    "vanilla_kd": ["distillation.method=vanilla_kd", "teacher.placement=colocated"],
    "sequence means": ["training.loss_reduction=sequence"],
    "untied": ["model.name=qwen_toy_untied"],
    "norms on Q and K": ["model.name=qwen3_toy"],
    "scaled rotary": ["model.name=llama_toy"],
}


def settings(objective, dataset, teacher):
    keys = [f"data.path={dataset.path}", *COMMON, *OBJECTIVES[objective]]
    return keys + ([f"teacher.path={teacher}"] if objective == "vanilla_kd" else [])


@pytest.fixture(scope="module")
def one_rank(dataset, teacher, tmp_path_factory):
    """Metrics of the one-rank run of each objective, computed at first use."""
    runs, folders = {}, {}

    def metrics(objective):
        if objective not in runs:
            folders[objective] = tmp_path_factory.mktemp("one-rank") / "run"
            runs[objective] = train_in_ranks("TP1 PP1", settings(objective, dataset, teacher), folders[objective])
        return runs[objective]

    metrics.folder = folders.__getitem__
    return metrics


def assert_same_weights(ours, reference):
    """Every weight of two checkpoints, whole, within the tolerance of the update that 20 steps make."""
    (ours,), (reference,) = (shared_ranks(1).run(whole_weights, str(folder)) for folder in (ours, reference))
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        torch.testing.assert_close(
            ours[name][: len(expected)], expected[: len(ours[name])], rtol=1e-3, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.parametrize("objective", ["lm", "vanilla_kd"])
def test_layout_agrees_with_one_rank(layout, objective, one_rank, dataset, teacher, tmp_path):
    ours = train_in_ranks(layout, settings(objective, dataset, teacher), tmp_path / "run")
    for key in ("loss", "lm_loss", "grad_norm"):
        assert largest_relative_difference(ours, one_rank(objective), key) < TOLERANCE, key
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in one_rank(objective)]
    if objective == "lm":
        assert_same_weights(tmp_path / "run", one_rank.folder("lm"))


@pytest.mark.parametrize("objective", ["sequence means", "untied"])
@pytest.mark.parametrize("layout", ["DP2", "TP2 PP2", "CP2"])
def test_other_objectives_agree_with_one_rank(layout, objective, one_rank, dataset, teacher, tmp_path):
    ours = train_in_ranks(layout, settings(objective, dataset, teacher), tmp_path / "run")
    for key in ("loss", "grad_norm"):
        assert largest_relative_difference(ours, one_rank(objective), key) < TOLERANCE, key


@pytest.mark.parametrize(
    ("layout", "objective"),
    [
        ("TP2 SP", "norms on Q and K"),
        ("TP2 PP2", "norms on Q and K"),
        ("PP2", "scaled rotary"),
        ("CP2", "scaled rotary"),
    ],
)
def test_other_families_agree_with_one_rank(layout, objective, one_rank, dataset, teacher, tmp_path):
    ours = train_in_ranks(layout, settings(objective, dataset, teacher), tmp_path / "run")
    for key in ("loss", "grad_norm"):
        assert largest_relative_difference(ours, one_rank(objective), key) < TOLERANCE, key
    assert_same_weights(tmp_path / "run", one_rank.folder(objective))


def test_training_learns_and_kd_differs_from_lm(one_rank):
    """The comparison above would also hold for runs that do nothing."""
    lm, kd = one_rank("lm"), one_rank("vanilla_kd")
    assert lm[-1]["loss"] < lm[0]["loss"] - 0.3
    assert kd[-1]["kd_loss"] > 0 and kd[-1]["teacher_entropy"] > 0
    assert kd[-1]["loss"] == pytest.approx(0.5 * kd[-1]["lm_loss"] + 0.5 * kd[-1]["kd_loss"], rel=1e-5)
    assert kd[5]["lm_loss"] != lm[5]["lm_loss"]


def test_micro_batches_change_nothing(one_rank, dataset, teacher, tmp_path):
    whole = settings("lm", dataset, teacher) + ["training.micro_batch_size=8"]
    ours = train_in_ranks("TP1 PP1", whole, tmp_path / "run")
    for key in ("loss", "grad_norm"):
        assert largest_relative_difference(ours, one_rank("lm"), key) < TOLERANCE, key
