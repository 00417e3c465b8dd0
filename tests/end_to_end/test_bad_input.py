"""Bad input through the command line: exit status 2, one line that says what is wrong, nothing unfinished on disk."""

import json
import shutil

import pytest

from megatron_kd.checkpoints.weights import checkpoint_folders, open_checkpoint
from megatron_kd.cli import main
from tests.distributed.training.runs import SEQ_LENGTH, make_dataset
from tests.end_to_end.commands import SMALL, run
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset

KD = ["distillation.method=vanilla_kd", "teacher.placement=colocated"]


def refused(capfd, verb, *arguments):
    """Return the one line on stderr of a verb that refuses its input, called as its process calls it."""
    with pytest.raises(SystemExit) as ended:
        main(verb, list(arguments))
    captured = capfd.readouterr()
    assert ended.value.code == 2, captured.err
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{verb}: "), captured.err
    assert captured.out == ""
    return lines[0]


CASES = {
    "unknown key": (["trainin.seed=3"], r"unknown key 'trainin'"),
    "unknown key below": (
        ["training.train_iter=3"],
        r"unknown key 'training.train_iter' (did you mean 'training.train_iters'?)",
    ),
    "wrong type": (["training.train_iters=many"], "'training.train_iters' must be of type int, not 'many'"),
    "wrong choice": (["training.precision=fp8"], "'training.precision' must be one of fp32, bf16"),
    "unknown model": (["model.name=qwen_toy"], "'model.name' is 'qwen_toy', not one of"),
    "world by TP": (
        ["parallel.tensor_model_parallel_size=2"],
        "1 ranks do not divide into tensor x pipeline x context",
    ),
    "batch by micro-batch": (
        ["training.global_batch_size=9", "training.micro_batch_size=2"],
        "training.global_batch_size 9 does not divide by training.micro_batch_size 2",
    ),
    "missing dataset": (["data.path=/nowhere/data"], "/nowhere/data: no such folder"),
    "missing held-out dataset": (["data.eval_path=/nowhere/data"], "/nowhere/data: no such folder"),
    "short sequences": (
        [f"data.seq_length={SEQ_LENGTH - 1}"],
        f"data.seq_length {SEQ_LENGTH - 1} is below the {SEQ_LENGTH}",
    ),
    "missing teacher": ([*KD, "teacher.path=/nowhere/run"], "/nowhere/run: no such checkpoint or run folder"),
    "no teacher": (["distillation.method=vanilla_kd"], "needs 'teacher.placement'"),
    "missing start": (["model.init_from=/nowhere/run"], "/nowhere/run: no such checkpoint or run folder"),
    "missing file": (["--config", "/nowhere/config.yaml"], "/nowhere/config.yaml: cannot read"),
}


@pytest.mark.parametrize("case", CASES)
def test_train_refuses(case, dataset, tmp_path, capfd):
    arguments, message = CASES[case]
    output = tmp_path / "run"
    said = refused(capfd, "train", f"data.path={dataset.path}", f"output={output}", *SMALL, *arguments)
    assert message in said
    assert not output.exists(), "a run that is refused leaves no folder"


