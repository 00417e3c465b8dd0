"""``score_corpus`` and ``predict_difference`` killed and started again give the bits of a run that nobody disturbed.

Scoring goes on on other ranks too; a proxy's training adds gradients in another order there, so it stays on one.
"""

from pathlib import Path

import numpy
import pytest

from megatron_kd.config import from_mapping
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.scoring.score_file import write_score_file
from megatron_kd.selection.split_dataset import SplitDatasetConfig
from megatron_kd.selection.split_dataset import run as split
from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import call_verb
from tests.end_to_end.random_kills import KilledCommand

HERE = Path(__file__).parent
SETTINGS = ["micro_batch_size=2", "chunks_per_unit=4"]
WRITES = 25  # of a run from its start: a record for every 4 of 96 chunks, and the manifest


@pytest.fixture(scope="module")
def killed(dataset, teacher, tmp_path_factory):
    """verb → the command, and the scores that an undisturbed run of it gave."""
    made = {}

    def get(verb):
        if verb not in made:
            make = {"score_corpus": score_corpus, "predict_difference": predict_difference}[verb]
            made[verb] = make(dataset, teacher, tmp_path_factory.mktemp(verb))
        return made[verb]

    return get


def score_corpus(dataset, teacher, folder):
    keys = [f"data.path={dataset.path}", f"model.path={teacher}", *SETTINGS]
    module = "megatron_kd.scoring.score_corpus"
    return command("score_corpus", "dying_scorer.py", module, "ScoreCorpusConfig", keys, [1, 2], folder)


def predict_difference(dataset, teacher, folder):
    tree = {"data": {"path": str(dataset.path)}, "fraction": 0.6, "output": str(folder / "subset")}
    split(from_mapping(SplitDatasetConfig, tree, "test"))
    subset = ChunkDataset.open(folder / "subset")
    scored = [subset.has_unmasked_position(index) for index in range(len(subset))]
    for name in ("teacher", "reference"):
        scores = numpy.where(scored, numpy.random.default_rng(len(name)).normal(3, 1, len(subset)), numpy.nan)
        write_score_file(folder / name, scores, subset, {"fingerprint": name}, "float32", {"tool": "test"})
    keys = [
        f"data.path={dataset.path}", f"subset.path={subset.path}", f"subset.teacher_scores={folder}/teacher",
        f"subset.reference_scores={folder}/reference", f"proxy.path={teacher}", "training.train_iters=3",
        "training.batch_size=4", *SETTINGS,
    ]  # fmt: skip
    return command("predict_difference", "dying_predictor.py", "megatron_kd.selection.predict_difference",
                   "PredictDifferenceConfig", keys, [1], folder)  # fmt: skip


def command(verb, driver, module, config, keys, worlds, folder):
    def finish(arguments, ranks):
        shared_ranks(ranks).run(call_verb, module, config, arguments)

    def arguments(output):
        return [*keys, f"output={output}"]

    def check(output):
        assert (output / "scores.npy").read_bytes() == expected

    finish(arguments(folder / "whole"), 1)
    expected = (folder / "whole" / "scores.npy").read_bytes()
    return KilledCommand(
        verb, HERE / driver, WRITES, arguments, lambda given, chance: finish(given, chance.choice(worlds)), check
    ), folder / "whole" / "scores.npy"


def test_two_kills(killed, tmp_path):
    killed("score_corpus")[0].survive(tmp_path, kills=2, in_a_write=1)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["score_corpus", "predict_difference"])
def test_twenty_kills(verb, killed, tmp_path):
    killed(verb)[0].survive(tmp_path, kills=20, in_a_write=8)


def test_the_scores_are_finite_and_differ(killed):
    assert numpy.load(killed("score_corpus")[1]).std() > 0.01
