"""``evaluate`` under every layout: loss, calibration and exposure bias are those of one rank."""

import pytest

from megatron_kd.config import from_mapping
from megatron_kd.errors import LayoutError
from megatron_kd.evaluation.evaluate import run
from megatron_kd.evaluation.evaluate_config import EvaluateConfig
from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import LAYOUTS, call_verb, make_dataset, train_in_ranks

FIGURES = ("heldout_loss", "bits_per_byte", "ece", "accuracy", "confidence", "kl_on_student_text",
           "kl_on_teacher_text", "excess_accumulated_error_percent")  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Keys that name a student, its teacher and held-out chunks, some shorter than a prompt."""
    folder = tmp_path_factory.mktemp("evaluated")
    data = make_dataset(folder / "chunks", chunks=21)
    for name, model, steps in (("student", "qwen_toy_student", 4), ("teacher", "qwen_toy_reference", 15)):
        train_in_ranks("TP1 PP1", [f"data.path={data.path}", f"model.name={model}", f"training.train_iters={steps}"],
                       folder / name)  # fmt: skip
    return [f"model.path={folder / 'student'}", f"teacher={folder / 'teacher'}", f"data.path={data.path}",
            "calibration=true", "micro_batch_size=4", "exposure.num_texts=14", "exposure.prompt_length=6",
            "exposure.response_length=11"]  # fmt: skip


def figures(layout, settings):
    world, keys = LAYOUTS[layout]
    return shared_ranks(world).run(call_verb, "megatron_kd.evaluation.evaluate", "EvaluateConfig", [*settings, *keys])


@pytest.fixture(scope="module")
def one_rank(settings):
    return figures("TP1 PP1", settings)[0]


@pytest.mark.parametrize("layout", ["TP2 SP", "PP2", "DP2"])
def test_figures_are_those_of_one_rank(layout, settings, one_rank):
    assert one_rank["tokens"] > 100 and one_rank["kl_on_student_text"] > 0.01 and one_rank["ece"] > 0.001
    for found in figures(layout, settings):
        for name in FIGURES:
            assert found[name] == pytest.approx(one_rank[name], rel=1e-3, abs=1e-4), name


def test_loss_and_calibration_under_context_parallelism(settings, one_rank):
    """The exposure bias, whose text is generated token by token, is refused there."""
    for found in figures("CP2", [key for key in settings if not key.startswith(("teacher=", "exposure."))]):
        for name in FIGURES[:5]:
            assert found[name] == pytest.approx(one_rank[name], rel=1e-5, abs=1e-6), name


def refusal(keys: dict) -> str | None:
    try:
        run(from_mapping(EvaluateConfig, keys, "test"))
    except LayoutError as error:
        return str(error)
    return None


def test_tasks_are_refused_under_several_ranks():
    said = shared_ranks(2).run(refusal, {"model": {"path": "hf"}, "harness": {"tasks": ["piqa"]}})
    assert said[0] == said[1] and "not in 2: start evaluate without torchrun" in said[0]
