"""A whole plan: the paper's figures, recommendations, sizes on disk, and refused configurations."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from megatron_kd.config import load_config
from megatron_kd.errors import ConfigError, LayoutError
from megatron_kd.planning.paper import offline_readings, one_trillion_flops, printed_steps
from megatron_kd.planning.plan import (
    cache_sizes,
    corpus_bytes,
    make_plan,
    sampled_token_bytes,
    score_bytes,
    top_k_token_bytes,
)
from megatron_kd.planning.plan_run import PlanRunConfig, amount, plan_text, run
from megatron_kd.teachers.cache.codec import Codec, Entries
from megatron_kd.teachers.teacher_config import TeacherConfig
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset

REPOSITORY = Path(__file__).resolve().parents[3]
MINIPLM = REPOSITORY / "examples/miniplm_pile_qwen/student_500m.yaml"
VANILLA_KD = REPOSITORY / "examples/vanilla_kd_pile_qwen/student_500m.yaml"
KD = ["distillation.method=vanilla_kd", "teacher.placement=colocated"]


def plan(*overrides, file=MINIPLM):
    return make_plan(load_config(PlanRunConfig, file, overrides))


@pytest.mark.parametrize(
    ("student", "method", "formula", "printed"),
    [
        ("qwen_200m", "vanilla_kd", 25_000, 25_000),
        ("qwen_500m", "vanilla_kd", 45_455, 45_000),
        ("qwen_1.2b", "vanilla_kd", 66_667, 65_000),
        ("qwen_200m", "minillm", 13_636, 15_000),
        ("qwen_500m", "minillm", 26_786, 30_000),
        ("qwen_1.2b", "minillm", 42_857, 40_000),
    ],
)
def test_steps_of_the_paper(student, method, formula, printed):
    row = printed_steps(student, "qwen_1.8b", method)
    assert (row.formula, row.printed) == (formula, printed)
    assert row.deviation == pytest.approx(printed / formula - 1)
    assert printed_steps(student, "qwen_500m", method) is None


def test_steps_of_the_exact_sizes():
    steps = {budget.method: budget.steps for budget in plan().budgets}
    assert steps["none"] == 100_000
    assert steps["vanilla_kd"] == round(100_000 * 3 * 463_987_712 / (3 * 463_987_712 + 1_836_828_672))


@pytest.mark.parametrize(
    ("student", "flops"), [("qwen_200m", 1.258e21), ("qwen_500m", 3.146e21), ("qwen_1.2b", 7.298e21)]
)
def test_c_1t(student, flops):
    assert one_trillion_flops(student) == pytest.approx(flops, rel=1e-3)


def test_offline_flops_say_what_is_counted():
    readings = {reading.counted: reading for reading in offline_readings()}
    kept = next(r for text, r in readings.items() if "50B tokens" in text)
    proxy = next(r for text, r in readings.items() if "proxy" in text)
    assert kept.flops == 1.8e20 and kept.printed == 2e20 and proxy.flops == proxy.printed == 9e18


def test_time_is_flops_over_rate():
    costs = {cost.what: cost for cost in plan("plan.num_gpus=64", "plan.mfu=0.5").costs}
    training = costs["training"]
    assert training.flops == 6 * 463_987_712 * 100_000 * 512 * 1024
    assert training.hours == pytest.approx(training.flops / (64 * 989.5e12 * 0.5) / 3600)
    assert training.gpu_hours == pytest.approx(64 * training.hours)
    assert costs["offline: teacher scores the corpus"].flops == 2 * 1_836_828_672 * 100_000_000_000


def test_a_cached_teacher_costs_nothing_while_training():
    online, cached = plan(*KD), plan(KD[0], "teacher.placement=cached")
    assert cached.costs[0].flops == plan().costs[0].flops < online.costs[0].flops
    assert cached.stages[0].teacher_weights == 0 < online.stages[0].teacher_weights


def test_small_models_are_planned_data_parallel():
    best = plan(*KD, "plan.num_gpus=64").recommendation
    assert (best.candidate.layout.tensor, best.candidate.layout.pipeline) == (1, 1)
    assert best.placement == "colocated" and best.payload == "hidden" and len(best.reasons) >= 4


def test_what_does_not_fit_is_split_or_refused():
    tight = plan(*KD, "plan.num_gpus=8", "plan.usable_memory=0.12").recommendation
    layout = tight.candidate.layout
    assert layout.tensor * layout.pipeline > 1 or tight.candidate.micro_batch_size < 8
    assert tight.candidate.memory.total <= 0.12 * 79 * 2**30
    nothing = plan(*KD, "plan.usable_memory=0.01").recommendation
    assert nothing.candidate is None and "no layout of 8 GPUs" in nothing.reasons[-1]


def test_the_budget_of_the_loss_is_that_of_the_run():
    whole, small = plan(*KD), plan(*KD, "distillation.loss.tile_megabytes=128")
    saved = (896 - 128) << 20
    assert whole.stages[-1].loss - small.stages[-1].loss == saved
    whole, small = whole.recommendation.candidate, small.recommendation.candidate
    assert whole.micro_batch_size == small.micro_batch_size and whole.memory.loss - small.memory.loss == saved


def test_a_pipeline_gets_an_uneven_split():
    even = plan(*KD, "parallel.pipeline_model_parallel_size=4")
    assert even.split.layers == (6, 6, 6, 6) and even.balanced.layers[-1] < 6
    assert even.balanced.slowest < even.split.slowest and even.balanced.keys[0] in plan_text(even)
    uneven = plan(*KD, "parallel.pipeline_model_parallel_size=4", *even.balanced.keys)
    assert uneven.split == uneven.balanced == even.balanced
    assert uneven.stages[0].weights > even.stages[0].weights and uneven.stages[-1].weights < even.stages[-1].weights
    assert sum(s.weights for s in uneven.stages) == sum(s.weights for s in even.stages)


def test_a_recommended_pipeline_comes_with_its_split():
    """Where weights alone fill a GPU, the pipeline that is recommended has room for the output layers."""
    found = plan(*KD, "model.name=qwen_1.2b", "plan.usable_memory=0.1", "plan.gpus_per_node=1")
    best = found.recommendation.candidate
    assert best.layout.pipeline > 1 and best.split.keys and set(best.split.keys) < set(best.keys)
    again = plan(*KD, "model.name=qwen_1.2b", "plan.gpus_per_node=1", *best.keys)
    assert again.split == best.split and max(s.total for s in again.stages) == pytest.approx(best.memory.total)
    assert " ".join(best.keys) in plan_text(found)


REMOTE = (KD[0], "teacher.placement=remote", "teacher.num_ranks=8", "plan.num_gpus=24")


def test_a_remote_teacher_has_its_own_ranks_and_the_student_the_rest():
    made = plan(*REMOTE, "teacher.tensor_model_parallel_size=2")
    assert made.layout.endswith("DP16") and made.stages[0].optimizer < plan(*KD).stages[0].optimizer
    (teacher,) = made.teacher_stages
    assert teacher.teacher_weights == pytest.approx(1_836_828_672, rel=0.01) and teacher.weights == 0
    assert made.stages[0].teacher_weights == 2 * 151_936 * 2048 and made.traffic.hand_off > 0
    text = plan_text(made)
    assert "a teacher's rank (8)" in text and "8 of 24 GPUs" in text


def test_time_with_a_remote_teacher_is_that_of_the_side_that_waits_longest():
    """Work by hand: the student's side computes the teacher's output layer too."""
    made = plan(*REMOTE)
    head, student, teacher = 2 * 151_936 * 2048, 6 * 463_987_712, 2 * 1_836_828_672
    slower = max((student + head) / 16, (teacher - head) / 8)
    rate = 989.5e12 * 0.4 * 3600
    assert made.costs[0].hours == pytest.approx(slower * 100_000 * 512 * 1024 / rate)
    assert made.remote.balanced_ranks == 11
    balanced = plan(*REMOTE, "teacher.num_ranks=11", "training.micro_batch_size=1", "training.global_batch_size=13")
    assert 1 <= balanced.remote.slowdown < 1.05 < made.remote.slowdown


def test_a_sparse_payload_leaves_the_head_to_the_teacher():
    made = plan(*REMOTE, "teacher.payload=sampled")
    assert made.head_share == 0 and made.stages[0].teacher_weights == 0
    assert made.traffic.hand_off == 512 // 16 * 1024 * (8 * 50 + 4)


def test_the_text_names_the_deviation_from_the_paper():
    text = plan_text(plan())
    for expected in (
        "26,786",
        "30,000",
        "+12.0%",
        "45,455",
        "463,987,712",
        "308,405,248",
        "1.8e+20",
        "3.146e+21",
        "8 N_s + 4 N_t",
        "also miniplm, seqkd",
        "pipeline bubble",
    ):
        assert expected in text


def test_json_holds_everything(tmp_path, capsys):
    made = run(load_config(PlanRunConfig, MINIPLM, [*KD, f"plan.output={tmp_path / 'a/plan.json'}"]))
    assert json.loads((tmp_path / "a/plan.json").read_text()) == json.loads(json.dumps(made.as_dict()))
    assert "recommended:" in capsys.readouterr().out


def processor_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("file", [MINIPLM, VANILLA_KD], ids=lambda path: path.parent.name)
def test_the_command_answers_in_two_seconds_without_torch(file):
    """Processor time, which other work on the machine does not change."""
    code = (
        "import sys; from megatron_kd.cli import _run_verb\n"
        f"assert _run_verb('plan_run', ['--config', {str(file)!r}]) == 0\n"
        "assert 'torch' not in sys.modules and 'megatron.core' not in sys.modules"
    )
    before = processor_seconds()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=REPOSITORY)
    assert processor_seconds() - before < 2


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ([*KD, "plan.teacher=null"], ConfigError, "'plan.teacher' .* is required"),
        (KD[:1], ConfigError, "needs 'teacher.placement'"),
        (["model.name=as_init_from", "model.init_from=x"], ConfigError, "gives a plan no sizes"),
        (["optimizer.lr=-1"], ConfigError, "'optimizer.lr' must be above 0"),
        (["plan.gpu=abacus"], ConfigError, "not one of a100"),
        (["plan.mfu=40"], ConfigError, "at most 1"),
        (["plan.numgpus=8"], ConfigError, "plan.num_gpus"),
        (["parallel.tensor_model_parallel_sise=2"], ConfigError, "tensor_model_parallel_size"),
        (["training.global_batch_sise=2"], ConfigError, "global_batch_size"),
        (["distillation.method=telepathy"], ConfigError, "must be one of none, vanilla_kd, .*, not 'telepathy'"),
        (["distillation.loss.tile_megabytes=0"], ConfigError, "'distillation.loss.tile_megabytes' must be at least"),
        (["distillation.loss.chunk_megabytes=0"], ConfigError, "'distillation.loss.tile_megabytes' must be at least"),
        (["parallel.tensor_model_parallel_size=3", "plan.num_gpus=3"], LayoutError, "student under TP3"),
        ([*REMOTE[:2]], ConfigError, "'teacher.num_ranks' .* is required"),
        ([*REMOTE[:3], "plan.num_gpus=8"], LayoutError, "leaves none of the plan.num_gpus 8 GPUs"),
        ([*REMOTE, "teacher.num_ranks=3", "teacher.tensor_model_parallel_size=2"], LayoutError, "the teacher's ranks"),
        (["plan.num_gpus=7", "parallel.tensor_model_parallel_size=2"], LayoutError, "7 ranks do not divide"),
    ],
)
def test_what_it_refuses(overrides, error, message):
    with pytest.raises(error, match=message):
        plan(*overrides)


def test_amounts():
    assert [amount(size) for size in (12, 3.2e12, 1.5e9)] == ["12 B", "3.2 TB", "1.5 GB"]


@pytest.mark.parametrize("vocab_size", [300, 151_936])
def test_a_written_dataset_has_the_planned_size(tmp_path, vocab_size):
    chunks, length = 2000, 129
    ids = numpy.random.default_rng(0).integers(0, 300, (chunks, length))
    write_chunk_dataset(tmp_path / "d", iter(ids), plain_tokenizer_info(vocab_size, 0), length - 1)
    size = sum(path.stat().st_size for path in (tmp_path / "d").glob("chunks-*") if path.suffix in (".bin", ".idx"))
    assert corpus_bytes(chunks * length, vocab_size, length - 1) == pytest.approx(size, rel=0.02)


def test_scores_are_one_float_per_sequence():
    assert score_bytes(50e9, 1024) == pytest.approx(200e6, rel=0.05)  # the paper's 200 MB for 50B tokens


def test_caches_of_the_papers_corpus():
    full, top, sampled = cache_sizes(50e9, 151_936, 1024)
    assert 2 * full.total == pytest.approx(30e15, rel=0.02)  # the paper counts 4 bytes per logit: 30 PB
    assert sampled.bytes_per_token == pytest.approx(39, rel=0.02)
    assert top.bytes_per_token == pytest.approx(239, rel=2e-3)


@pytest.mark.parametrize(("name", "size"), [("top_k", 64), ("top_k", 5), ("sampled", 50)])
def test_a_record_has_the_planned_size(name, size):
    """The size of a record that the codec writes."""
    positions, vocabulary = 512, 151_936
    generator = numpy.random.default_rng(0)
    counts = numpy.full(positions, size) if name == "top_k" else generator.integers(1, 25, positions)
    total = int(counts.sum())
    ids = generator.integers(0, vocabulary, total).astype(numpy.uint32)
    values = (
        {"probabilities": numpy.full(total, 0.01, numpy.float32)}
        if name == "top_k"
        else {"draws": numpy.ones(total, numpy.uint16)}
    )
    entries = Entries(counts=counts, ids=ids, tail=numpy.full(positions, 0.1, numpy.float32), columns=values)
    codec = Codec.build(name, TeacherConfig(top_k=size, num_draws=size), vocabulary)
    record = codec.encode(numpy.ones(positions, bool), entries)
    planned = (
        top_k_token_bytes(size, vocabulary)
        if name == "top_k"
        else sampled_token_bytes(size, total / positions, vocabulary)
    )
    assert planned * positions == pytest.approx(len(record), rel=2e-3)
