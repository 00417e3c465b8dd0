"""examples/{seqkd,gkd,minillm,distillm}_quickstart: every command of their READMEs, in a few steps on small data."""

import dataclasses

import pytest

from megatron_kd.config import load_config
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.generation.generation_config import GenerateCorpusConfig
from megatron_kd.metrics.tracker import read_metrics
from megatron_kd.training.train_config import TrainConfig
from tests.end_to_end.commands import REPOSITORY, run
from tests.end_to_end.workshop import Workshop, commands

METHODS = {"seqkd": "none", "gkd": "gkd", "minillm": "minillm", "distillm": "distillm"}
SHORT = ("data.path={data} data.eval_path={data} training.train_iters=4 training.eval_interval=2 "
         "training.global_batch_size=4 training.micro_batch_size=4 distillation.rollout.prompt_length=24")  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_configurations(name):
    folder = REPOSITORY / f"examples/{name}_quickstart"
    config = load_config(TrainConfig, folder / "student.yaml", [])
    assert config.distillation.method == METHODS[name]
    assert config.training.train_iters % config.training.eval_interval == 0
    for block in commands(folder / "README.md"):
        assert block.count("tools/") >= 1
    if name == "seqkd":
        text = load_config(GenerateCorpusConfig, folder / "generate_corpus.yaml", [])
        assert config.data.path == text.output and text.model.path == "runs/quickstart/runs/teacher"
    else:
        assert config.teacher.path == "runs/quickstart/runs/teacher"
        assert dataclasses.replace(config.distillation.rollout, prompt_length=192) == config.distillation.rollout


@pytest.fixture(scope="module")
def quickstart(dataset, teacher, tmp_path_factory):
    """What is in ``runs/quickstart`` where somebody has run it."""
    folder = tmp_path_factory.mktemp("quickstart")
    ended = run("train", f"data.path={dataset.path}", f"output={folder / 'pretrain'}", "model.name=qwen_toy_student",
                "training.train_iters=4")  # fmt: skip
    assert ended.status == 0, ended.stderr
    return {"data/train": dataset.path, "data/heldout": dataset.path, "runs/teacher": teacher,
            "runs/pretrain": folder / "pretrain"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_command_runs(name, quickstart, dataset, tmp_path):
    short = SHORT.format(data=dataset.path if name != "seqkd" else "runs/quickstart/data/seqkd")
    workshop = Workshop(tmp_path, {
        "tools/train.py": short,
        "tools/generate_corpus.py": "prompt_length=24 response_length=8 num_texts=12",
    })  # fmt: skip
    for place, target in quickstart.items():
        workshop.link(f"runs/quickstart/{place}", target)
    page = REPOSITORY / f"examples/{name}_quickstart/README.md"
    workshop.run(page, 600)
    runs = sorted((tmp_path / "runs").glob(f"student_{name}*"))
    assert len(runs) == sum(block.count("tools/train.py") for block in commands(page))
    for folder in runs:
        assert len([row for row in read_metrics(folder) if "loss" in row]) == 4
    if name == "seqkd":
        assert ChunkDataset.open(tmp_path / "runs/quickstart/data/seqkd").num_chunks == 12
