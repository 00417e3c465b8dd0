"""The quickstart's steps and configuration files fit together: paths, keys, equal FLOPs."""

from pathlib import Path

import pytest

from megatron_kd.cli import VERBS
from megatron_kd.config import load_config
from megatron_kd.costs.flops import matched_steps
from megatron_kd.data.tokenize_corpus import TokenizeCorpusConfig
from megatron_kd.models.architecture import architecture_by_name
from megatron_kd.quickstart import recipe as plan
from megatron_kd.quickstart.step_runner import step_keys
from megatron_kd.scoring.score_corpus import ScoreCorpusConfig
from megatron_kd.selection.sample_by_difference import SampleByDifferenceConfig
from megatron_kd.training.methods.method_table import METHODS
from megatron_kd.training.train_config import TrainConfig

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIGS = REPOSITORY / "examples/quickstart"
TRAINING = (
    "teacher",
    "reference",
    "student_pretrain",
    "student_vanilla_kd",
    "student_miniplm",
    "student_miniplm_vanilla_kd",
)


def training_config(name: str) -> TrainConfig:
    return load_config(TrainConfig, CONFIGS / f"{name}.yaml")


def test_every_step_runs_a_file_that_exists_after_what_it_needs() -> None:
    steps = plan.quickstart_steps(REPOSITORY)
    assert len(step_keys(steps)) == len(steps)  # names are unique, needs come before
    for step in steps:
        script = step.command[1]
        assert script == "-m" or (Path(script).is_file() and Path(script).stem in VERBS), step.name
        for config in step.configs:
            assert config.is_file()


def test_each_path_that_a_step_reads_is_what_a_step_before_it_makes() -> None:
    made = {str(path) for step in plan.quickstart_steps(REPOSITORY) for path in step.outputs}
    for name in TRAINING:
        config = training_config(name)
        read = [config.data.path, config.data.eval_path, *([config.teacher.path] if config.teacher.path else [])]
        assert set(read) <= made, name
    for name in ("teacher", "reference"):
        config = load_config(ScoreCorpusConfig, CONFIGS / f"score_{name}.yaml")
        assert {config.data.path, config.model.path, config.output} <= made
    sample = load_config(SampleByDifferenceConfig, CONFIGS / "sample_by_difference.yaml")
    assert {sample.data.path, sample.teacher_scores, sample.reference_scores, sample.output} <= made
    corpus = load_config(TokenizeCorpusConfig, CONFIGS / "tokenize_corpus.yaml")
    assert {*corpus.input, corpus.tokenizer, corpus.output, corpus.heldout_output, corpus.reference_output} <= made


@pytest.mark.parametrize("all_methods", [False, True])
def test_every_student_is_in_the_charts(all_methods: bool) -> None:
    plot = next(step for step in plan.quickstart_steps(REPOSITORY, all_methods) if step.name == "plot")
    students = plan.chosen_students(all_methods)
    assert {str(plan.run_folder(student.step)) for student in students} < set(plot.command)
    assert set(plot.needs) == {student.step for student in students} and plot.outputs == (plan.CHARTS,)


@pytest.mark.parametrize("name", ["student_vanilla_kd", "student_miniplm", "student_miniplm_vanilla_kd"])
def test_students_cost_what_the_baseline_costs(name: str) -> None:
    baseline, config = training_config("student_pretrain"), training_config(name)
    student = architecture_by_name(config.model.name).with_vocab_size(plan.VOCAB_SIZE).parameters
    teacher = architecture_by_name(training_config("teacher").model.name).with_vocab_size(plan.VOCAB_SIZE).parameters
    expected = matched_steps(baseline.training.train_iters, student, teacher, METHODS[config.distillation.method].cost)
    assert config.training.train_iters == expected
    assert config.training.global_batch_size == baseline.training.global_batch_size
    assert config.model == baseline.model and config.optimizer == baseline.optimizer


def test_methods_differ_in_what_they_are_named_after() -> None:
    configs = {student.method: load_config(TrainConfig, CONFIGS / student.config) for student in plan.STUDENTS}
    assert list(configs) == ["Pre-Train w/o KD", "Vanilla KD", "MiniPLM", "MiniPLM + Vanilla KD"]
    for method, config in configs.items():
        assert (config.distillation.method == "vanilla_kd") == ("Vanilla KD" in method)
        assert (config.data.path == str(plan.SAMPLED_DATA)) == ("MiniPLM" in method)
        assert config.data.eval_path == str(plan.HELDOUT_DATA)


def test_the_second_seed_differs_in_nothing_but_the_seed() -> None:
    steps = {step.name: step for step in plan.quickstart_steps(REPOSITORY)}
    first, second = steps["pretrain"].command, steps["pretrain_seed2"].command
    assert [part for part in second if part not in first] == [
        f"output={plan.run_folder('pretrain_seed2')}",
        f"training.seed={plan.SECOND_SEED}",
    ]
    assert training_config("student_pretrain").training.seed != plan.SECOND_SEED


def test_train_iters_come_from_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("training:\n  train_iters: 7\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\ntraining:\n  seed: 1\n")
    assert plan.read_train_iters(tmp_path / "top.yaml") == 7
    assert plan.config_chain(tmp_path / "top.yaml") == (tmp_path / "top.yaml", tmp_path / "base.yaml")
    (tmp_path / "none.yaml").write_text("output: x\n")
    with pytest.raises(ValueError, match="none.yaml.*train_iters"):
        plan.read_train_iters(tmp_path / "none.yaml")


def test_all_methods_add_the_students_that_generate_text():
    default, every = plan.quickstart_steps(REPOSITORY), plan.quickstart_steps(REPOSITORY, all_methods=True)
    added = {step.name for step in every} - {step.name for step in default}
    names = {student.step for student in plan.STUDENTS_WITH_TEXT}
    assert added == names | {f"export_{name}" for name in names} | {"generate_seqkd"}
    methods = set()
    for student in plan.STUDENTS_WITH_TEXT:
        config = load_config(TrainConfig, CONFIGS / student.config, student.overrides)
        assert config.model.init_from is None and config.optimizer.lr == 8e-3
        methods.add(config.distillation.method)
    assert methods == {"none", "gkd", "minillm", "distillm"}
