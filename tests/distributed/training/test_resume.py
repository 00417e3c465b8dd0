"""A run saved under one layout resumes under another as if it had never stopped: losses within 1e-5 relative."""

import shutil

import pytest
import torch

from megatron_kd.metrics.tracker import read_metrics
from tests.distributed.training.runs import largest_relative_difference, train_in_ranks
from tests.reference.full_state import load_full_state

TOLERANCE = 1e-5
STEPS, SAVED_AT = 12, 6
COMMON = [
    "model.name=qwen_toy_student",
    f"training.train_iters={STEPS}",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "optimizer.lr_warmup_iters=2",
    f"training.save_interval={SAVED_AT}",
]


def settings(dataset, untied=False):
    return [f"data.path={dataset.path}", *COMMON, *(["model.name=qwen_toy_untied"] if untied else [])]


@pytest.fixture(scope="module")
def whole_runs(dataset, tmp_path_factory):
    """Uninterrupted runs that kept the checkpoint of their middle, by layout and head."""
    made = {}

    def folder(layout, untied=False):
        if (layout, untied) not in made:
            path = tmp_path_factory.mktemp("whole") / "run"
            train_in_ranks(layout, settings(dataset, untied), path)
            made[layout, untied] = path
        return made[layout, untied]

    return folder


def half_done(whole, folder, step=SAVED_AT):
    """A copy of a run as it was when its checkpoint of ``step`` had been written."""
    copy = shutil.copytree(whole, folder)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(copy / "checkpoints" / f"step_{later}", ignore_errors=True)
    (copy / "checkpoints" / "latest").write_text(f"step_{step}\n")
    return copy


@pytest.mark.parametrize(
    ("saved", "resumed", "untied"),
    [
        ("TP1 PP1", "TP2", False),
        ("TP1 PP1", "PP2", False),
        ("TP1 PP1", "TP2 PP2", False),
        ("TP1 PP1", "DP2", False),
        ("TP1 PP1", "PP2", True),
        ("TP2 PP2", "TP1 PP1", True),
        ("TP2", "PP2", False),
        ("DP2", "TP1 PP1", False),
        ("TP2 PP2", "DP2", False),
        ("PP2", "PP2 VPP2", False),
        ("DP2 overlapped", "TP1 PP1", False),
        ("PP2 DP2", "TP1 PP1", False),
        ("CP2", "DP2", False),
        ("TP1 PP1", "CP2", True),
    ],
)
def test_resumed_under_another_layout(saved, resumed, untied, whole_runs, dataset, tmp_path):
    folder = half_done(whole_runs(saved, untied), tmp_path / "run")
    train_in_ranks(resumed, settings(dataset, untied), folder)
    ours, expected = read_metrics(folder), read_metrics(whole_runs("TP1 PP1", untied))
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert ours[:SAVED_AT] == read_metrics(whole_runs(saved, untied))[:SAVED_AT], "rows of the first half stay"
    assert largest_relative_difference(ours, expected, "loss") < TOLERANCE
    assert largest_relative_difference(ours, expected, "grad_norm") < 10 * TOLERANCE
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in expected]


def test_what_is_loaded_matters(whole_runs, dataset, tmp_path):
    """The tolerance above tells a run whose optimizer state was lost from one that has it."""
    folder = tmp_path / "run"
    fresh = [key for key in settings(dataset) if not key.startswith("training.save_interval")]
    start = whole_runs("TP1 PP1") / "checkpoints" / f"step_{SAVED_AT}"
    train_in_ranks("TP1 PP1", [*fresh, f"model.init_from={start}", "optimizer.lr_warmup_iters=0"], folder)
    expected = read_metrics(whole_runs("TP1 PP1"))
    assert largest_relative_difference(read_metrics(folder)[:6], expected[SAVED_AT:], "loss") > 100 * TOLERANCE


def test_weights_of_a_checkpoint_are_the_trained_ones_under_overlap(whole_runs, dataset):
    """With overlapped gathers a rank's copy of the others' shards is old until the next forward pass asks for it."""
    _, plain, _ = load_full_state(whole_runs("DP2"))
    _, overlapped, _ = load_full_state(whole_runs("DP2 overlapped"))
    _, earlier, _ = load_full_state(whole_runs("DP2") / "checkpoints" / f"step_{SAVED_AT}")
    assert plain.keys() == overlapped.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(overlapped[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    assert any((plain[name] - earlier[name]).abs().max() > 1e-3 for name in plain)


EXACT = [
    "model.name=qwen_toy_reference",
    "training.global_batch_size=16",  # 96 chunks: an epoch ends after step 6
    "training.micro_batch_size=4",
    "training.save_interval=4",
    "training.keep_checkpoints=9",
]


def assert_same_end(ours, expected):
    assert [row["loss"] for row in read_metrics(ours)] == [row["loss"] for row in read_metrics(expected)]
    (_, found, _), (_, weights, _) = load_full_state(ours), load_full_state(expected)
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", ["TP1 PP1", "TP2", "DP2"])
def test_every_bit_is_the_same_with_a_teacher_beside_it_and_across_an_epoch(layout, dataset, teacher, tmp_path):
    keys = [*settings(dataset), *EXACT, "distillation.method=vanilla_kd", f"teacher.path={teacher}"]
    train_in_ranks(layout, [*keys, "teacher.placement=colocated"], tmp_path / "whole")
    folder = half_done(tmp_path / "whole", tmp_path / "run", 4)
    train_in_ranks(layout, [*keys, "teacher.placement=colocated"], folder)
    assert_same_end(folder, tmp_path / "whole")


def test_every_bit_is_the_same_after_accumulation_has_changed(dataset, tmp_path):
    """From step 4 on in micro-batches of 8 instead of 4, and killed in that part too."""
    keys = [*settings(dataset), *EXACT]
    train_in_ranks("TP1 PP1", keys, tmp_path / "unchanged")
    changed = half_done(tmp_path / "unchanged", tmp_path / "changed", 4)
    train_in_ranks("TP1 PP1", [*keys, "training.micro_batch_size=8"], changed)
    assert largest_relative_difference(read_metrics(changed), read_metrics(tmp_path / "unchanged"), "loss") < TOLERANCE
    folder = half_done(changed, tmp_path / "run", 8)
    train_in_ranks("TP1 PP1", [*keys, "training.micro_batch_size=8"], folder)
    assert_same_end(folder, changed)