def test_another_tokenizer(dataset, teacher, tmp_path, capfd):
    other = write_chunk_dataset(
        tmp_path / "other", ([1] * 33 for _ in range(16)), plain_tokenizer_info(200, 0), SEQ_LENGTH
    )
    data = [f"data.path={other.path}", f"output={tmp_path / 'run'}"]
    for arguments in ([*KD, f"teacher.path={teacher}"], [f"model.init_from={teacher}"]):
        said = refused(capfd, "train", *data, *SMALL, *arguments)
        assert "was trained with tokenizer plain-300-0, but the dataset" in said and "plain-200-0" in said
    said = refused(
        capfd,
        "train",
        f"data.path={dataset.path}",
        f"data.eval_path={other.path}",
        f"output={tmp_path / 'run'}",
        *SMALL,
    )
    assert "has tokenizer plain-200-0" in said
    for verb, keys in (("evaluate", []), ("score_corpus", [f"output={tmp_path / 'scores'}"])):
        assert "plain-200-0" in refused(capfd, verb, f"data.path={other.path}", f"model.path={teacher}", *keys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


@pytest.mark.parametrize("keys, seq_length, message", [
    ([], 40, "has chunks of seq_length 40, above the model's 32"),
    (["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"], 31, "cannot divide into 2 parts"),
])  # fmt: skip
def test_heldout_chunks_that_the_model_does_not_take(keys, seq_length, message, dataset, tmp_path, capfd):
    """Refused before the first step, not at the first evaluation."""
    info = dataset.tokenizer_info()
    other = write_chunk_dataset(tmp_path / "other", ([1] * 20 for _ in range(4)), info, seq_length)
    said = refused(capfd, "train", f"data.path={dataset.path}", f"data.eval_path={other.path}",
                   f"output={tmp_path / 'run'}", *SMALL, *keys)  # fmt: skip
    assert message in said
    assert not (tmp_path / "run").exists()


def test_another_architecture_to_start_from(dataset, teacher, tmp_path, capfd):
    said = refused(
        capfd,
        "train",
        f"data.path={dataset.path}",
        f"output={tmp_path / 'run'}",
        *SMALL,
        "model.name=qwen_toy_student",
        f"model.init_from={teacher}",
    )
    assert "is of another model: num_layers 2 where 4 is asked for" in said
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint(dataset, teacher, tmp_path, capfd):
    copy = shutil.copytree(teacher, tmp_path / "copy")
    newest = checkpoint_folders(copy / "checkpoints")[0]
    largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    data = f"data.path={dataset.path}"
    for verb, arguments in (
        ("train", [*SMALL, *KD, f"teacher.path={copy}", f"output={tmp_path / 'run'}"]),
        ("train", [*SMALL, f"model.init_from={copy}", f"output={tmp_path / 'run'}"]),
        ("evaluate", [f"model.path={copy}"]),
        ("score_corpus", [f"model.path={copy}", f"output={tmp_path / 'run'}"]),
    ):
        said = refused(capfd, verb, data, *arguments)
        assert "is damaged" in said and largest.name in said
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_dataset_seed_or_model_changes_nothing(dataset, teacher, tmp_path, capfd):
    copy = shutil.copytree(teacher, tmp_path / "copy")
    files = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    other = make_dataset(tmp_path / "other", seed=9)
    for keys, message in (
        ([f"data.path={other.path}"], "was made with dataset"),
        (["training.seed=3"], "training.seed 77 where 3 is asked for"),
        (["model.name=qwen_toy_untied"], "is of another model"),
    ):
        said = refused(capfd, "train", f"data.path={dataset.path}", f"output={copy}", *SMALL, "training.seed=77", *keys)
        assert message in said
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == files


def test_output_that_is_a_file(dataset, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    said = refused(capfd, "train", f"data.path={dataset.path}", f"output={tmp_path / 'file'}", *SMALL)
    assert f"output {tmp_path / 'file'} is not a folder" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_loss_that_is_not_finite_names_step_and_chunks(dataset, tmp_path, capfd):
    output = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        main(
            "train",
            [
                f"data.path={dataset.path}",
                f"output={output}",
                *SMALL,
                "training.train_iters=6",
                "training.save_interval=1",
                "optimizer.lr=1e30",
                "optimizer.lr_warmup_iters=2",
            ],
        )
    said = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "is not finite" in line]
    assert ended.value.code == 2 and len(said) == 1
    step = len((output / "metrics.jsonl").read_text().splitlines())
    assert step >= 2 and said[0].startswith(f"train: step {step + 1}: loss ")
    chunks = json.loads(said[0].split("chunks of the batch: ")[1])
    assert len(chunks) == 16 and all(0 <= chunk < 96 for chunk in chunks)
    info = open_checkpoint(output)
    info.verify()
    assert info.path.name == f"step_{step}"


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (
            2,
            ["parallel.tensor_model_parallel_size=2", "model.name=qwen_toy_untied", "training.train_iter=3"],
            "unknown key",
        ),
        pytest.param(
            3,
            ["parallel.tensor_model_parallel_size=3"],
            "attention heads 4 do not divide by tensor_model_parallel_size 3",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_several_ranks_print_one_line(ranks, arguments, message, dataset, tmp_path):
    output = tmp_path / "run"
    ended = run("train", f"data.path={dataset.path}", f"output={output}", *SMALL, *arguments, ranks=ranks)
    ours = [line for line in ended.stderr.splitlines() if line.startswith("train: ")]
    assert len(ours) == 1 and message in ours[0], ended.stderr
    assert "exitcode  : 2" in ended.stderr and ended.stderr.count("Traceback") == 1, "torchrun's own"
    assert not output.exists()


def test_a_real_process_prints_one_line_about_a_batch_that_does_not_divide(dataset, tmp_path):
    ended = run(
        "train",
        f"data.path={dataset.path}",
        f"output={tmp_path / 'run'}",
        "model.name=qwen_toy_student",
        "training.global_batch_size=6",
        "training.micro_batch_size=4",
    )
    assert ended.status == 2 and ended.stdout == "" and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "training.global_batch_size 6 does not divide" in ended.stderr


@pytest.mark.slow
def test_the_rank_that_fails_alone_reports_it(dataset, tmp_path):
    """A damaged block that only rank 1 of two data-parallel ranks reads."""
    program = tmp_path / "program.py"
    program.write_text(ONE_RANK_FAILS)
    ended = run("train", f"data.path={dataset.path}", f"output={tmp_path / 'run'}", *SMALL, ranks=2, program=program)
    assert ended.stderr.count("train: damaged, only here\n") == 1, ended.stderr
    assert ended.stderr.count("train: ") == 2, "the other line announces the start"
    assert "exitcode  : 2" in ended.stderr


ONE_RANK_FAILS = """
import os
from megatron_kd.logs import silence_known_noise
silence_known_noise()
from megatron_kd.errors import DataError
from megatron_kd.training import trainer
real = trainer.make_batch
def make_batch(*arguments):
    if os.environ["RANK"] == "1":
        raise DataError("damaged, only here")
    return real(*arguments)
trainer.make_batch = make_batch
from megatron_kd.cli import main
if __name__ == "__main__":
    main("train")
"""
