"""What a run of each method costs by torch's own counter, against the formula that its log and its budget go by.

What the formula leaves out is attention over the sequence and, over reused rollouts, a look at their probabilities by
now: 1 to 9% of these short runs.
"""

import numpy as np
import pytest

from megatron_kd.metrics.tracker import read_metrics
from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import train_here, train_in_ranks
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset

VOCABULARY, LENGTH, ROWS, STEPS = 384, 32, 8, 4  # a vocabulary without padding
METHODS = {
    "vanilla_kd": (6, 2, []),
    "gkd": (8, 2, ["distillation.gkd.student_fraction=1"]),
    "distillm": (8, 2, ["distillation.distillm.initial_threshold=1"]),
    "minillm": (8, 4, []),
    "minillm, scored": (8, 4, ["distillation.minillm.teacher_mix=0"]),
    "minillm, reused": (7, 3, ["distillation.minillm.inner_epochs=2"]),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Keys that name a dataset without ends of documents, and a teacher."""
    folder = tmp_path_factory.mktemp("costs")
    chunks = np.random.default_rng(0).integers(1, VOCABULARY, size=(32, LENGTH + 1))
    data = write_chunk_dataset(folder / "chunks", iter(chunks), plain_tokenizer_info(VOCABULARY, 0), LENGTH)
    common = [f"data.path={data.path}", f"training.global_batch_size={ROWS}", f"training.micro_batch_size={ROWS}"]
    train_in_ranks("TP1 PP1", [*common, "model.name=qwen_toy_reference", "training.train_iters=1"], folder / "teacher")
    steps = f"training.train_iters={STEPS}"
    return [*common, steps, f"data.eval_path={data.path}", f"teacher.path={folder / 'teacher'}"]


def counted(settings):
    """Operations of a training run's matrix products, those of its evaluations left out."""
    from unittest.mock import patch

    from torch.utils.flop_counter import FlopCounterMode

    from megatron_kd.training.trainer import Trainer

    total, train_one = [], Trainer._train_one

    def measured(self, *arguments):
        with FlopCounterMode(display=False) as counter:
            result = train_one(self, *arguments)
        total.append(counter.get_total_flops())
        return result

    with patch.object(Trainer, "_train_one", measured):
        train_here(settings)
    return sum(total)


@pytest.mark.parametrize("method", METHODS)
def test_counted_operations_are_near_the_formula(method, paths, tmp_path):
    from megatron_kd.checkpoints.weights import open_checkpoint

    student_factor, teacher_factor, keys = METHODS[method]
    settings = [*paths, *keys, "model.name=qwen_toy_student", "teacher.placement=colocated",
                f"distillation.method={method.split(',')[0]}", "distillation.rollout.prompt_length=8",
                f"output={tmp_path / 'run'}"]  # fmt: skip
    (operations,) = shared_ranks(1).run(counted, settings, timeout=300)
    student = open_checkpoint(tmp_path / "run").architecture.parameters
    teacher = open_checkpoint(paths[-1].split("=")[1]).architecture.parameters
    formula = (student_factor * student + teacher_factor * teacher) * ROWS * LENGTH * STEPS
    logged = [row for row in read_metrics(tmp_path / "run") if "loss" in row][-1]
    assert logged["train_flops"] == formula
    assert logged["seconds"] > 0
    assert operations == pytest.approx(formula, rel=0.12), operations / formula
