"""examples/vanilla_kd_placements: one student with its teacher co-located, remote and cached, the same loss curve."""

import pytest

from megatron_kd.metrics.tracker import read_metrics
from tests.distributed.training.runs import VOCABULARY
from tests.end_to_end.commands import REPOSITORY, run

EXAMPLES = REPOSITORY / "examples/vanilla_kd_placements"
STEPS = 8


@pytest.mark.slow
def test_the_three_placements_give_one_loss_curve(dataset, teacher, tmp_path):
    """Four ranks each under torchrun, student and teacher laid out as the examples say, on this test's data."""

    def cache(output):
        ended = run("cache_teacher_logits", "--config", str(EXAMPLES / "cache.yaml"), f"data.path={dataset.path}",
                    f"teacher.path={teacher}", f"output={output}", f"top_k={VOCABULARY}")  # fmt: skip
        assert ended.status == 0, ended.stderr

    cache(tmp_path / "cache")
    more = {"cached": [f"teacher.{name}={tmp_path / 'cache'}" for name in ("cache_path", "eval_cache_path")]}
    curves = {}
    for placement in ("colocated", "remote", "cached"):
        folder = tmp_path / placement
        ended = run(
            "train", "--config", str(EXAMPLES / f"{placement}.yaml"), f"data.path={dataset.path}",
            f"data.eval_path={dataset.path}", f"teacher.path={teacher}", f"output={folder}",
            f"training.train_iters={STEPS}", "training.eval_interval=4", "training.global_batch_size=8",
            *more.get(placement, []), ranks=4, timeout=400,
        )  # fmt: skip
        assert ended.status == 0, ended.stderr
        curves[placement] = read_metrics(folder)
    expected = curves["colocated"]
    assert len([row for row in expected if "loss" in row]) == STEPS
    assert len([row for row in expected if "eval_kd_loss" in row]) == 2
    for placement, tolerance in (("remote", 1e-4), ("cached", 2e-3)):  # a cache keeps probabilities in 16 or 10 bits
        assert len(curves[placement]) == len(expected)
        for ours, row in zip(curves[placement], expected, strict=True):
            for key in ("loss", "lm_loss", "kd_loss", "eval_loss", "eval_kd_loss"):
                assert (key in ours) == (key in row)
                if key in row:
                    assert ours[key] == pytest.approx(row[key], rel=tolerance), (placement, key)
