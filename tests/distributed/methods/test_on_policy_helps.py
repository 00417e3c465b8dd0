"""A toy language in which training on one's own text provably helps.

A sequence starts with START, then takes branch A or B with equal probability; each branch then follows a fixed
successor table over ids of its own. The teacher knows both branches; the dataset holds branch A alone. The loss on it
has no term for any context of branch B, so its gradient knows nothing of B's table, while the teacher's branching,
which is in the loss of the first position, sends the student there half of the time: off-policy the divergence on the
student's own text stays that of an untrained branch. On its own text the student meets B's contexts and the teacher's
answers.
"""

import numpy as np
import pytest

from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import call_verb, train_in_ranks
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset

START, BRANCH, VOCABULARY, LENGTH = 1, 12, 32, 12
COMMON = ["model.name=qwen_toy_reference", "training.global_batch_size=16", "training.micro_batch_size=16",
          "optimizer.lr=5e-3", "optimizer.lr_warmup_iters=5"]  # fmt: skip


def language(branches, count, seed):
    """``count`` sequences over the given branches (0 is A, 1 is B)."""
    generator = np.random.default_rng(seed)
    tables = [np.random.default_rng(branch).permutation(BRANCH) for branch in (0, 1)]
    for number in range(count):
        branch = branches[number % len(branches)]
        inner = [int(generator.integers(BRANCH))]
        while len(inner) < LENGTH:
            inner.append(int(tables[branch][inner[-1]]))
        yield np.array([START, *(4 + branch * BRANCH + value for value in inner)])


@pytest.mark.slow
def test_on_policy_training_lowers_the_divergence_on_the_students_own_text(tmp_path):
    def write(name, branches, seed):
        tokenizer = plain_tokenizer_info(VOCABULARY, 0)
        return write_chunk_dataset(tmp_path / name, language(branches, 512, seed), tokenizer, LENGTH)

    both, only_a = write("both", (0, 1), 1), write("a", (0,), 2)
    train_in_ranks("TP1 PP1", [f"data.path={both.path}", *COMMON, "training.train_iters=120"], tmp_path / "teacher")
    divergence = {}
    for name, fraction in (("off-policy", 0.0), ("on-policy", 1.0)):
        keys = [
            f"data.path={only_a.path}",
            f"teacher.path={tmp_path / 'teacher'}",
            "teacher.placement=colocated",
            "distillation.method=gkd",
            "distillation.divergence=forward_kl",
            f"distillation.gkd.student_fraction={fraction}",
            "distillation.rollout.prompt_length=1",
            "training.train_iters=120",
            "training.seed=3",
        ]
        train_in_ranks("TP1 PP1", [*COMMON, *keys], tmp_path / name)
        settings = [
            f"model.path={tmp_path / name}",
            f"data.path={both.path}",
            f"teacher={tmp_path / 'teacher'}",
            "exposure.prompt_length=1",
            f"exposure.response_length={LENGTH}",
            "calibration=true",
        ]
        (figures,) = shared_ranks(1).run(call_verb, "megatron_kd.evaluation.evaluate", "EvaluateConfig", settings)
        divergence[name] = figures["kl_on_student_text"]
        assert 0 <= figures["ece"] <= 1
    assert divergence["on-policy"] < 0.5 * divergence["off-policy"], divergence
